"""Runs launchers as a user does: in a process of their own, from the checkout's root."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.environments import ROOT

# A net and a run that take a second: the digits of scikit-learn, 8×8 pixels.
TINY = (
    '--config=experiments/small.py',
    '--config.data.source=digits',
    '--config.model.widths=(4,)',
    '--config.model.hidden=(16,)',
    '--config.augment.crop=0',
    '--config.train.epochs=2',
)

STUDY = (
    '--config=experiments/regularization.py',
    '--config.data.source=digits',
    '--config.data.train=train[:200]',
    '--config.data.eval=test',
    '--config.data.subset=100',
    '--config.data.validation=100',
    '--config.data.batch=20',
    '--config.model.widths=(4,)',
    '--config.model.hidden=(8,)',
    '--config.train.epochs=2',
    '--trials=1',  # of four replicates
    '--seeds=2',
)


@pytest.fixture(scope='session')
def server():
    """A process that has imported what launchers need; see `server.py`."""
    command = [sys.executable, '-m', 'tests.launch.server']
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope='session')
def launch(server, tmp_path_factory):
    """Runs `python -m launch.NAME ARGUMENTS` and returns the finished process.

    In a process of its own from the start if its environment is another one, else in a fork.
    """

    def call(name, *arguments, check=None, **environment):
        arguments = [str(argument) for argument in arguments]
        command = [sys.executable, '-m', f'launch.{name}', *arguments]
        if environment:
            own = os.environ | environment
            done = subprocess.run(
                command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300
            )
        else:
            folder = tmp_path_factory.mktemp('launched')
            print(json.dumps([name, arguments, str(folder)]), file=server.stdin)
            code = int(server.stdout.readline())
            out, err = ((folder / stream).read_text() for stream in ('out', 'err'))
            done = subprocess.CompletedProcess(command, code, out, err)
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope='session')
def start():
    """Starts `python -m launch.NAME ARGUMENTS` and returns the running process."""

    def call(name, *arguments):
        command = [sys.executable, '-m', f'launch.{name}', *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    return call


@pytest.fixture(scope='session')
def until_saved():
    """Waits until a process that trains in a folder has saved a checkpoint."""

    def wait(process, folder):
        deadline = time.monotonic() + 120
        while not list(folder.glob('checkpoints/step_*/seal.json')):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait


@pytest.fixture(scope='session')
def tiny():
    """The flags of a tiny run."""
    return TINY


@pytest.fixture(scope='session')
def tiny_run(launch, tmp_path_factory):
    """The work directory of a finished tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp('runs') / 'tiny'
    done = launch('train', *TINY, f'--workdir={folder}', check=0)
    return folder, done.stdout


@pytest.fixture(scope='session')
def images(launch, tmp_path_factory):
    """Eight images of digits, in one folder."""
    folder = tmp_path_factory.mktemp('images')
    launch('sample', '--source=digits', '--count=8', f'--out={folder}', check=0)
    return sorted(folder.iterdir())


@pytest.fixture(scope='session')
def study_flags():
    """The flags of an ablation whose 33 runs take a fraction of a second each."""
    return STUDY


@pytest.fixture(scope='session')
def study(launch, tmp_path_factory):
    """The work directory of a finished ablation, and what it printed."""
    folder = tmp_path_factory.mktemp('study') / 'run'
    done = launch('ablate', *STUDY, f'--workdir={folder}', check=0)
    return folder, done.stdout


@pytest.fixture(scope='session')
def summary():
    """Reads the summary in an ablation's work directory."""
    return lambda folder: json.loads((folder / 'summary.json').read_text())


@pytest.fixture(scope='session')
def workers_in():
    """Finds the processes that run an ablation's cells in a work directory."""

    def find(folder):
        processes = psutil.process_iter(['cmdline'])
        commands = [(process, process.info['cmdline'] or ['']) for process in processes]
        return [
            process
            for process, command in commands
            if f'--workdir={folder}' in command and '--worker=' in command[-1]
        ]

    return find
