"""Compile the training step for GPUs or TPUs that are not here and print its cost there.

  python -m launch.compile_check --config=experiments/strided.py --topology=h100:1,h100:8
  python -m launch.compile_check --config=experiments/strided.py --topology=v5e:2x4,v6e:2x4 \\
      --batch_per_chip=32 --config.model.dtype=bfloat16 --json=cost.json

The compilers need no GPU and no TPU. They need environments of their own:

  python3 -m venv .gpu
  .gpu/bin/pip install -r requirements-gpu-compile.txt -c requirements-lock.txt
  .gpu/bin/python -m launch.compile_check ...

and likewise .tpu with requirements-tpu.txt. It prints one table with a column for each target and
phase: memory, FLOPs, bytes, communication between chips, transfers to the host and kernels, all of
one chip, and an estimate of the step's time from the chips' data sheets: nothing is run. A step
takes seconds (GPU) to minutes (TPU) to compile. Exit code 1: a step does not fit, or talks to its
host. XLA_FLAGS="--xla_dump_to=FOLDER" keeps the programs.
"""

import dataclasses
import json

from absl import flags

from cnn_jax.config import validate
from cnn_jax.errors import UserError
from launch import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_list(
    'topology',
    None,
    'What to compile for, e.g. h100:8,v5e:2x4: the chip, and the number of chips, of a TPU along '
    'each side of the slice.',
    required=True,
)
BATCH = flags.DEFINE_integer(
    'batch_per_chip',
    0,
    'Examples per step and chip; replaces config.data.batch, which counts those of all chips.',
    lower_bound=0,
)
MODEL_PARALLEL, FSDP = cli.define_layout()
CLASSES = flags.DEFINE_integer(
    'classes',
    0,
    'Number of classes, for configs with resize, size and channels, whose data are not opened. '
    '0: ten, or two for one output.',
    lower_bound=0,
)
TOGETHER = flags.DEFINE_integer(
    'together',
    1,
    'Runs of an ablation that a chip trains together, as --together of launch.ablate has it.',
    lower_bound=1,
)
JSON = cli.define_path('json', 'Also write the costs to this file, as JSON.')


def main(_) -> int:
    """Compile for each target, print one table, and return the exit code."""
    config, components = cli.read_experiment(CONFIG)

    from cnn_jax.tools import compile_check

    if JSON.value:
        _write(JSON.value, '', 'a')  # what cannot be written fails now, not after the compiling
    targets = [compile_check.parse_target(name) for name in TOPOLOGY.value or ['']]
    if TOGETHER.value > 1 and any(target.count > 1 for target in targets):
        raise UserError(
            '--together: each run of an ablation is on one chip; give a topology of one, h100:1'
        )
    compile_check.prepare(targets)
    description = compile_check.describe_data(config, components, CLASSES.value)
    options = {'model': MODEL_PARALLEL.value, 'fsdp': FSDP.value, 'together': TOGETHER.value}
    costs: list[dict] = []
    for target in sorted(targets, key=lambda target: target.count):
        if BATCH.value:
            replicas = max(target.count // MODEL_PARALLEL.value, 1)
            data = dataclasses.replace(config.data, batch=BATCH.value * replicas, eval_batch=0)
            config = validate(dataclasses.replace(config, data=data))
        costs += compile_check.compile_steps(config, components, description, target, **options)
    print(compile_check.table(costs))
    if JSON.value:
        _write(JSON.value, json.dumps(costs, indent=1) + '\n')
    good = all(cost['fits'] and not cost['host_transfers'] for cost in costs)
    return cli.OK if good else cli.FAILED


def _write(path: str, text: str, mode: str = 'w') -> None:
    try:
        with open(path, mode) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f'--json={path}: {error.strerror}') from error


if __name__ == '__main__':
    cli.run(main)
