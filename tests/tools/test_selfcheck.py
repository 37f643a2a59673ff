"""The self-check: it passes here, and misses none of the errors it is there for."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from cnn_jax import runtime
from cnn_jax.errors import UserError
from cnn_jax.tools import selfcheck

FIX = 'set XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce,-individual_convolution'
GIVEN = selfcheck.inputs()
CORRECT = selfcheck.exact(GIVEN)


@pytest.fixture(scope='module')
def computed():
    return jax.device_get(jax.jit(selfcheck.compute)(GIVEN))


def test_this_machine_computes_correctly():
    selfcheck.self_check()


def test_float32_is_exact_but_for_some_roundings(computed):
    """So a tolerance is never what lets a check pass."""
    for name in CORRECT.keys() - selfcheck.TOLERANCES.keys():
        limit = 1e-6 * abs(CORRECT[name]).max()
        np.testing.assert_allclose(computed[name], CORRECT[name], rtol=0, atol=limit)


@pytest.mark.parametrize('fault', [lambda x: 1.01 * x, lambda x: x * np.nan], ids=['1%', 'nan'])
@pytest.mark.parametrize('name', CORRECT)
def test_a_wrong_result_is_named(computed, name, fault):
    with pytest.raises(UserError, match=re.escape(f'({name}: off by ')):
        selfcheck.compare(computed | {name: fault(np.asarray(computed[name], float))}, CORRECT)


@pytest.mark.parametrize(('primitive', 'name'), [('conv2d', 'convolution'), ('dropout', 'dropout')])
def test_a_primitive_that_is_wrong_by_1_percent_is_caught(monkeypatch, primitive, name):
    right = getattr(selfcheck, primitive)
    monkeypatch.setattr(selfcheck, primitive, lambda *args, **kw: 1.01 * right(*args, **kw))
    with pytest.raises(UserError, match=rf'\({name}: off by 1(\.\d)?%'):
        selfcheck.compare(jax.jit(lambda given: selfcheck.compute(given))(GIVEN), CORRECT)


def test_the_wrong_sums_of_jaxlib_0_10_are_caught_and_the_fix_is_named():
    """jax issue 39103, under XLA's own settings."""
    clean = {name: text for name, text in os.environ.items() if name != 'XLA_FLAGS'}
    code = 'from cnn_jax.tools.selfcheck import self_check; self_check()'
    done = subprocess.run([sys.executable, '-c', code], env=clean, capture_output=True, text=True)
    if runtime.jaxlib_version().startswith('0.10.'):
        assert re.search(r'\(sum of squares: off by \d\d% .*; ' + re.escape(FIX), done.stderr)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ('version', 'flags', 'remedy'),
    [
        ('0.10.2', '', FIX),
        ('0.10.2', FIX, 'use another jaxlib than 0.10.2 or other flags than XLA_FLAGS='),
        ('0.12.0', '', 'use another jaxlib than 0.12.0$'),
    ],
)
def test_the_fix_depends_on_version_and_flags(monkeypatch, version, flags, remedy):
    monkeypatch.setattr(runtime, 'jaxlib_version', lambda: version)
    monkeypatch.setenv('XLA_FLAGS', flags)
    with pytest.raises(UserError, match=remedy):
        selfcheck.compare({'x': np.zeros(1)}, {'x': np.ones(1)})
