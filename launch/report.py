"""Render the report of an ablation again, from what is on disk.

  python -m launch.report --workdir=runs/regularization

Reads ablation.json and cells/; writes report.html, summary.json, summary.csv,
cost.json and figures/ into the work directory, and prints the verdicts.
"""

from pathlib import Path

from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.ablate.')


def main(_) -> int:
    """Render; returns the exit code."""
    from cnn_jax.ablation.report import Ablation

    result = Ablation(Path(WORKDIR.value))
    path = result.write_report()
    print(result)
    print(f'report: {path}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
