"""Damaged checkpoints and records are found out, and the run ends as if nothing had happened."""

import shutil

import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.files import SEAL, Corrupt, read_sealed_folder, seal_folder
from cnn_jax.train.checkpoint import Checkpoints, digest
from cnn_jax.train.meter import Meter

SHORT = {'train__epochs': 1.0, 'train__eval_every': 0.5, 'train__checkpoint_every': 0.17}


class Killed(Exception):
    """Stands for a process that ends without a word."""


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The digest and the record of the run that nothing happens to, once it has been made."""
    return {}


@pytest.fixture
def stopped(small, fit_again, tmp_path, monkeypatch, whole):
    """A run killed after step 5 of 6, with checkpoints of steps 2 and 4 (or so); its config."""
    config, folder = small(**SHORT), tmp_path / 'stopped'
    if not whole:
        whole['state'] = digest(fit_again(config, tmp_path / 'whole').state)
        whole['record'] = (tmp_path / 'whole' / 'metrics.jsonl').read_bytes()
    add = Meter.add

    def add_then_die(self, number, sums):
        if number == 6:
            raise Killed
        add(self, number, sums)

    monkeypatch.setattr(Meter, 'add', add_then_die)
    with pytest.raises(Killed):
        fit_again(config, folder)
    monkeypatch.setattr(Meter, 'add', add)
    return config, folder


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(bytes(whole))


def files(place):
    return sorted(path for path in place.rglob('*') if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize('damage', [cut, flip, lambda path: path.unlink()])
def test_any_damaged_file_sends_the_run_back_to_the_checkpoint_before(
    stopped, fit_again, capsys, whole, damage
):
    config, folder = stopped
    newest, before = Checkpoints(folder / 'checkpoints', config).steps()
    place = folder / 'checkpoints' / f'step_{newest}'
    for path in files(place)[::3] if damage is flip else files(place)[::5]:
        kept = path.read_bytes()
        damage(path)
        with pytest.raises(Corrupt):
            read_sealed_folder(place)
        path.write_bytes(kept)
    damage(max(files(place), key=lambda path: path.stat().st_size))
    outcome = fit_again(config, folder)
    printed = capsys.readouterr().out
    assert f'the checkpoint of step {newest} cannot be used' in printed
    assert f'going on from the checkpoint of step {before}' in printed
    assert (folder / 'damaged' / f'step_{newest}').is_dir()
    assert digest(outcome.state) == whole['state']
    assert (folder / 'metrics.jsonl').read_bytes() == whole['record']


def empty(place):
    shutil.rmtree(place)
    place.mkdir()


def of_an_older_version(place):
    (place / SEAL).unlink()


def of_another_config(place):
    content = read_sealed_folder(place)
    seal_folder(place, content | {'config': '0' * 64})


@pytest.mark.parametrize('damage', [empty, of_an_older_version, of_another_config])
def test_a_checkpoint_that_is_not_this_runs_is_not_used(stopped, fit_again, capsys, whole, damage):
    config, folder = stopped
    newest, before = Checkpoints(folder / 'checkpoints', config).steps()
    damage(folder / 'checkpoints' / f'step_{newest}')
    outcome = fit_again(config, folder)
    assert f'going on from the checkpoint of step {before}' in capsys.readouterr().out
    assert digest(outcome.state) == whole['state']


def test_without_any_good_checkpoint_it_does_not_start_from_zero(stopped, fit_again):
    config, folder = stopped
    for place in (folder / 'checkpoints').glob('step_*'):
        cut(max(files(place), key=lambda path: path.stat().st_size))
    for _ in range(2):  # nothing was moved by the first attempt
        with pytest.raises(UserError, match=r'no checkpoint .* can be used \(step \d: .* damaged'):
            fit_again(config, folder)


def test_a_start_from_zero_is_said_when_every_checkpoint_is_gone(stopped, fit_again, capsys, whole):
    config, folder = stopped
    empty(folder / 'checkpoints')
    outcome = fit_again(config, folder)
    assert 'no checkpoint had been saved: starting again from step 0' in capsys.readouterr().out
    assert digest(outcome.state) == whole['state']


def test_a_record_that_was_altered_is_found_out(stopped, fit_again):
    config, folder = stopped
    record = folder / 'metrics.jsonl'
    altered = record.read_text().replace('"accuracy": 0.', '"accuracy": 1.')
    record.write_text(altered)
    with pytest.raises(UserError, match=r'metrics\.jsonl no longer holds what it held then'):
        fit_again(config, folder)
    assert record.read_text() == altered


def test_what_was_written_after_the_checkpoint_is_written_again_once(stopped, fit_again, whole):
    config, folder = stopped
    with (folder / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "split": "train", "lo')
    fit_again(config, folder)
    assert (folder / 'metrics.jsonl').read_bytes() == whole['record']


@pytest.mark.parametrize('damage', [cut, flip, lambda path: path.unlink()])
def test_a_damaged_older_checkpoint_does_not_stop_the_run(stopped, fit_again, whole, damage):
    config, folder = stopped
    oldest = (
        folder / 'checkpoints' / f'step_{Checkpoints(folder / "checkpoints", config).steps()[-1]}'
    )
    for path in files(oldest):
        damage(path)
    assert digest(fit_again(config, folder).state) == whole['state']


def test_steps_are_recorded_bit_for_bit(stopped, fit_again, tmp_path):
    config, folder = stopped
    fit_again(config, folder)
    fit_again(config, tmp_path / 'again')
    recorded = np.fromfile(folder / 'steps.f32', '<f4')
    assert recorded.shape == (12,)  # two numbers for each of six steps
    assert recorded.tobytes() == (tmp_path / 'again' / 'steps.f32').read_bytes()
