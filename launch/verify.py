"""Verify that a run is reproducible: train parts of it again and compare every bit.

  python -m launch.verify --workdir=runs/small
  python -m launch.verify --workdir=runs/small --steps=100

The first steps are trained again, and those after the newest checkpoint that has some after it.
Conditions that have changed since the run began (device, threads, versions, flags, data, code) are
listed. Nothing
in the work directory is changed. Exit code 0: bit for bit the same; 1: something differs.
"""

from absl import flags

from cnn_jax import runtime
from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.train, or its gs:// URL.', url=True)
STEPS = flags.DEFINE_integer(
    'steps', 10, 'How many steps to train again, in each of the two places.', lower_bound=1
)


def main(_) -> int:
    """Verify; returns the exit code."""
    runtime.configure()  # before JAX is imported

    from cnn_jax.tools.verify import verify_run

    def tell(what: str, difference: str) -> None:
        print(f'  differs  {what}: {difference}' if difference else f'  same     {what}')

    same, changed = verify_run(WORKDIR.value, STEPS.value, tell)
    if same:
        print(f'verified: the repeated steps of {WORKDIR.value} are bitwise identical')
        return cli.OK
    if changed:
        print(f'not the same: {", ".join(changed)} changed since the run began')
    else:
        print(
            'not the same, though nothing that is known to matter has changed: a file of the run '
            'was altered, or this machine does not compute the same twice'
        )
    return cli.FAILED


if __name__ == '__main__':
    cli.run(main)
