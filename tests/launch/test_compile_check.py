"""Compiling for TPUs that are not here, with a libtpu of the suite's own."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cnn_jax.files import cache_folder
from cnn_jax.models import build
from cnn_jax.scaling import chips
from experiments.baseline import get_config

ROOT = Path(__file__).resolve().parents[2]
BASELINE = '--config=experiments/baseline.py'

# libtpu is published for these alone.
PUBLISHED = sys.platform == 'linux' and platform.machine() == 'x86_64'


@pytest.fixture(scope='session')
def tpu_python():
    """The interpreter of an environment with libtpu, made once and kept in the cache folder."""
    requirements = ROOT / 'requirements-tpu.txt', ROOT / 'requirements-lock.txt'
    folder = cache_folder() / f'tpu-{sys.version_info.major}.{sys.version_info.minor}'
    python = folder / 'bin' / 'python'
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [python, '-m', 'pip', 'install', '-q', '-r', requirements[0], '-c', requirements[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED, reason='libtpu is published for Linux on x86-64 alone')
def test_the_step_is_compiled_for_a_slice_of_eight_chips(tpu_python, tmp_path):
    out = tmp_path / 'found.json'
    command = [tpu_python, '-m', 'launch.compile_check', BASELINE, '--topology=v5e:2x4']
    command += ['--batch_per_chip=8', '--config.model.norm=batch', f'--json={out}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())
    assert (found['batch'], found['batch_per_chip'], found['layout']) == (64, 8, 'data 8')
    assert found['fits']
    assert found['memory']['total'] < chips.CHIPS['v5e'].memory / 100
    assert not found['host_transfers']
    assert not found['unwanted']
    # Statistics are added up where they are: nothing is gathered. What is added up is the gradient,
    # in float32, and little else.
    kinds = {kind: data['count'] for kind, data in found['collectives'].items()}
    assert kinds.pop('all-reduce')
    assert not any(kinds.values())
    net = build(dataclasses.replace(get_config().model, norm='batch'), 10)
    images = jnp.zeros((1, 28, 28, 1))
    parameters = jax.eval_shape(lambda: net.init(jax.random.key(0), images, train=False))['params']
    gradient = 4 * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert gradient <= found['collectives']['all-reduce']['bytes'] < 1.05 * gradient
    assert 'estimate' in done.stdout


@pytest.mark.parametrize(
    ('topology', 'told'), [('v5e:8', 'v5e:2x4'), ('h100:8', 'v5e, v5p, v6e'), ('', 'v5e:2x4')]
)
def test_a_topology_that_is_none_is_a_mistake(launch, topology, told):
    done = launch('compile_check', BASELINE, f'--topology={topology}', check=2)
    assert told in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.skipif('TPU_LIBRARY_PATH' in os.environ, reason='there is a libtpu')
def test_without_libtpu_one_is_told_how_to_get_it(launch):
    done = launch('compile_check', BASELINE, '--topology=v5e:2x4', check=2)
    assert 'requirements-tpu.txt' in done.stderr
