"""Verify that a run is reproducible: train parts of it again and compare every bit.

  python -m launch.verify --workdir=runs/small
  python -m launch.verify --workdir=runs/small --steps=100
  python -m launch.verify --workdir=runs/regularization --arm=dropout --seed=3

The first steps are trained again, and those after the newest checkpoint that has some after it; of
an ablation one replicate, whole. Conditions that have changed since the run began (device, threads,
versions, flags, data, code) are listed. Nothing in the work directory is changed. Exit code 0: bit
for bit the same; 1: something differs.
"""

from pathlib import Path

from absl import flags

from cnn_jax import runtime
from cnn_jax.errors import UserError
from launch import cli

WORKDIR = cli.define_workdir(
    'Folder of a run of launch.train, or its gs:// URL; or that of an ablation.', url=True
)
ARM = flags.DEFINE_string('arm', '', 'The arm of an ablation; by default the baseline.')
SEED = flags.DEFINE_integer('seed', None, 'The seed of its replicate; by default the first.')
STEPS = flags.DEFINE_integer(
    'steps', 10, 'How many steps to train again, in each of the two places.', lower_bound=1
)


def main(_) -> int:
    """Verify; returns the exit code."""

    def tell(what: str, difference: str) -> None:
        print(f'  differs  {what}: {difference}' if difference else f'  same     {what}')

    if (folder := Path(WORKDIR.value)).joinpath('ablation.json').exists():
        from cnn_jax.ablation.run import repeat

        if flags.FLAGS['steps'].present:
            raise UserError(f'{folder} is an ablation, whose replicate is whole; leave out --steps')

        same, changed = repeat(folder, ARM.value, SEED.value, tell)
    elif ARM.value or SEED.value is not None:
        raise UserError(f'{folder} is not an ablation; leave out --arm and --seed')
    else:
        runtime.configure()  # before JAX is imported

        from cnn_jax.tools.verify import verify_run

        same, changed = verify_run(WORKDIR.value, STEPS.value, tell)
    if same:
        print(f'verified: what was repeated of {WORKDIR.value} is bitwise identical')
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
