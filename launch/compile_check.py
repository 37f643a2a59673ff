"""Compile the training step for a TPU that is not here, and say what it will cost there.

  python -m launch.compile_check --config=experiments/strided.py --topology=v5e:2x4
  python -m launch.compile_check --config=experiments/strided.py --topology=v5e:2x4,v6e:2x4 \\
      --batch_per_chip=32 --config.model.dtype=bfloat16 --json=cost.json

libtpu, the compiler for TPUs, needs no TPU. It needs an environment of its own:

  python3 -m venv .tpu
  .tpu/bin/pip install -r requirements-tpu.txt -c requirements-lock.txt
  .tpu/bin/python -m launch.compile_check ...

For each slice it prints, of one chip: memory, work, communication between chips, what the padding
of arrays wastes, transfers to the host, and an estimate of the time of a step and of how it scales.
Counts are the compiler's; times are estimates from the chips' data sheets: nothing is run. A step
takes some minutes to compile. With the slice of one chip among them, v5e:1x1, the efficiency of
others is against that. Exit code 1: a step does not fit, or talks to its host.
"""

import json
import math
from pathlib import Path

from absl import flags

from cnn_jax.errors import UserError
from cnn_jax.validation import validate
from launch import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_list(
    'topology',
    None,
    'Slices to compile for, e.g. v5e:2x4,v6e:2x4: the chip, and how many along each side.',
    required=True,
)
BATCH = flags.DEFINE_integer(
    'batch_per_chip',
    0,
    'Examples a step and chip, in the place of config.data.batch, which counts those of all chips.',
    lower_bound=0,
)
MODEL_PARALLEL, FSDP = cli.define_layout()
CLASSES = flags.DEFINE_integer(
    'classes',
    0,
    'Number of classes, for configs that give resize, size and channels: their data are not '
    'opened. 0: ten, or two for one output.',
    lower_bound=0,
)
JSON = flags.DEFINE_string('json', '', 'File for the same as JSON.')


def main(_) -> int:
    """Compile and print; returns the exit code."""
    from cnn_jax.scaling.chips import topology

    config, slices = cli.read_config(CONFIG), [topology(name) for name in TOPOLOGY.value or ['']]

    from cnn_jax.scaling import ahead

    ahead.prepare()
    known = ahead.description(config, CLASSES.value)
    found: list[dict] = []
    for each in sorted(slices, key=lambda slice: math.prod(slice.sides)):
        check(config, known, each, found)
    if JSON.value:
        try:
            Path(JSON.value).write_text(json.dumps(found, indent=1) + '\n')
        except OSError as error:
            raise UserError(f'--json={JSON.value}: {error.strerror}') from error
    good = all(one['fits'] and not one['host_transfers'] for one in found)
    return cli.OK if good else cli.FAILED


def check(config, known, topology, all_found: list[dict]) -> None:
    """Compile every phase for one slice, print what each costs, and add it to what was found."""
    import dataclasses

    from cnn_jax.scaling import ahead, report

    devices = ahead.devices(topology)
    if BATCH.value:
        groups = math.prod(topology.sides) // MODEL_PARALLEL.value
        data = dataclasses.replace(config.data, batch=BATCH.value * groups)
        config = validate(dataclasses.replace(config, data=data))
    options = {'model': MODEL_PARALLEL.value, 'fsdp': FSDP.value}
    for program in ahead.programs(config, known, devices, **options):
        batch = program.batch // program.layout.mesh.shape['data']
        alone = one_chip(all_found, topology, program.phase, batch)
        found = report.facts(
            program.text, program.flops, program.nbytes, program.memory, topology, batch, alone
        )
        found |= {'phase': program.phase, 'layout': str(program.layout), 'batch': program.batch}
        found |= {'dtype': config.model.dtype, 'hosts': program.hosts}
        print(title(program, topology, config.model.dtype), flush=True)
        print(*report.lines(found, topology.chip), sep='\n', flush=True)
        all_found.append(found)


def title(program, topology, dtype: str) -> str:
    """What was compiled, and for what."""
    hosts = f'{program.hosts} host{"s" * (program.hosts > 1)}'
    used = program.layout.mesh.size
    spare = f' (only {used} chips can share the batch)' if used < program.chips else ''
    each = program.batch // program.layout.mesh.shape['data']
    return (
        f'{topology}, {program.chips} × {topology.chip.kind} on {hosts}, {program.layout}{spare}; '
        f'{dtype}, {program.batch:,} examples a step, {each:,} a chip; phase {program.phase}, '
        f'compiled in {program.seconds:.0f} s'
    )


def one_chip(all_found: list[dict], topology, phase: int, batch: int) -> float | None:
    """The estimate for one chip of the same kind with as many examples, if it was compiled."""
    for found in all_found:
        if found['topology'] == f'{topology.chip.name}:1x1' and found['phase'] == phase:
            return found['estimate']['step_serial'] if found['batch_per_chip'] == batch else None
    return None


if __name__ == '__main__':
    cli.run(main)
