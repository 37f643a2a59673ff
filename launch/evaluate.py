"""Evaluate a trained network on a split of its data, and show its mistakes.

  python -m launch.evaluate --workdir=runs/small
  python -m launch.evaluate --workdir=runs/small --split='train[:500]' --checkpoint=best

Prints a summary. Writes into the folder evaluation/SPLIT-step_N of the work directory, one for each
split and checkpoint: evaluation.html (the mistakes, confusions, calibration, duplicates of training
images), evaluation.json (every number) and predictions.csv (one line per image).
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

    from cnn_jax.tools.evaluate import evaluate
    from cnn_jax.train import remote
    from cnn_jax.train.run import load_run

    run = load_run(WORKDIR.value, CHECKPOINT.value)
    evaluation = evaluate(run, SPLIT.value or '')
    for note in evaluation.notes:
        print(f'note: {note}')
    print(evaluation)
    names = [path.relative_to(run.folder).as_posix() for path in evaluation.write_report()]
    remote.upload(WORKDIR.value, names)
    folder = evaluation.folder.relative_to(run.folder)
    print(f'written: {WORKDIR.value}/{names[0]}, and numbers and predictions in {folder}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
