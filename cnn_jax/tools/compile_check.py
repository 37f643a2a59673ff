"""The cost of a training step on a chip that is not here: compiled for it, never run.

libtpu is a compiler as well as a driver and needs no TPU to compile for one. Memory, FLOPs, bytes
and communication are the compiler's own counts; times follow from data sheets by the roofline

T = max(T_chip, T_links) … T_chip + T_links,  T_chip = max(FLOPs / peak, bytes / bandwidth)

(all communication hidden … none hidden; Williams et al. 2009). Along a side of a chips, S bytes
that all of them want take S/a · (a − 1) / W + (a − 1) · 1 µs, where W is one link, or two where the
side closes to a ring; an all-reduce is a reduce-scatter and an all-gather, twice that.

Sources: Google Cloud, "TPU v5e", "TPU v6e", "TPU v5p"; Austin et al. 2025, "How to Scale Your
Model", part 2 (https://jax-ml.github.io/scaling-book/tpus).
"""

import functools
import importlib.util
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnn_jax import config as cfg
from cnn_jax.components import Components
from cnn_jax.data.decode import image_shape
from cnn_jax.data.sources import open_split
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.mesh import Layout, make_mesh
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.train import setup
from cnn_jax.train.loop import compile_phase
from cnn_jax.train.program import Program, begin_phase, state_maker, traced_values

# None of them changes what is compiled: libtpu is to ask no metadata server, which Google's
# machines alone have, is not to miss the answer, and may be loaded by several processes at once.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
HOP = 1e-6  # seconds from one chip to the next
CLASSES, EPOCH = 10, 1000  # classes, and steps per epoch, where the data are not opened

# Kinds of communication, each with its time as a multiple of an all-gather's.
KINDS = {
    'all-reduce': 2.0,
    'all-gather': 1.0,
    'reduce-scatter': 1.0,
    'all-to-all': 0.5,
    'collective-permute': 0.0,  # one array over one link
}
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)')
ARRAY = re.compile(r'\b([a-z]+)(\d*)\w*\[([\d,]*)\]')
GROUPS = re.compile(
    r'replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] *\{([^}]*)\})'
)
CALLBACK = re.compile(r'custom_call_target="(\w*callback\w*|MoveTo\w*)"')


class Chip(NamedTuple):
    """One kind of chip. By default JAX computes float32 products in bfloat16 on a TPU, too."""

    peak: float  # FLOP/s in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes/s of memory
    link: float  # bytes/s of one link between chips, one way
    axes: int  # sides of a slice
    cube: int  # a side closes to a ring in multiples of it


CHIPS = {
    'v5e': Chip(197e12, 16e9, 819e9, 45e9, 2, 16),
    'v5p': Chip(459e12, 95e9, 2.765e12, 90e9, 3, 4),
    'v6e': Chip(918e12, 32e9, 1.638e12, 90e9, 2, 16),
}


class Target(NamedTuple):
    """A slice of a pod, `v5e:2x4`: its chip, and the number of chips along each side."""

    name: str
    chip: Chip
    sides: tuple[int, ...]


def parse_target(name: str) -> Target:
    """Parse a name such as `v5e:2x4`.

    Errors:
        UserError: It is not such a name, or the chip is unknown.
    """
    kind, _, sides = name.strip().partition(':')
    if kind not in CHIPS:
        raise UserError(
            f'--topology={name}: the chip must be one of {", ".join(CHIPS)}, and its slice follows '
            'a colon, e.g. v5e:2x4'
        )
    axes = CHIPS[kind].axes
    if not re.fullmatch(rf'[1-9]\d*(x[1-9]\d*){{1,{axes - 1}}}', sides, re.ASCII):
        example = f'{kind}:{"2x4" if axes == 2 else "2x2x1"}'
        raise UserError(
            f'--topology={name}: after the colon go the numbers of chips along the {axes} sides, '
            f'e.g. {example}'
        )
    return Target(name.strip(), CHIPS[kind], tuple(map(int, sides.split('x'))))


def prepare() -> None:
    """Set up this process to compile for TPUs and to run on its CPU; call it before JAX starts.

    Errors:
        UserError: libtpu is not installed.
    """
    if not (importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH')):
        raise UserError(
            f'{sys.executable} has no libtpu, the compiler for TPUs; install it into an '
            'environment of its own: python -m venv .tpu, then .tpu/bin/pip install -r '
            'requirements-tpu.txt -c requirements-lock.txt, and use .tpu/bin/python'
        )
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')  # JAX has read the environment
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def devices(target: Target) -> list[Any]:
    """Return the devices of a slice, for which programs can be compiled.

    Errors:
        UserError: The compiler does not know the slice.
    """
    from jax.experimental import topologies

    host = [*(min(2, side) for side in target.sides[:2]), 1]  # four chips, if there are as many
    try:
        topology = topologies.get_topology_desc(
            topology_name=target.name, platform='tpu', chips_per_host_bounds=host
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
        raise UserError(
            f'--topology={target.name}: libtpu knows no such slice ({reason}); use sides that are '
            'powers of two, e.g. v5e:2x4'
        ) from error
    return list(topology.devices)


def describe_data(config: cfg.Config, classes: int = 0) -> dict[str, Any]:
    """Describe the data as `train.setup.describe` does, as far as it shapes the program.

    Where `config.data` gives the images' shape, the data need not exist. Statistics are
    placeholders: their values shape nothing.

    Args:
        config: A validated config.
        classes: Number of classes of data that are not opened; 0 assumes 10, or 2 with one output.

    Errors:
        UserError: The data must be opened and cannot be.
    """
    data, model = config.data, config.model
    if data.resize != 'none' and data.size and data.channels:
        shape, count = (data.size, data.size, data.channels), EPOCH * data.batch
        names = [str(k) for k in range(classes or (2 if model.outputs == 1 else CLASSES))]
    else:
        source = open_split(data, 'train')
        shape = image_shape(source, data.resize, data.size, data.channels)
        count, names = len(source), list(source.class_names)
    preprocessing: dict[str, Any] = {'kind': 'caffe'}
    if model.name != 'vgg16' or model.weights == 'random':
        ones, channels = [1.0] * shape[-1], 3 if model.name == 'vgg16' else shape[-1]
        preprocessing = {'kind': 'standardize', 'mean': ones, 'std': ones, 'channels': channels}
    return {
        'train': {'count': count},
        'class_names': names,
        'image_shape': list(shape),
        'preprocessing': preprocessing,
    }


def compile_steps(
    config: cfg.Config,
    components: Components,
    description: dict[str, Any],
    target: Target,
    **layout_options: Any,
) -> Iterator[dict[str, Any]]:
    """Compile the training step of each phase and yield its cost, as JSON.

    Args:
        config: A validated config; its batch is that of all chips together.
        components: Own parts of the run.
        description: As `describe_data` returns it.
        target: The slice.
        layout_options: `model` and `fsdp` of `mesh.make_mesh`.

    Errors:
        UserError: The batch or the layout does not fit the slice.
        RunFailed: The step does not fit into a chip's memory.
    """
    data, chips = config.data, devices(target)
    sizes = data.batch // config.optimizer.accumulate, data.eval_batch or data.batch
    layout = make_mesh(chips, sizes, **layout_options)
    spec = setup.make_spec(config, description, components=components)
    with compiling_for('tpu'):
        programs = setup.make_programs(config, spec)
        with jax.disable_jit():  # init has compiler options, which inner functions may not have
            state = jax.eval_shape(lambda: state_maker(programs[0])(config.seed))
        for number, program in enumerate(programs, start=1):
            if program.phase:
                state = jax.eval_shape(functools.partial(begin_phase, program), state)
            phase = compile_phase(program, spec.phase_ends[program.phase], state, layout)
            batch = _batch(program, layout)
            shapes = _with_sharding(state, layout.state_sharding(state))
            compiled = _compile(phase.train_step.lower(shapes, batch, traced_values(config)))
            yield {
                'topology': target.name,
                'phase': number,
                'layout': str(layout),
                'hosts': len({device.process_index for device in chips}),
                'dtype': config.model.dtype,
                'batch': data.batch,
                'batch_per_chip': data.batch // layout.mesh.shape['data'],
                **cost(compiled, target),
            }


def cost(compiled: Any, target: Target) -> dict[str, Any]:
    """Return the cost of a compiled step on one chip, as JSON; times are estimates in seconds."""
    memory, counts = compiled.memory_analysis(), compiled.cost_analysis()
    text, chip = compiled.as_text(), target.chip
    sizes = {
        'arguments': memory.argument_size_in_bytes,
        'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'code': memory.generated_code_size_in_bytes,
    }
    total = sum(sizes.values())
    found = collectives(text, math.prod(target.sides))
    compute, hbm = counts['flops'] / chip.peak, counts['bytes accessed'] / chip.bandwidth
    links = sum(seconds_on_links(each, target) for each in found)
    times = {'compute': compute, 'memory': hbm, 'links': links}
    return {
        'memory': sizes | {'total': total, 'chip': chip.memory},
        'fits': total <= chip.memory,
        'flops': counts['flops'],
        'bytes_accessed': counts['bytes accessed'],
        'collectives': [each._asdict() for each in found],
        'host_transfers': host_transfers(text),
        'estimate': times
        | {
            'overlapped': max(times.values()),
            'serial': max(compute, hbm) + links,
            'bound': max(times, key=lambda name: times[name]),
        },
    }


class Collective(NamedTuple):
    """Communication between chips."""

    kind: str
    nbytes: int  # of the whole array: as gathered, or before it is scattered
    group: int  # chips that take part


def collectives(hlo: str, chips: int) -> list[Collective]:
    """Find the communication in a program's HLO text; asynchronous pairs and loops count once.

    Args:
        hlo: The text.
        chips: Number of all chips; a communication that names no group is among all.
    """
    found, computation = [], ''
    for line in hlo.splitlines():
        if line.endswith('{') and not line.startswith(' '):
            computation = line.removeprefix('%')
        if not (match := INSTRUCTION.match(line)):
            continue
        result, opcode, rest = match.groups()
        kind, sizes = opcode.removesuffix('-start'), list(map(_nbytes, ARRAY.findall(result)))
        if kind not in KINDS:
            continue
        if opcode == 'collective-permute-start':  # operand, result, two contexts
            sizes = sizes[1:2]
        elif opcode == 'all-gather-start':  # operands, results
            sizes = sizes[len(sizes) // 2 :]
        group = _group_size(rest, chips)
        nbytes = sum(sizes) * (group if kind == 'reduce-scatter' else 1)
        if computation.startswith('all-reduce-scatter'):  # libtpu's fused form
            kind = 'reduce-scatter'
        if group > 1:
            found.append(Collective(kind, nbytes, group))
    return found


def _nbytes(array: tuple[str, str, str]) -> int:
    """The size of an array such as `f32[2,3]`, given as its dtype's letters, bits, and shape."""
    dtype, bits, shape = array
    size = 1 if dtype == 'pred' else int(bits or 0) / 8
    return math.ceil(size * math.prod(int(n) for n in shape.split(',') if n))


def _group_size(rest: str, chips: int) -> int:
    """The number of chips in a group, in any of XLA's three notations."""
    if not (match := GROUPS.search(rest)):
        return chips
    listed, iota, mesh, axes = match.groups()
    if listed:
        return listed.count(',') + 1
    if iota:
        return int(iota)
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", axes))


def host_transfers(hlo: str) -> list[str]:
    """Find the operations of a step that move data between chip and host, or call the host."""
    lines = filter(None, map(INSTRUCTION.match, hlo.splitlines()))
    transfers = [line[2] for line in lines if line[2] in ('infeed', 'outfeed', 'send', 'recv')]
    return transfers + CALLBACK.findall(hlo)


def seconds_on_links(collective: Collective, target: Target) -> float:
    """Estimate one communication, alone on the links; a part of the slice counts as a line."""
    chip, nbytes, seconds = target.chip, float(collective.nbytes), 0.0
    if collective.kind == 'collective-permute':
        return nbytes / chip.link + HOP
    whole = collective.group == math.prod(target.sides)
    for side in target.sides if whole else (collective.group,):
        width = 2 * chip.link if whole and side % chip.cube == 0 else chip.link
        seconds += nbytes * (side - 1) / side / width + (side - 1) * HOP
        nbytes /= side
    return seconds * KINDS[collective.kind]


def table(costs: list[dict[str, Any]]) -> str:
    """Set out the costs of compiled steps side by side, a column each."""
    columns = [_column(each) for each in costs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ('  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
    return '\n'.join(lines)


def _column(cost: dict[str, Any]) -> dict[str, str]:
    memory, time, moved = cost['memory'], cost['estimate'], cost['collectives']
    by_kind = Counter(each['kind'] for each in moved)
    total = sum(each['nbytes'] for each in moved)
    kinds = ', '.join(f'{count} {kind}' for kind, count in by_kind.items())
    verdict = 'fits' if cost['fits'] else 'DOES NOT FIT'
    bounds = time['overlapped'], time['serial']
    step = _span(*(f'{seconds * 1e3:.3g}' for seconds in bounds))
    rate = _span(*(f'{cost["batch_per_chip"] / seconds:,.0f}' for seconds in reversed(bounds)))
    return {
        'target': cost['topology'],
        'phase': str(cost['phase']),
        'layout': f'{cost["layout"]}; {cost["hosts"]} host{"" if cost["hosts"] == 1 else "s"}',
        'batch': f'{cost["batch"]:,}, {cost["batch_per_chip"]:,} per chip; {cost["dtype"]}',
        'memory': f'{_size(memory["total"])} of {_size(memory["chip"])}: {verdict}',
        **{
            f'  {name}': _size(memory[name])
            for name in ('arguments', 'results', 'temporaries', 'code')
        },
        'FLOPs': f'{cost["flops"] / 1e9:.4g} G',
        'bytes accessed': _size(cost['bytes_accessed']),
        'communication': f'{kinds}; {_size(total)}' if moved else 'none',
        'host transfers': ', '.join(cost['host_transfers']) or 'none',
        'estimated step': f'{step} ms',
        **{f'  {name}': f'{time[name] * 1e3:.3g} ms' for name in ('compute', 'memory', 'links')},
        '  bound by': time['bound'],
        'images/s per chip': rate,
    }


def _span(low: str, high: str) -> str:
    return low if low == high else f'{low} to {high}'


def _size(nbytes: float) -> str:
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if nbytes >= scale:
            return f'{nbytes / scale:.3g} {unit}'
    return f'{nbytes:.0f} B'


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        lines = (line.strip() for line in str(error).splitlines())
        used = next((line for line in lines if line.startswith('Used')), 'XLA ran out of memory')
        raise RunFailed(
            f"the step does not fit into a chip's memory: {used} Lower --batch_per_chip, or "
            'divide the state with --fsdp or --model_parallel'
        ) from error


def _with_sharding(shapes: Any, shardings: Any) -> Any:
    def one(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)


def _batch(program: Program, layout: Layout) -> Any:
    """The shapes of a batch; of features where the phase trains on them."""
    config, spec = program.config, program.spec
    size = config.data.batch
    image = jax.ShapeDtypeStruct((size, *spec.image_shape), jnp.uint8)
    if program.cached:
        net = spec.network(config)

        def features(parameters, images) -> Any:
            x = spec.prepare(images)
            return net.apply({'params': parameters}, x, train=False, method='features')

        made = jax.eval_shape(features, program.shapes, image)
        image = jax.ShapeDtypeStruct(made.shape, config.features.dtype)
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    mask = jax.ShapeDtypeStruct((size,), jnp.bool_)
    batch = {'image': image, 'label': numbers, 'index': numbers, 'mask': mask}
    return _with_sharding(batch, dict.fromkeys(batch, layout.batch))
