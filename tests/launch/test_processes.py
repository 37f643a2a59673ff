"""Runs of several real processes: one is killed, all are stopped, and they go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from tests.environments import ROOT

EPOCHS = ('--config.train.epochs=20', '--config.train.checkpoint_every=1')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def start(tiny):
    """Starts two processes, or as many, that train a tiny net in a folder."""

    def call(folder, *more, options=('--count=2',)):
        command = [sys.executable, '-m', 'launch.processes', *options, '--', 'launch.train']
        return subprocess.Popen(
            [*command, *tiny, *EPOCHS, f'--workdir={folder}', *more],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return call


@pytest.fixture(scope='module')
def undisturbed(start, tmp_path_factory):
    """The work directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    ended(start(folder), 0)
    return folder


def ended(group, code):
    """What a group printed, once it has ended as it should."""
    out, errors = group.communicate(timeout=300)
    assert group.returncode == code, out + errors
    assert 'Traceback' not in errors
    assert not re.search(r'^(\w+ \w+: )?[IWEF]\d{4} |\[Gloo\]|    @ ', errors, re.M)
    return out, errors


@pytest.fixture(scope='module')
def signalled(until_saved):
    """Signals a group, or one of its processes, once there is a checkpoint."""

    def call(group, folder, number, which=None):
        until_saved(group, folder)
        target = psutil.Process(group.pid)
        if which is not None:
            target = sorted(target.children(), key=lambda child: child.pid)[which]
        target.send_signal(number)

    return call


def records(folder):
    """What a run recorded of its steps, its metrics and its last state."""
    last = max(folder.glob('checkpoints/step_*'), key=lambda path: int(path.name[5:]))
    sealed = json.loads((last / 'seal.json').read_text())
    return (
        (folder / 'steps.f32').read_bytes(),
        (folder / 'metrics.jsonl').read_bytes(),
        last.name,
        sealed,
    )


@pytest.mark.parametrize('which', [0, 1])
def test_one_killed_stops_all_and_they_go_on_with_the_same_bits(
    start, signalled, undisturbed, tmp_path, which
):
    folder = tmp_path / 'run'
    group = start(folder)
    signalled(group, folder, signal.SIGKILL, which)
    _, errors = ended(group, 1)
    assert f'process {which} was killed by SIGKILL' in errors
    assert f'process {1 - which}: failed: another process of this run has ended' in errors
    out, _ = ended(start(folder), 0)
    assert 'resuming from the checkpoint of step' in out
    assert records(folder)[:3] == records(undisturbed)[:3]


def test_restarts_need_nobody(start, signalled, undisturbed, tmp_path):
    folder = tmp_path / 'run'
    group = start(folder, options=('--count=2', '--restarts=1'))
    signalled(group, folder, signal.SIGKILL, 1)
    out, _ = ended(group, 0)
    assert 'restarting all 2 (restart 1 of 1)' in out
    assert records(folder)[:3] == records(undisturbed)[:3]


@pytest.mark.parametrize('which', [None, 1], ids=['all', 'one'])
def test_asked_to_stop_all_stop_at_the_same_step(start, signalled, undisturbed, tmp_path, which):
    folder = tmp_path / 'run'
    group = start(folder)
    signalled(group, folder, signal.SIGTERM, which)
    out, _ = ended(group, os.EX_TEMPFAIL)
    assert 'stopped and saved' in out
    ended(start(folder), 0)
    assert records(folder)[:3] == records(undisturbed)[:3]


def test_ctrl_c_in_a_terminal_saves(start, until_saved, undisturbed, tmp_path):
    """It reaches the whole group of the terminal at once."""
    folder = tmp_path / 'run'
    group = start(folder)
    until_saved(group, folder)
    os.killpg(group.pid, signal.SIGINT)
    ended(group, os.EX_TEMPFAIL)
    ended(start(folder), 0)
    assert records(folder)[:3] == records(undisturbed)[:3]


def test_any_number_of_processes_goes_on(start, signalled, launch, undisturbed, tmp_path, tiny):
    folder = tmp_path / 'run'
    group = start(folder)
    signalled(group, folder, signal.SIGKILL, 0)
    ended(group, 1)
    first = len((folder / 'steps.f32').read_bytes())
    done = launch('train', *tiny, *EPOCHS, f'--workdir={folder}', check=0)
    assert 'layout' in done.stdout, 'the change is noted'
    assert first
    steps, reference = (
        np.fromfile(path / 'steps.f32', np.float32).reshape(-1, 2) for path in (folder, undisturbed)
    )
    assert steps.shape == reference.shape
    # Rounding differs and is amplified; that the examples are others would show at once.
    np.testing.assert_allclose(steps[:, 0], reference[:, 0], rtol=0.05)


def test_mistakes_are_told_once_and_not_repeated(start, tmp_path):
    options = ('--count=3', '--restarts=2')
    out, errors = ended(start(tmp_path / 'run', '--config.data.batch=64', options=options), 2)
    assert 'multiples of 3' in errors
    assert 'again' not in out


@pytest.mark.parametrize(
    ('command', 'told'),
    [
        (['processes'], 'no command; give it after --'),
        (['processes', '--', 'launch.evaluate', '--workdir=x'], 'launch.evaluate runs in one'),
        (['train', '--model_parallel=2'], 'does not divide the number of devices of a process, 1'),
    ],
)
def test_what_cannot_be_shared_is_refused(launch, tiny, tmp_path, command, told):
    if command[0] == 'train':
        command = [*command, *tiny, f'--workdir={tmp_path}/run']
    assert told in launch(*command, check=2).stderr


def test_without_others_distributed_says_how_they_are_found(launch, tiny, tmp_path):
    done = launch('train', *tiny, f'--workdir={tmp_path}/run', '--distributed', check=2)
    assert 'JAX_COORDINATOR_ADDRESS=HOST:PORT' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_loss_that_is_not_finite_is_looked_into_on_several_devices(launch, tiny, tmp_path):
    flags = '--config.optimizer.learning_rate=1e30', '--config.optimizer.warmup_epochs=0'
    four = {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
    done = launch('train', *tiny, *flags, f'--workdir={tmp_path}/run', check=1, **four)
    assert re.search(r'^failed: .*step \d+.* (layer|output|parameter|loss)', done.stderr, re.M)


def test_a_run_on_several_devices_is_verified_on_as_many(launch, tiny, tmp_path):
    folder, four = tmp_path / 'run', {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
    done = launch('train', *tiny, f'--workdir={folder}', '--fsdp', check=0, **four)
    assert '4 × cpu, data 4, sharded parameters' in done.stdout
    launch('verify', f'--workdir={folder}', check=0, **four)
    launch('evaluate', f'--workdir={folder}', check=0, **four)
    done = launch('verify', f'--workdir={folder}', check=1)
    assert 'changed since the run began: layout' in done.stdout


def test_a_second_phase_goes_on_on_several_devices(launch, tiny, tmp_path):
    folder, four = tmp_path / 'run', {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
    phases = '--config.train.epochs=1', '--config.train.frozen=("block1_*",)'
    command = 'train', *tiny, *phases, '--config.unfreeze.epochs=2', f'--workdir={folder}'
    launch(*command, check=0, **four)
    before = records(folder)
    shutil.rmtree(folder / 'checkpoints' / before[2])
    done = launch(*command, check=0, **four)
    step = re.search(r'resuming from the checkpoint of step (\d+)', done.stdout)
    assert int(step[1]) > 23, 'after the first phase'
    assert records(folder)[:3] == before[:3]
