"""Whatever is changed in a work directory: it is found, or no answer depends on it."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.tools.verify import verify_run
from cnn_jax.train import manifest
from cnn_jax.train.checkpoint import digest
from cnn_jax.train.fit import fit
from cnn_jax.train.run import load_run
from experiments import small

CHANGES = {
    'data.source': 'digits',
    'data.train': 'train[:60]',
    'data.eval': 'test[:40]',
    'data.batch': 20,
    'model.widths': (4,),
    'model.hidden': (8,),
    'augment.crop': 0,
    'train.epochs': 4.0,
    'train.eval_every': 0.34,
    'train.patience': 1.0,
    'train.best': 'loss',
    'optimizer.learning_rate': 0.3,  # so that the best is not the last
}
# Written for people, or for what comes after; no program computes with them.
HARMLESS = {'lock', 'timing.jsonl', 'curves.png', 'speed.json', 'events'}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The work directory of a run whose best checkpoint is not its newest."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    run = fit(cfg.replace(small.get_config(), CHANGES), folder, say=lambda line: None)
    steps = sorted(int(place.name[5:]) for place in folder.glob('checkpoints/*'))
    assert run.step < steps[-1]
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'run')


def opened(folder, which):
    """All that an answer of an opened run depends on, but the program."""
    run = load_run(folder, which)
    image: Any = np.full((1, *run.spec.image_shape), 100, np.uint8)
    pixels = run.spec.prepare(image)
    curves = {split: {k: v.tolist() for k, v in c.items()} for split, c in run.curves.items()}
    told = run.class_names, run.metrics, curves, cfg.to_json(run.config), run.step
    return digest((run.variables, pixels)), json.dumps(told, sort_keys=True)


def verified(folder):
    same, changed = verify_run(str(folder), 0, lambda *_: None)
    if not same:
        raise UserError('it differs')
    return changed


READERS = {
    'latest': lambda folder: opened(folder, 'latest'),
    'best': lambda folder: opened(folder, 'best'),
    'verify': verified,
}


def flip(data):
    changed = bytearray(data or b'x')
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


DAMAGE = {
    'flip': flip,
    'cut': lambda data: data[:-2],  # the last byte of a text is a newline, which decides nothing
    'longer': lambda data: data + b'0',
    'gone': None,
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ('cut', 'longer', 'gone')]


@pytest.mark.parametrize('damage', ['flip', *SLOW])
def test_any_damage_to_any_file_is_found_or_decides_nothing(
    finished, copy, damage, record_property
):
    undisturbed = {name: read(copy) for name, read in READERS.items()}
    names = [path.relative_to(finished) for path in finished.rglob('*') if path.is_file()]
    silent = set()
    for name in names:
        path, found = copy / name, 0
        if damage == 'gone':
            path.unlink()
        else:
            path.write_bytes(DAMAGE[damage](path.read_bytes()))
        for reader, read in READERS.items():
            try:
                assert read(copy) == undisturbed[reader], name
            except UserError:
                found += 1
        if not found:
            silent.add('events' if 'tfevents' in name.name else str(name))
        shutil.copy(finished / name, path)
    # A record goes on after the checkpoint, but no number is taken from there.
    assert silent <= HARMLESS | ({'metrics.jsonl', 'steps.f32'} if damage == 'longer' else set())
    assert len(names) > 25
    record_property('tried', len(names))


def test_every_flipped_bit_of_the_manifest_is_found(copy, record_property):
    path, tried = copy / manifest.NAME, 0
    whole = path.read_bytes()
    facts = manifest.stored(copy)
    for position in range(len(whole) * 8):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert manifest.stored(copy) == facts  # 1e-05 and 1E-05 are one number
        except UserError:
            tried += 1
    assert tried > 0.999 * len(whole) * 8
    record_property('tried', len(whole) * 8)
