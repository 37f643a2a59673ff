"""Evaluate a trained network on a split of its data.

  python -m launch.evaluate --workdir=runs/small
  python -m launch.evaluate --workdir=runs/small --split='train[:500]' --checkpoint=best

Prints loss, accuracy, top-5, calibration error and the accuracy of each class; writes
evaluation.json, confusion.png and reliability.png into the work directory.
"""

import json

from absl import flags

from cnn_jax.errors import UserError
from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.train, or its gs:// URL.', url=True)
SPLIT = flags.DEFINE_string('split', None, "The split; by default the run's config.data.eval.")
CHECKPOINT = flags.DEFINE_enum(
    'checkpoint',
    None,
    ['latest', 'best'],
    'Which checkpoint; best is by config.train.best. By default the latest, or the best if the run '
    'has config.train.patience.',
)


def main(_) -> int:
    """Evaluate; returns the exit code."""
    from cnn_jax.train import mirror, workdir

    folder = mirror.opened(WORKDIR.value)
    config = workdir.load_config(folder)
    print(cli.start(config.train.threads))

    from cnn_jax import config as cfg
    from cnn_jax.data.batches import open_batches
    from cnn_jax.files import write_text
    from cnn_jax.tools import figures
    from cnn_jax.train import metrics, restore, setup, step
    from cnn_jax.train.loop import sum_metrics
    from cnn_jax.train.shared import jitted, placed

    run = restore.open_run(folder, CHECKPOINT.value)
    split, described = SPLIT.value or config.data.eval, run.manifest['data']
    names = described['class_names']
    data, layout = cfg.replace(config, {'data.eval': split}).data, setup.layout_of(config)
    batches = open_batches(data, 'eval', sharding=layout and layout.batch)
    if list(batches.class_names) != names:
        raise UserError(
            f'the classes of {config.data.source} are {", ".join(batches.class_names)} now, but '
            f'the run was trained on {", ".join(names)}; restore them'
        )
    if split == config.data.eval and batches.fingerprint != described['eval']['fingerprint']:
        print('note: these are not the images that the run was evaluated on')
    state = placed(run.state, layout)
    _, evaluate, _ = jitted(run.steps, layout, state)
    sums = sum_metrics(evaluate, state, batches.evaluate(), step.values_of(config))
    result = metrics.result(sums)
    print(f'{config.data.source} {split}: {result["count"]:,} images, step {run.step}')
    for name, number in metrics.scalars(result).items():
        print(f'  {name:<18} {number:.4f}')
    width = max(map(len, names))
    for name, accuracy, row in zip(names, result['class_accuracy'], result['confusion']):
        print(f'  class {name:<{width}}  accuracy {accuracy:.4f}  of {row.sum():,}')
    content = {
        'split': split,
        'step': run.step,
        **metrics.as_json(result),
        'confusion': result['confusion'].tolist(),
    }
    write_text(folder / 'evaluation.json', json.dumps(content, indent=2) + '\n')
    figures.draw_confusion(result['confusion'], names, folder / 'confusion.png')
    figures.draw_reliability(sums, folder / 'reliability.png')
    written = 'evaluation.json', 'confusion.png', 'reliability.png'
    mirror.upload(WORKDIR.value, written)
    print(f'written: {WORKDIR.value}/{", ".join(written)}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
