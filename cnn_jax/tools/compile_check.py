"""The cost of a training step on a chip that is not here: compiled for it, never run.

The compilers for TPUs (libtpu) and NVIDIA GPUs (JAX's CUDA plugin) need no chip to compile for one.
Memory is what they say; kernels, bytes and communication are counted in the program that they
make, FLOPs in the one that they are given. Times follow from data sheets by the roofline

T = max(t_chip, t_links, n·2 µs) … t_chip + t_links + n·4 µs,  t_chip = max(FLOPs/peak, bytes/speed)

(all at the same time … one after the other; Williams et al. 2009) for n kernels, which a GPU must
launch. S bytes take S / link between chips, twice that to be added up.

Sources: Google Cloud, "TPU v5e", "TPU v6e", "TPU v5p"; NVIDIA's data sheets of L4, A100 SXM 80GB,
H100 SXM and H200 SXM (without sparsity), and XLA's descriptions of these cards.
"""

import functools
import importlib
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
from cnn_jax import runtime
from cnn_jax.backbones import BACKBONES
from cnn_jax.components import Components
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.mesh import make_mesh
from cnn_jax.nn.cpu import compiling_for
from cnn_jax.train import setup
from cnn_jax.train.loop import compile_phase
from cnn_jax.train.program import Program, begin_phase, state_maker, traced_values
from cnn_jax.train.step import train_step

# libtpu is to ask no metadata server, which Google's machines alone have, is not to miss the
# answer, and may be loaded by several processes; the plugin is not to miss CUDA's libraries.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1',
}


# The module of each compiler, and what installs it.
COMPILERS = {
    'tpu': ('libtpu', 'requirements-tpu.txt'),
    'gpu': ('jax_cuda12_plugin', 'requirements-gpu-compile.txt'),
}
LAUNCH = {'tpu': (0.0, 0.0), 'gpu': (2e-6, 4e-6)}  # seconds to start a kernel, at least and at most
SHARE = {'tpu': 1.0, 'gpu': 0.75}  # of a chip's memory that JAX takes by default
FLOAT32 = {'tpu': 1.0, 'gpu': 0.5}  # of the peak: JAX takes bfloat16, on a GPU TF32, by default


class Chip(NamedTuple):
    """One kind of chip."""

    family: str  # tpu or gpu
    peak: float  # FLOP/s in bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes/s of memory
    link: float  # bytes/s to another chip, one way
    sides: str  # a pattern of the numbers of chips
    card: tuple = ()  # what XLA must know of a GPU


# What XLA describes a GPU by: compute capability, multiprocessors, and of each its float32 units,
# clock in GHz, threads and bytes of shared memory; then the bytes of second-level cache.
AMPERE = 'major: 8', 108, 64, 1.41, 2048, 167936, 41943040
ADA = 'major: 8 minor: 9', 58, 128, 2.04, 1536, 102400, 50331648
HOPPER = 'major: 9', 132, 128, 1.98, 2048, 233472, 52428800
CARD = """gpu_device_info {{ cuda_compute_capability {{ {0} }} core_count: {1} fpus_per_core: {2}
 clock_rate_ghz: {3} threads_per_core_limit: {4} shared_memory_per_core: {5} l2_cache_size: {6}
 device_memory_size: {7:.0f} memory_bandwidth: {8:.0f} shared_memory_per_block_optin: {9}
 shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
 threads_per_warp: 32 threads_per_block_limit: 1024
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 }}
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
platform_name: "CUDA" device_description_str: "{10}" """

ONE, FLAT, CUBE = '[1-8]', r'[1-9]\d*x[1-9]\d*', r'[1-9]\d*x[1-9]\d*(x[1-9]\d*)?'
CHIPS = {
    'v5e': Chip('tpu', 197e12, 16e9, 819e9, 45e9, FLAT),
    'v5p': Chip('tpu', 459e12, 95e9, 2.765e12, 90e9, CUBE),
    'v6e': Chip('tpu', 918e12, 32e9, 1.638e12, 90e9, FLAT),
    'l4': Chip('gpu', 121e12, 24e9, 300e9, 32e9, ONE, ADA),
    'a100': Chip('gpu', 312e12, 80e9, 2.039e12, 300e9, ONE, AMPERE),
    'h100': Chip('gpu', 989e12, 80e9, 3.352e12, 450e9, ONE, HOPPER),
    'h200': Chip('gpu', 989e12, 141e9, 4.8e12, 450e9, ONE, HOPPER),
}


class Target(NamedTuple):
    """Chips to compile for, `v5e:2x4` or `h100:8`: their name, kind, and number on each side."""

    name: str
    chip: Chip
    sides: list[int]

    @property
    def count(self) -> int:
        return math.prod(self.sides)


def parse_target(name: str) -> Target:
    """Parse a name such as `v5e:2x4` or `h100:8`; UserError if it is none."""
    kind, _, sides = name.strip().partition(':')
    if kind not in CHIPS or not re.fullmatch(CHIPS[kind].sides, sides, re.ASCII):
        raise UserError(
            f'--topology={name}: give a chip, {", ".join(CHIPS)}, and after a colon the number of '
            "GPUs, up to 8, or of TPUs along a slice's sides, e.g. h100:8 or v5e:2x4"
        )
    return Target(name.strip(), CHIPS[kind], [int(side) for side in sides.split('x')])


def prepare(targets: list[Target]) -> None:
    """Set up this process to compile for chips and run on its CPU; call it before JAX starts."""
    families = {target.chip.family for target in targets}
    for family in families:
        module, requirements = COMPILERS[family]
        given = family == 'tpu' and os.environ.get('TPU_LIBRARY_PATH')
        if not given and not importlib.util.find_spec(module):
            raise UserError(
                f'{sys.executable} has no {module}, which compiles for these chips; make an '
                f'environment for it, python -m venv .{family}, run .{family}/bin/pip install '
                f'-r {requirements} -c requirements-lock.txt, and use .{family}/bin/python'
            )
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')  # JAX has read the environment
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if 'gpu' in families:  # as runs are compiled, but for choices that XLA makes by measuring
        (nvcc,) = importlib.import_module('nvidia.cuda_nvcc').__path__
        wanted = {'xla_gpu_autotune_level': 0, 'xla_gpu_cuda_data_dir': nvcc}
        flags = {name: f'--{name}={value}' for name, value in wanted.items()}
        runtime.add_xla_flags(runtime.GPU_FLAGS | flags)


def devices(target: Target) -> list[Any]:
    """Return the devices of a target; UserError if its compiler does not know it."""
    from jax.experimental import topologies

    chip = target.chip
    if chip.family == 'gpu':
        shared = chip.card[5] - 1024  # bytes that one block may have
        card = CARD.format(*chip.card, chip.memory, chip.bandwidth, shared, target.name)
        options = {'platform': 'cuda', 'topology': f'1x1x{target.count}', 'target_config': card}
    else:
        host = [*(min(2, side) for side in target.sides[:2]), 1]  # four chips, if there are as many
        options = {'platform': 'tpu', 'topology_name': target.name, 'chips_per_host_bounds': host}
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')
        raise UserError(
            f'--topology={target.name}: the compiler knows no such chips ({reason}); use sides '
            'that are powers of two, e.g. v5e:2x4'
        ) from error


def describe_data(config: cfg.Config, components: Components, classes: int = 0) -> dict[str, Any]:
    """Describe data like `setup.describe`; if their shape is given, they need not exist."""
    data, model = config.data, config.model
    if data.resize == 'none' or not (data.size and data.channels):
        if classes:
            raise UserError(
                '--classes is for data that are not opened, and those of this config are: it has '
                'not all of config.data.resize, size and channels; leave it out'
            )
        return setup.open_data(config, components=components).description
    preprocessing: dict[str, Any] = {'kind': 'caffe'}
    backbone = model.name in BACKBONES
    if not backbone or model.weights == 'random':
        ones, channels = [1.0] * data.channels, 3 if backbone else data.channels
        preprocessing = {'kind': 'standardize', 'mean': ones, 'std': ones, 'channels': channels}
    return {
        'train': {'count': 1000 * data.batch},  # the number of steps shapes nothing either
        'class_names': list(range(classes or (2 if model.outputs == 1 else 10))),
        'image_shape': [data.size, data.size, data.channels],
        'preprocessing': preprocessing,
    }


def compile_steps(
    config: cfg.Config,
    components: Components,
    description: dict[str, Any],
    target: Target,
    together: int = 1,
    **layout_options: Any,
) -> Iterator[dict[str, Any]]:
    """Compile the training step of each phase and yield its cost, as JSON.

    The config's batch is that of all chips together; `layout_options` are `model` and `fsdp` of
    `mesh.make_mesh`. A chip takes the step of `together` runs at once, as an ablation's do.

    Errors:
        UserError: The batch or the layout does not fit the chips.
        RunFailed: The step does not fit into a chip's memory.
    """
    data = config.data
    sizes = data.batch // config.optimizer.accumulate, data.eval_batch or data.batch
    layout = make_mesh(devices(target), sizes, **layout_options)
    if layout.mesh.size != target.count:
        raise UserError(
            f'batches of {sizes[0]} and {sizes[1]} keep {layout.mesh.size} of the {target.count} '
            f'chips of {target.name} busy; give --batch_per_chip, or sizes that all divide'
        )
    spec = setup.make_spec(config, description, components=components)
    with compiling_for(target.chip.family):
        programs = setup.make_programs(config, spec)
        with jax.disable_jit():  # init has compiler options, which inner functions may not have
            state = jax.eval_shape(lambda: state_maker(programs[0])(config.seed))
        for number, program in enumerate(programs, start=1):
            if program.phase:
                state = jax.eval_shape(functools.partial(begin_phase, program), state)
            batch, values = _batch(program), traced_values(config)
            here, there = (compile_phase(program, 1, state, where) for where in (None, layout))
            step: Any = there.train_step
            flops = here.train_step.lower(state, batch, values).cost_analysis()['flops']
            place = _with_sharding(state, layout.state_sharding(state))
            batch = _with_sharding(batch, dict.fromkeys(batch, layout.batch))
            arguments = place, batch, values
            if together > 1:
                step = jax.jit(jax.vmap(functools.partial(train_step, program)), donate_argnums=0)
                arguments = jax.tree.map(functools.partial(_stacked, together), arguments)
            compiled = _compile(step.lower(*arguments))
            yield {
                'topology': target.name,
                'phase': number,
                'layout': str(layout),
                'dtype': config.model.dtype,
                'batch': data.batch,
                'batch_per_chip': data.batch // layout.mesh.shape['data'],
                'together': together,
                **cost(
                    compiled, flops * together / layout.mesh.size, target.chip, config.model.dtype
                ),
            }


def cost(compiled: Any, flops: float, chip: Chip, dtype: str) -> dict[str, Any]:
    """The cost of a program with so many FLOPs on one chip, as JSON; seconds are estimates."""
    memory, found = compiled.memory_analysis(), kernels(compiled.as_text())
    there = chip.memory * SHARE[chip.family]
    held = {
        'arguments': memory.argument_size_in_bytes,
        'results': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'code': memory.generated_code_size_in_bytes,
    }
    total, nbytes = sum(held.values()), sum(each.nbytes for each in found)
    moved = [each for each in found if each.kind == 'collectives']
    times = {
        'compute': flops / chip.peak / (FLOAT32[chip.family] if dtype == 'float32' else 1),
        'memory': nbytes / chip.bandwidth,
        'links': sum(k.nbytes * (2 if k.name == 'all-reduce' else 1) for k in moved) / chip.link,
        'launches': len(found) * LAUNCH[chip.family][0],
    }
    serial = max(times['compute'], times['memory']) + times['links']
    return {
        'memory': held | {'total': total, 'chip': there},
        'fits': total <= there,
        'flops': flops,
        'bytes_accessed': nbytes,
        'kernels': Counter(each.kind for each in found),
        'calls': Counter(each.name for each in found if '$' in each.name),
        'collectives': [each._asdict() for each in moved],
        'host_transfers': [each.name for each in found if each.kind == 'host transfers'],
        'estimate': times,
        'bound': max(times, key=lambda name: times[name]),
        'seconds': [max(times.values()), serial + len(found) * LAUNCH[chip.family][1]],
    }


# What a kernel is called, by the operations in it: the first line that fits one of them.
KINDS = {
    'host transfers': r'infeed|outfeed|send|recv|\w*callback\w*|MoveTo\w*',
    'collectives': '(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?',
    'convolutions': r'convolution|__cudnn\$conv.*',
    'matrix products': r'dot|__cublas.*',
    'reductions': 'reduce|reduce-window|scatter|sort',
    'transposes': 'transpose',
    'copies': 'copy|(copy|slice)-start',
    'branches': 'conditional|while',
    'elementwise': 'fusion|custom-call',  # what is left is single numbers
}
INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)')
ARRAY = re.compile(r'\b([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?')
CALLED = re.compile(r'(?:calls|body|condition|\w+_computations?|to_apply)=(%[\w.-]+|\{[^}]*\})')


class Kernel(NamedTuple):
    """Something that a chip is given to do."""

    kind: str  # in KINDS
    name: str  # of the operation or the library's function
    nbytes: int  # read and written in memory; of a collective, the whole arrays'


def kernels(hlo: str) -> list[Kernel]:
    """Find what a compiled program's text gives a chip to do, in order; loops, branches count once.

    Bytes are those of operands and results, but for the memory that is on the chip. What a kernel
    reads a part of counts whole.
    """
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    lines: list = []
    for line in hlo.splitlines():
        if line.endswith('{') and not line.startswith(' '):
            lines = computations[line.split()[0].removeprefix('%')] = []
        elif match := INSTRUCTION.match(line):
            name, result, operation, rest = match.groups()
            if operation == 'convolution' and re.search('dim_labels=[a-z]+_', rest):
                operation = 'dot'  # as libtpu writes it: there are no pixels
            lines.append((name, result, operation, rest))

    def visit(computation: str) -> Iterator[Kernel]:
        types: dict[str, str] = {}
        for name, result, operation, rest in computations[computation]:
            types[name] = result
            called = re.findall(r'%([\w.-]+)', ' '.join(CALLED.findall(rest)))
            if operation in ('call', 'conditional', 'while', 'async-start'):
                for each in called:
                    yield from visit(each)
            library = re.search(r'custom_call_target="([^"]+)"', rest)
            names = [library[1] if library else '', operation]
            if operation == 'fusion':
                names += [each[2] for each in computations[called[0]]]
                if called[0].startswith('all-reduce-scatter'):  # libtpu's form of it
                    names = ['reduce-scatter']
            operands = [types[each] for each in re.findall(r'%([\w.-]+)', rest.split(')')[0])]
            kinds = ((k, n) for k, fits in KINDS.items() for n in names if re.fullmatch(fits, n))
            if found := next(kinds, None):
                kind, name = found[0], found[1].removesuffix('-start')
                yield Kernel(kind, name, _traffic(kind, operation, operands, result))

    return list(visit('ENTRY'))


def _traffic(kind: str, operation: str, operands: list[str], result: str) -> int:
    moves, starts = kind == 'collectives', operation.endswith('-start')
    read, written = (
        sum(_nbytes(t, moves or starts) for t in each) for each in (operands, [result])
    )
    if starts:  # the result names the operands, too
        written = max(0, written - read)
        read = read if moves else 0
    return max(read, written) if moves else read + written


def _nbytes(type_: str, whole: bool) -> int:
    """The size of the arrays in `(f32[2,3]{1,0}, u8[9]{0:S(1)})`; S(…) is on the chip."""
    total = 0
    for letters, bits, shape, layout in ARRAY.findall(type_):
        size = 1 if letters == 'pred' else int(bits or 0) / 8
        if whole or 'S(' not in layout:
            total += math.ceil(size * math.prod(int(n) for n in shape.split(',') if n))
    return total


def table(costs: list[dict[str, Any]]) -> str:
    """Set out the costs of compiled steps side by side, a column each."""
    columns = [_column(each) for each in costs]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    lines = ('  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
    return '\n'.join(lines)


def _column(cost: dict[str, Any]) -> dict[str, str]:
    memory, kernels, seconds = cost['memory'], cost['kernels'], cost['seconds']
    moved = Counter(each['name'] for each in cost['collectives'])
    names = ''.join(f'{count} {name}, ' for name, count in moved.items())
    nbytes = sum(each['nbytes'] for each in cost['collectives'])
    verdict = 'fits' if cost['fits'] else 'DOES NOT FIT'
    images = cost['batch_per_chip'] * cost['together']
    rates = [f'{images / each:,.0f}' for each in reversed(seconds)]
    runs = f' of each of {cost["together"]} runs' if cost['together'] > 1 else ''
    return {
        'target': cost['topology'],
        'phase': str(cost['phase']),
        'layout': cost['layout'],
        'batch': f'{cost["batch"]:,}, {cost["batch_per_chip"]:,} per chip{runs}; {cost["dtype"]}',
        'memory': f'{memory["total"] / 1e6:,.1f} MB of {memory["chip"] / 1e9:.0f} GB: {verdict}',
        'FLOPs': f'{cost["flops"] / 1e9:.4g} G',
        'bytes accessed': f'{cost["bytes_accessed"] / 1e6:,.1f} MB',
        'communication': f'{names}{nbytes / 1e6:,.1f} MB',
        'kernels': str(sum(kernels.values())),
        **{f'  {kind}': str(kernels.get(kind, 0)) for kind in KINDS},
        'estimated step': ' to '.join(f'{each * 1e3:.3g}' for each in seconds) + ' ms',
        **{f'  {name}': f'{time * 1e3:.3g} ms' for name, time in cost['estimate'].items()},
        '  bound by': cost['bound'],
        'images/s per chip': ' to '.join(rates),
    }


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        used = re.search(r'Used .*', str(error)) or ['XLA ran out of memory.']
        raise RunFailed(
            f"the step does not fit into a chip's memory: {used[0]} Lower --batch_per_chip, or "
            'divide the state with --fsdp or --model_parallel'
        ) from error


def _with_sharding(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, shardings)


def _stacked(together: int, leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of a leaf of so many runs, where it lies."""
    shape, dtype = (together, *jnp.shape(leaf)), jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(leaf, 'sharding', None))


def _batch(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch; of features where the phase trains on them."""
    config, spec, size = program.config, program.spec, program.config.data.batch
    image = jax.ShapeDtypeStruct((size, *spec.image_shape), jnp.uint8)
    if program.cached:
        network = spec.network(cfg.replace(config, {'model.cut': program.cached}))
        features = functools.partial(network.apply, train=False, method='features')
        prepared = jax.eval_shape(spec.prepare, image)
        variables = {'params': program.shapes, 'batch_stats': program.statistics}
        made: Any = jax.eval_shape(features, variables, prepared)
        image = jax.ShapeDtypeStruct(made.shape, config.features.dtype)
    numbers = jax.ShapeDtypeStruct((size,), jnp.int32)
    mask = jax.ShapeDtypeStruct((size,), jnp.bool_)
    return {'image': image, 'label': numbers, 'index': numbers, 'mask': mask}
