"""Train a network.

  python -m launch.train --config=experiments/small.py --workdir=runs/small
  python -m launch.train --config=experiments/strided.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.train.epochs=30

The same command again goes on where the run stopped. The work directory holds config.json,
manifest.json, metrics.jsonl, TensorBoard events, curves.png and checkpoints/.
"""

from pathlib import Path

from cnn_jax import config as cfg
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir('Folder of the run; created if missing.')


def main(_) -> int:
    """Train; returns the exit code."""
    config = cli.read_config(CONFIG)
    return train(config, Path(WORKDIR.value))


def train(config: cfg.Config, folder: Path) -> int:
    """Run or continue the training in `folder`, printing what a person wants to see."""
    from cnn_jax.train import workdir

    workdir.claim(folder, config)
    settings = cli.start(config.train.threads)
    print(settings)

    from cnn_jax import runtime
    from cnn_jax.data.batches import open_batches
    from cnn_jax.models.build import build
    from cnn_jax.models.summary import summary
    from cnn_jax.train import loop, metrics, record, setup

    batches = {
        'train': open_batches(config.data, 'train', seed=config.seed),
        'evaluation': open_batches(config.data, 'eval'),
    }
    description = setup.describe(config, **batches)
    workdir.check_data(folder, description)
    weights = setup.load_weights(config)
    if weights:
        print(f'weights: {weights.source}, digest {weights.digest[:12]}…, {weights.licence}')
    description['preprocessing'] = setup.preprocessing(config, batches['train'], weights)
    task = setup.make_task(config, description, weights)
    print(
        f'{config.data.source}: {batches["train"].n:,} training and {batches["evaluation"].n:,} '
        f'evaluation images, {setup.shape_text(task.image_shape)}, {task.num_classes} classes; '
        f'{task.ends[-1]:,} steps of {config.data.batch} on {runtime.devices()}'
    )
    print(summary(build(config.model, task.num_classes), setup.prepared_shape(task)))
    phases, state = setup.open_phases(config, description, task, **batches)
    for number, phase in enumerate(phases, start=1):
        kind = 'cached features' if phase.steps.cached else 'images'
        print(f'phase {number}, to step {phase.end:,}, on {kind}:')
        print(setup.parameter_table(config, phase.steps))
    machine = runtime.machine(settings)
    record.write_manifest(folder, record.manifest(cfg.content_hash(config), machine, description))
    outcome = loop.fit(config, task, phases, state, folder)
    if outcome.stopped:
        print(f'stopped and saved; the same command goes on from here ({folder})')
        return cli.STOPPED
    assert outcome.metrics is not None
    times = max(count for counts in outcome.compilations for count in counts.values())
    print(f'compilations of each step in each phase: {times}')
    final = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(outcome.metrics).items())
    print(f'done: {final}\nresults in {folder}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
