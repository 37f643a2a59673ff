"""Training over several devices and processes is training on one, but for float32's rounding."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnn_jax import config as cfg
from experiments import finetune_digits, small
from tests.scale.compute import STEPS

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name('compute.py')
ROUNDING = 1e-5  # sums over a batch have another order on other layouts

# The strided net on 8×8 digits: neither split can be divided into whole batches.
STRIDED = cfg.replace(
    small.get_config(),
    {
        'model.widths': (8, 16),
        'model.hidden': (32,),
        'data.source': 'digits',
        'data.train': 'train[:443]',
        'data.batch': 40,
        'data.eval_batch': 48,
        'augment.crop': 1,
        'optimizer.name': 'sgd',
        'optimizer.learning_rate': 0.02,
    },
)
CONFIGS = {
    'strided': STRIDED,
    # Batch norm over groups of five, as many as a device of eight has: it amplifies rounding.
    'ghost': cfg.replace(STRIDED, {'model.norm': 'ghost', 'model.ghost_batch': 5}),
    'vgg16': cfg.replace(
        finetune_digits.get_config(),
        {
            'model.weights': 'imagenet',
            'model.hidden': (1024,),
            'data.size': 32,
            'data.train': 'train[:107]',
            'data.subset': 0,
            'data.validation': 0,
            'data.eval': 'test[:101]',
            'data.batch': 24,
            'data.eval_batch': 32,
            'optimizer.learning_rate': 1e-4,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes, CPU devices of each, options of `compute.py`, and the share of a large array."""

    processes: int
    devices: int
    options: tuple[str, ...] = ()
    share: float = 1.0


LAYOUTS = {
    'one': Layout(1, 1),
    'eight': Layout(1, 8),
    'divided': Layout(1, 8, ('--fsdp',), 1 / 8),
    'halved': Layout(1, 8, ('--model=2',), 1 / 2),
    'two_processes': Layout(2, 1),
    'four_processes': Layout(4, 2),
}


def train(name: str, folder: Path, layout: Layout, states: Path | None = None) -> Path:
    """Run `compute.py` on a layout, each step from the given states if there are; its file."""
    config, out = folder / f'{name}.json', folder / f'{name}.npz'
    config.write_text(cfg.to_json(CONFIGS[name]))
    options = [*layout.options, *([f'--states={states}'] if states else [])]
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    environment = os.environ | {
        'PYTHONPATH': str(SCRIPT.parents[2]),
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={layout.devices}',
        'CNN_JAX_NATIVE': '0',  # several devices have XLA's convolutions: compare like with like
    }
    if layout.processes > 1:
        environment['JAX_COORDINATOR_ADDRESS'] = address
        environment['JAX_NUM_PROCESSES'] = str(layout.processes)
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, config, out, *options],
            env=environment | {'JAX_PROCESS_ID': str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(layout.processes)
    ]
    errors = [process.communicate(timeout=500)[1] for process in running]
    assert not any(process.returncode for process in running), '\n'.join(errors)
    return out


@pytest.fixture(scope='module')
def on_one_device(tmp_path_factory):
    """The file that a config's run on one device wrote, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = train(name, tmp_path_factory.mktemp(name), LAYOUTS['one'])
        return made[name]

    return get


CASES = {
    'strided': ['eight', 'two_processes', 'four_processes'],
    'vgg16': ['eight', 'divided', 'halved', 'two_processes', 'four_processes'],
    'ghost': ['eight', 'two_processes'],
}


@pytest.mark.parametrize(
    ('name', 'layout'), [(name, layout) for name in CASES for layout in CASES[name]]
)
def test_fifty_steps_are_those_of_one_device(on_one_device, tmp_path, name, layout):
    one, options = on_one_device(name), LAYOUTS[layout]
    a, b = np.load(one), np.load(train(name, tmp_path, options, states=one))
    for key in a:
        if key.startswith(('order/', 'mask/')):
            np.testing.assert_array_equal(a[key], b[key])

    def state(run, name):
        """A state's numbers as one vector; its counts are not among them."""
        leaves = sum(key.startswith('state/0/') for key in a)
        arrays = [run[f'{name}/{leaf}'] for leaf in range(leaves)]
        floats = [x.ravel() for x in arrays if np.issubdtype(x.dtype, np.floating)]
        return np.concatenate(floats).astype(float)

    def assert_same_change(before, after, again):
        assert np.linalg.norm(again - after) < ROUNDING * np.linalg.norm(after - before)

    # Single steps from the same state, and 50 on their own.
    states = [state(a, f'state/{k}') for k in range(STEPS + 1)]
    for k in range(STEPS):
        np.testing.assert_allclose(
            b[f'forced objective/{k}'], a[f'free objective/{k}'], rtol=ROUNDING
        )
        assert_same_change(states[k], states[k + 1], state(b, f'after/{k}'))
        if name != 'ghost':
            np.testing.assert_allclose(
                b[f'free objective/{k}'], a[f'free objective/{k}'], rtol=ROUNDING
            )
    if name != 'ghost':
        assert_same_change(states[0], states[-1], state(b, f'state/{STEPS}'))
        np.testing.assert_allclose(b['evaluation loss'], a['evaluation loss'], rtol=ROUNDING)
        np.testing.assert_array_equal(b['confusion'], a['confusion'])
    if name == 'vgg16':
        assert b['share'] == options.share
