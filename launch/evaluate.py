"""Evaluate a trained network on a split of its data.

  python -m launch.evaluate --workdir=runs/small
  python -m launch.evaluate --workdir=runs/small --split='train[:500]' --checkpoint=best

Prints loss, accuracy, top-5, calibration error and the accuracy of each class; writes
evaluation.json, confusion.png and reliability.png into the work directory.
"""

from absl import flags

from cnn_jax import runtime
from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.train, or its gs:// URL.', url=True)
SPLIT = flags.DEFINE_string('split', None, "The split; by default the run's config.data.eval.")
CHECKPOINT = cli.define_checkpoint()


def main(_) -> int:
    """Evaluate; returns the exit code."""
    runtime.configure()  # before JAX is imported

    from cnn_jax.tools.evaluate import FILES, evaluate, write_evaluation
    from cnn_jax.train import metrics, remote
    from cnn_jax.train.run import load_run

    run = load_run(WORKDIR.value, CHECKPOINT.value)
    evaluation = evaluate(run, SPLIT.value or '')
    result, names = evaluation.metrics, run.class_names
    if evaluation.split == run.config.data.eval and not evaluation.seen:
        print('note: these are not the images that the run was evaluated on')
    for note in evaluation.notes:
        print(f'note: {note}')
    source = run.config.data.source
    print(f'{source} {evaluation.split}: {result["count"]:,} images, step {run.step}')
    for name, number in metrics.scalars(result).items():
        print(f'  {name:<18} {number:.4f}')
    width = max(map(len, names))
    for name, accuracy, row in zip(names, result['class_accuracy'], result['confusion']):
        print(f'  class {name:<{width}}  accuracy {accuracy:.4f}  of {row.sum():,}')
    write_evaluation(run, evaluation, run.folder)
    remote.upload(WORKDIR.value, FILES)
    print(f'written: {WORKDIR.value}/{", ".join(FILES)}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
