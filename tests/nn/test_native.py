"""The native library against NumPy in float64, as a citizen of JAX, and where it cannot be had."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from cnn_jax.errors import UserError
from cnn_jax.nn import conv2d
from cnn_jax.nn.native import build, check, library
from tests.environments import on_devices

THREADS = 1, 2, 3, 4


@functools.cache
def loaded():
    found = library()
    assert found.path, found
    return ctypes.CDLL(str(found.path))


def draw_case(data, winograd):
    """A geometry; with groups, also of depthwise layers."""
    pairs = functools.partial(st.tuples, *2 * [st.integers(1, 3)])
    pads = st.tuples(*4 * [st.integers(0, 2) if winograd else st.integers(-1, 3)])
    size = st.tuples(*2 * [st.integers(4 if winograd else 1, 21)])
    if winograd:
        taps, stride, dilation, groups = (3, 3), (1, 1), (1, 1), 1
        c, f = (data.draw(st.sampled_from(n)) for n in ([16, 48, 64], [16, 32, 80, 256]))
    else:
        taps = data.draw(st.tuples(*2 * [st.integers(1, 5)]))
        stride, dilation = data.draw(pairs()), data.draw(pairs())
        groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
        c = groups * data.draw(st.sampled_from([1, 3, 5, 16, 24, 32, 64]))
        f = groups * data.draw(st.sampled_from([1, 3, 8, 16, 32, 33, 48, 128]))
        if data.draw(st.sampled_from([False, False, False, True])):
            groups = f = c
    shape = data.draw(st.integers(1, 4)), *data.draw(size), c, *taps, f
    case = *shape, stride, data.draw(pads), dilation, groups
    g = check.geometry(case)
    assume(min(g) > -2 and g[7] > 0 and g[8] > 0)
    return g


def compare(g, winograd, error, bound):
    """The three products are near those of float64, and have the same bits on 1 to 4 threads."""
    arrays = check.draw(g)
    exact = check.exact(g, *arrays)
    one, *others = (check.products(loaded(), g, *arrays, winograd, n) for n in THREADS)
    for other in others:
        for a, b in zip(one, other):
            np.testing.assert_array_equal(a, b)
    for found, right in zip(one, exact):
        assert error(found - right) <= bound * error(right)


@settings(max_examples=50)
@given(st.data())
def test_the_three_products_are_those_of_float64_whatever_the_window(data):
    compare(draw_case(data, False), False, lambda a: np.max(abs(a)), 4e-6)


@settings(max_examples=15)
@given(st.data())
def test_the_error_of_winograds_form_is_below_1e_5_of_the_norm(data):
    compare(draw_case(data, True), True, np.linalg.norm, 1e-5)


def draw(*shapes):
    generator = np.random.default_rng(0)
    return [jnp.array(generator.standard_normal(shape, np.float32)) for shape in shapes]


WINDOWS = (
    {'stride': 2},
    {'winograd': True},
    {'groups': 2, 'padding': 'VALID', 'dilation': 2},
    {'groups': 32, 'stride': (1, 2)},
)


def window_of(options):
    x, kernel = draw((2, 7, 8, 32), (3, 3, 32 // options.get('groups', 1), 32))
    return functools.partial(conv2d, **options), x, kernel


@pytest.mark.parametrize('options', WINDOWS, ids=str)
def test_derivatives_of_both_modes_and_orders(options):
    convolve, x, kernel = window_of(options)
    f = jax.jit(lambda x, k: convolve(x, k) * 1e-2)
    assert 'cnn_jax_conv' in f.lower(x, kernel).as_text()
    check_grads(f, (x, kernel), order=2, modes=['fwd', 'rev'], rtol=2e-2, atol=2e-2, eps=1e-1)


@pytest.mark.parametrize('options', WINDOWS, ids=str)
@pytest.mark.parametrize('axes', [(0, 0), (None, 0), (0, None)], ids=str)
def test_runs_trained_together_have_the_bits_of_each_alone(options, axes):
    convolve, x, kernel = window_of(options)
    args = [
        a if axis is None else jnp.stack([a, a + 1, a * 2]) for a, axis in zip((x, kernel), axes)
    ]
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), (0, 1))
    together = jax.jit(jax.vmap(gradient, axes))
    # One call for all of them.
    assert together.lower(*args).as_text().count('@cnn_jax_conv_input_gradient') == 1
    found, alone = together(*args), jax.jit(gradient)
    for i in range(3):
        one = alone(*(a if axis is None else a[i] for a, axis in zip(args, axes)))
        for a, b in zip(found, one):
            np.testing.assert_array_equal(a[i], b)


def test_operands_mapped_by_turns():
    x, kernel = draw((3, 2, 6, 6, 4), (2, 3, 3, 4, 5))
    inner = jax.vmap(conv2d, (None, 0))
    found = jax.jit(jax.vmap(inner, (0, None)))(x, kernel)
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(found[i, j], conv2d(x[i], kernel[j]))


def test_a_loop_and_donated_memory_change_nothing():
    x, kernel = draw((2, 8, 8, 16), (3, 3, 16, 16))

    def step(x, _):
        return conv2d(x, kernel) * 0.1, None

    expected = x
    for _ in range(3):
        expected = step(expected, None)[0]
    many = jax.jit(lambda x: jax.lax.scan(step, x, length=3)[0], donate_argnums=0)
    np.testing.assert_allclose(many(x + 0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float64])
def test_other_types_are_xlas(dtype):
    with jax.enable_x64(True):
        x, kernel = (a.astype(dtype) for a in draw((1, 5, 5, 3), (3, 3, 3, 4)))
        lowered = jax.jit(conv2d).lower(x, kernel)
    assert 'cnn_jax_conv' not in lowered.as_text()


def test_empty_batches_are_xlas():
    assert conv2d(jnp.ones((0, 5, 5, 3)), jnp.ones((3, 3, 3, 4))).shape == (0, 5, 5, 4)


def test_an_export_holds_no_library():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw((1, 5, 5, 3), (3, 3, 3, 4))]
    for platforms in (['cpu'], ['cpu', 'cuda', 'tpu']):
        exported = jax.export.export(jax.jit(conv2d), platforms=platforms)(*shapes)
        assert 'cnn_jax_conv' not in exported.mlir_module()


DIVIDED = """
import numpy as np, jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cnn_jax.nn import conv2d
x, k = jnp.ones((4, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
divided = jax.device_put(x, NamedSharding(Mesh(jax.devices(), 'd'), P('d')))
y = jax.jit(conv2d)(divided, k)
assert len(y.sharding.device_set) == 2
assert 'cnn_jax_conv' not in jax.jit(conv2d).lower(divided, k).as_text()
assert 'cnn_jax_conv' in jax.jit(conv2d).lower(x, k).as_text()
np.testing.assert_array_equal(y, conv2d(x, k))
"""


def test_several_devices_divide_xlas_convolution():
    on_devices(2, DIVIDED)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A cache without a library, and sources that can be changed."""
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv(build.SWITCH, raising=False)
    sources = tmp_path / 'sources'
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, 'SOURCES', sources)
    return sources


STUB = (
    'extern "C" void convolve(int, const int*, int, int, const float*, const float*, float* y) {%s}'
)

FAULTS = {
    'wrong': ('y[0] = 0;', 'fails its check'),
    'hangs': ('for (volatile int i = 0;; i = i);', 'did not end'),
    'illegal instruction': ('__builtin_trap();', 'fails its check'),
    'segmentation fault': ('*(volatile int*)0 = 1;', 'fails its check'),
    'does not compile': ('this is no C++', 'does not compile'),
}


@pytest.mark.parametrize(('body', 'message'), FAULTS.values(), ids=FAULTS)
def test_a_library_that_fails_is_not_used_and_not_tried_again(
    empty, monkeypatch, capfd, body, message
):
    monkeypatch.setattr(build, 'check', functools.partial(build.check, seconds=5))
    (empty / 'ffi.cc').write_text(STUB % body)
    first = build.find()
    assert first.path is None
    assert message in first.reason
    assert 'building' in capfd.readouterr().err
    assert build.find() == first
    assert 'building' not in capfd.readouterr().err
    build.find(again=True)
    assert 'building' in capfd.readouterr().err


@pytest.mark.parametrize(
    ('variable', 'value', 'message'),
    [('CXX', 'no-such-compiler', 'compiler'), ('PATH', '', 'compiler'), (build.SWITCH, '0', '=0')],
)
def test_without_a_compiler_or_switched_off_there_is_a_reason(
    empty, monkeypatch, variable, value, message
):
    monkeypatch.setenv(variable, value)
    found = build.find()
    assert found.path is None
    assert message in str(found)


def test_the_folder_can_be_chosen(empty, tmp_path, monkeypatch):
    (empty / 'ffi.cc').write_text(STUB % '')
    monkeypatch.setenv(build.SWITCH, str(tmp_path / 'chosen'))
    monkeypatch.setattr(build, 'check', lambda path: '')
    assert build.find().path.parent == tmp_path / 'chosen'
    monkeypatch.setenv(build.SWITCH, 'off')
    with pytest.raises(UserError, match='path'):
        build.find()


def test_a_cache_that_cannot_be_written_is_a_reason(empty, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'file'))
    assert 'cannot be kept' in build.find().reason


def test_of_two_processes_one_builds(empty, tmp_path):
    """A compiler that leaves a line for each use, and takes its time."""
    log, compiler = tmp_path / 'log', tmp_path / 'compiler'
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho used >> {log}\nsleep 1\n'
        f'cp {library().path} "$(echo "$@" | sed "s/.* -o //")"\n'
    )
    compiler.chmod(0o755)
    command = [sys.executable, '-m', 'cnn_jax.nn.native']
    environment = os.environ | {'CXX': str(compiler)}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=300)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(printed) == 1
    assert log.read_text().split() == ['used']


# With sanitizers, and as a machine without AVX-512 runs it.
BUILDS = {
    'sanitizers': ['-O1', '-g', '-march=native', '-fsanitize=address,undefined'],
    'avx2': ['-O3', '-march=haswell'],
}

MANY = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
import check
library, generator = ctypes.CDLL(sys.argv[1]), np.random.default_rng(0)
cases = [(case, w) for case in check.CASES for w in (False, True)]
for _ in range(60):
    draws = [generator.integers(1, n, 2).tolist() for n in (15, 5, 4, 3)]
    size, taps, stride, dilation = map(tuple, draws)
    pads, groups = generator.integers(-1, 4, 4).tolist(), int(generator.choice([1, 1, 2]))
    c, f = (groups * int(generator.choice(n)) for n in ([1, 3, 16, 20, 48], [1, 8, 16, 33, 64]))
    cases.append(((2, *size, c, *taps, f, stride, pads, dilation, groups), False))
done = 0
for case, winograd in cases:
    g = check.geometry(case)
    if g[7] < 1 or g[8] < 1:
        continue
    arrays = check.draw(g)
    for found, right in zip(check.products(library, g, *arrays, winograd), check.exact(g, *arrays)):
        assert np.max(abs(found - right)) <= 1e-5 * np.max(abs(right), initial=1e-3), case
    done += 1
print(done, 'cases')
"""


@pytest.mark.slow
@pytest.mark.parametrize('flags', BUILDS.values(), ids=BUILDS)
def test_other_builds_compute_the_same(tmp_path, flags):
    path = tmp_path / 'library.so'
    source = ['-std=c++17', '-fPIC', '-shared', '-pthread', '-w', f'-I{build.include()}']
    subprocess.run(['g++', *flags, *source, build.SOURCES / 'ffi.cc', '-o', path], check=True)
    environment = dict(os.environ)
    if '-g' in flags:
        runtime = subprocess.run(
            ['g++', '-print-file-name=libasan.so'], capture_output=True, text=True, check=True
        )
        environment |= {'LD_PRELOAD': runtime.stdout.strip(), 'ASAN_OPTIONS': 'detect_leaks=0'}
        environment['UBSAN_OPTIONS'] = 'halt_on_error=1'
    done = subprocess.run(
        [sys.executable, '-c', MANY, path, build.SOURCES],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith('cases\n')
