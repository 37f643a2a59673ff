"""What runs survive when started as a user does: full disks, rivals, signals, a clock set back."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.environments import ROOT


def after(preparation, *flags):
    """The command of a run, the last of the flags its folder, in a process prepared by a line."""
    *flags, folder = flags
    code = f'import os, resource, sys; {preparation}; os.execv(sys.executable, sys.argv[1:])'
    run = sys.executable, '-m', 'launch.train', *flags, f'--workdir={folder}'
    return [sys.executable, '-c', code, *run]


def record(folder):
    return [(folder / name).read_bytes() for name in ('metrics.jsonl', 'steps.f32')]


@pytest.fixture
def long_run(start, until_saved, tiny, tmp_path):
    """A running process that would train for minutes, after its first checkpoint."""
    folder = tmp_path / 'long'
    process = start('train', *tiny, '--config.train.epochs=2000', f'--workdir={folder}')
    until_saved(process, folder)
    assert process.poll() is None
    yield folder, process
    process.kill()
    process.communicate()


# Bytes a file may have: as with a quota, config.json does not fit, or some of a checkpoint.
@pytest.mark.parametrize('limit', [1_000, 5_000])
def test_a_run_that_cannot_write_fails_plainly_and_goes_on_when_it_can(
    launch, tiny, tiny_run, tmp_path, limit
):
    folder = tmp_path / 'run'
    done = subprocess.run(
        after(f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))', *tiny, folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    # TensorStore's threads may write of their own failure after it.
    (said,) = [line for line in done.stderr.splitlines() if line.startswith('failed: ')]
    assert 'Event loop is closed' not in done.stderr
    assert 'File too large' in said
    assert 'same command' in said
    launch('train', *tiny, f'--workdir={folder}', check=0)
    assert record(folder) == record(tiny_run[0])


def test_a_full_disk_is_found_before_a_checkpoint_is_begun(tiny, tmp_path):
    script = (
        'import collections, shutil, sys\n'
        'Usage = collections.namedtuple("Usage", "total used free")\n'
        'shutil.disk_usage = lambda path: Usage(10**9, 10**9 - 1000, 1000)\n'
        'import runpy; runpy.run_module("launch.train", run_name="__main__", alter_sys=True)'
    )
    command = [sys.executable, '-c', script, *tiny, f'--workdir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert 'cannot be written' in line
    assert 'No space left on device' in line
    assert not list(tmp_path.glob('checkpoints/*'))


def test_a_second_process_is_refused_or_waits_and_a_killed_one_leaves_no_lock(
    launch, start, tiny, long_run
):
    folder, process = long_run
    same = (*tiny, '--config.train.epochs=2000', f'--workdir={folder}')
    refused = launch('train', *same, check=2)
    assert f'process {process.pid} on ' in refused.stderr
    assert '--wait' in refused.stderr
    waiting = start('train', *same, '--wait')
    assert 'waiting for process' in waiting.stdout.readline()
    process.kill()
    line = ''
    while 'resuming from the checkpoint' not in line:
        assert waiting.poll() is None
        line = waiting.stdout.readline()
    waiting.terminate()
    waiting.communicate(timeout=60)
    assert waiting.returncode == os.EX_TEMPFAIL


def test_nothing_depends_on_the_clock(launch, tiny, tiny_run, tmp_path):
    script = (
        'import itertools, time\n'
        'ticks = itertools.count()\n'
        'time.time = lambda: 10**9 - 3600.0 * next(ticks)\n'
        'import runpy; runpy.run_module("launch.train", run_name="__main__", alter_sys=True)'
    )
    command = [sys.executable, '-c', script, *tiny, f'--workdir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert record(tmp_path) == record(tiny_run[0])


def test_how_a_run_is_fed_watched_and_saved_changes_no_bit(launch, tiny, tiny_run, tmp_path):
    often = '--config.train.eval_every=0.3', '--config.train.checkpoint_every=0.1'
    launch('train', *tiny, *often, '--config.data.stream=always', f'--workdir={tmp_path}', check=0)
    assert record(tmp_path)[1] == record(tiny_run[0])[1]


@pytest.fixture(scope='module')
def verified(tiny_run, tmp_path_factory):
    """A finished run to alter."""
    return shutil.copytree(tiny_run[0], tmp_path_factory.mktemp('verified') / 'run')


def test_verify_finds_an_undisturbed_run_the_same_and_changes_nothing(launch, verified):
    before = {path: path.read_bytes() for path in verified.rglob('*') if path.is_file()}
    done = launch('verify', f'--workdir={verified}', '--steps=30', check=0)
    assert 'steps 1 to 30' in done.stdout
    assert 'the checkpoint of step 23' in done.stdout
    assert 'differs' not in done.stdout
    assert before == {path: path.read_bytes() for path in verified.rglob('*') if path.is_file()}


def test_verify_says_which_step_differs_first(launch, verified):
    path = verified / 'steps.f32'
    whole = path.read_bytes()
    steps = np.frombuffer(whole, '<f4').reshape(-1, 2).copy()
    steps[4, 0] = np.nextafter(steps[4, 0], np.inf)
    path.write_bytes(steps.tobytes())
    done = launch('verify', f'--workdir={verified}', check=1)
    assert 'differs  steps 1 to 10: from step 5 on' in done.stdout
    assert 'nothing that is known to matter has changed' in done.stdout
    path.write_bytes(whole)


def test_verify_says_what_has_changed_since(launch, verified):
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_enable_fast_math=true'
    done = launch('verify', f'--workdir={verified}', XLA_FLAGS=flags)
    assert 'changed since the run began: xla_flags' in done.stdout


def test_on_fewer_cores_a_run_goes_on_with_its_threads_and_ends_with_the_same_bits(
    tiny, tiny_run, tmp_path
):
    threads = json.loads((tiny_run[0] / 'manifest.json').read_text())['machine']['threads']
    folder = tmp_path / 'run'
    shutil.copytree(tiny_run[0], folder)
    shutil.rmtree(folder / 'checkpoints' / 'step_44')
    done = subprocess.run(
        after('os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})', *tiny, folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split(' · ')[1].startswith(f'{threads} thread')
    assert 'resuming from the checkpoint of step 23' in done.stdout
    assert record(folder) == record(tiny_run[0])
