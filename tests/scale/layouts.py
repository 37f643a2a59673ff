"""The same training on one device and on several, and how far the results are apart."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from cnn_jax import config as cfg
from experiments import finetune_digits, small
from tests.scale.compute import STEPS

SCRIPT = Path(__file__).with_name('compute.py')
ROOT = SCRIPT.parents[2]


def strided() -> cfg.Config:
    """The strided net on 8×8 digits: neither split can be divided into whole batches."""
    config = small.get_config()
    config.model = dataclasses.replace(config.model, widths=(8, 16), hidden=(32,))
    config.data = dataclasses.replace(
        config.data, source='digits', train='train[:443]', batch=40, eval_batch=48
    )
    config.augment.crop = 1
    config.optimizer = dataclasses.replace(config.optimizer, name='sgd', learning_rate=0.02)
    return config


def ghost() -> cfg.Config:
    """With batch norm over groups of five examples, as many as a device of eight has."""
    config = strided()
    config.model = dataclasses.replace(config.model, norm='ghost', ghost_batch=5)
    return config


def vgg16() -> cfg.Config:
    """A head on frozen VGG16 with its ImageNet weights."""
    config = finetune_digits.get_config()
    config.model = dataclasses.replace(config.model, weights='imagenet', hidden=(1024,))
    config.data = dataclasses.replace(
        config.data, size=32, train='train[:107]', eval='test[:101]', batch=24, eval_batch=32
    )
    config.optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-4)
    return config


LAYOUTS = {
    '8 devices': {'devices': 8},
    '8 devices, parameters divided': {'devices': 8, 'fsdp': True},
    '8 devices, matrices halved': {'devices': 8, 'model': 2},
    '2 processes': {'processes': 2},
    '4 processes of 2 devices': {'processes': 4, 'devices': 2},
}
CONFIGS = {'strided': strided, 'ghost': ghost, 'vgg16': vgg16}


def train(
    name: str,
    folder: Path,
    processes: int = 1,
    devices: int = 1,
    states: Path | None = None,
    **layout: int | bool,
) -> Path:
    """Run `compute.py` in some processes; returns the file that it wrote.

    Args:
        name: Of the config.
        folder: Where files go.
        processes: How many.
        devices: CPU devices of each.
        states: What another call returned, whose states each step starts from.
        layout: `model` and `fsdp`.
    """
    config = folder / f'{name}.json'
    config.write_text(cfg.to_json(CONFIGS[name]()))
    options = [f'--states={states}'] if states else []
    options += [f'--{k}' if v is True else f'--{k}={v}' for k, v in layout.items()]
    out = folder / f'{name}-{processes}x{devices}{"".join(options[1:])}.npz'
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    environment = os.environ | {
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    if processes > 1:
        environment['JAX_COORDINATOR_ADDRESS'] = address
        environment['JAX_NUM_PROCESSES'] = str(processes)
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(config), str(out), *options],
            env=environment | {'JAX_PROCESS_ID': str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    errors = [process.communicate(timeout=500)[1] for process in running]
    assert not any(process.returncode for process in running), '\n'.join(errors)
    return out


def differences(one: Path, other: Path) -> dict[str, float]:
    """How far a run on several devices is from the one on one device whose states it was given.

    Returns:
        `order` and `mask`: numbers of examples and of elements that differ.
        `objective` and `update`: of single steps from the same state, relative, the largest of all
        steps; the latter is the change of parameters, batch statistics and moments, by its norm.
        `free objective`, `free state`: the same of 50 steps on their own. `evaluation loss`,
        `moved`: after these, of the evaluation split, the second the number of examples in another
        cell of the confusion matrix.
        `share`: of the largest trained array, what a device holds.
    """
    a, b = np.load(one), np.load(other)

    def unlike(kind):
        return sum(int((a[key] != b[key]).sum()) for key in a if key.startswith(f'{kind}/'))

    def objective(mine, other):
        pairs = [(a[f'{mine}/{k}'], b[f'{other}/{k}']) for k in range(STEPS)]
        return max(abs(float(y) / float(x) - 1) for x, y in pairs)

    leaves = sum(key.startswith('state/0/') for key in a)

    def vector(run, name):
        """A state's numbers; its counts are not among them."""
        arrays = [run[f'{name}/{leaf}'] for leaf in range(leaves)]
        floats = [x.ravel() for x in arrays if np.issubdtype(x.dtype, np.floating)]
        return np.concatenate(floats).astype(float)

    def relative(before, after, again):
        return float(np.linalg.norm(again - after) / np.linalg.norm(after - before))

    states = [vector(a, f'state/{k}') for k in range(STEPS + 1)]
    updates = [relative(states[k], states[k + 1], vector(b, f'after/{k}')) for k in range(STEPS)]
    return {
        'order': unlike('order'),
        'mask': unlike('mask'),
        'objective': objective('free objective', 'forced objective'),
        'update': max(updates),
        'free state': relative(states[0], states[-1], vector(b, f'state/{STEPS}')),
        'free objective': objective('free objective', 'free objective'),
        'evaluation loss': abs(float(b['evaluation loss']) / float(a['evaluation loss']) - 1),
        'moved': int(np.abs(a['confusion'] - b['confusion']).sum()) // 2,
        'share': float(b['share']),
    }
