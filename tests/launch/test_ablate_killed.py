"""Ablations whose launchers and workers are killed, and several launchers on one ledger."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.environments import ROOT

JOB = ROOT / 'launch' / 'kubernetes_ablation.yaml'


def until_cells(folder, count, process):
    """Wait until an ablation has this many results, or has ended."""
    deadline = time.monotonic() + 240
    while len(list(folder.glob('cells/*.json'))) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_20_random_moments_it_ends_with_the_same_summary(
    start, launch, tmp_path, study_flags, summary, record_property
):
    many = [*study_flags[:-1], '--seeds=12']
    launch('ablate', *many, f'--workdir={tmp_path}/whole', check=0)
    kills, draw = 0, random.Random(0)
    while kills < 20:
        folder = tmp_path / f'killed{kills}'
        while kills < 20 and not (folder / 'summary.json').exists():
            before = len(list(folder.glob('cells/*.json')))
            process = start('ablate', *many, f'--workdir={folder}')
            until_cells(folder, before + 1, process)
            time.sleep(draw.uniform(0.0, 1.0))
            kills += process.poll() is None
            process.kill()
            process.communicate()
        launch('ablate', *many, f'--workdir={folder}', check=0)
        assert summary(folder) == summary(tmp_path / 'whole')
    record_property('tried', kills)


LAUNCHER = """
import sys, time
from pathlib import Path
from cnn_jax.ablation.workers import LocalWorkers
print('ready', flush=True)
worker = [sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]]
LocalWorkers(worker, 2, Path(sys.argv[1]))
time.sleep(60)
"""


def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path):
    """At 20 moments, from before the first worker is started until both run."""
    draw = random.Random(0)
    for _ in range(20):
        command = [sys.executable, '-c', LAUNCHER, str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.communicate()
    time.sleep(1)
    found = [p.info['cmdline'] for p in psutil.process_iter(['cmdline'])]
    assert [command for command in found if command and str(tmp_path) in command] == []


def test_a_killed_workers_cells_go_to_the_others(
    start, study, tmp_path, workers_in, study_flags, summary
):
    process = start('ablate', *study_flags, f'--workdir={tmp_path}', '--workers=2')
    until_cells(tmp_path, 1, process)
    workers_in(tmp_path)[0].kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert '1 of 2 workers died' in printed
    assert summary(tmp_path) == summary(study[0])


@pytest.mark.slow
def test_on_ray_a_killed_worker_is_replaced_and_nothing_is_done_twice(
    start, study, tmp_path, workers_in, study_flags, summary
):
    folder = tmp_path / 'ray'
    process = start('ablate', *study_flags, f'--workdir={folder}', '--executor=ray', '--workers=2')
    until_cells(folder, 3, process)
    workers_in(folder)[0].parent().kill()  # Ray's process
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert summary(folder) == summary(study[0])
    done = [line for line in printed.splitlines() if line.startswith('[')]
    assert len(done) == len(set(done)) == 33


@pytest.mark.slow
def test_slurm_tasks_and_pods_share_one_ledger(study_flags, study, tmp_path, summary):
    pod = yaml.safe_load(JOB.read_text())['spec']['template']['spec']['containers'][0]
    command = pod['args'][0].strip().splitlines()[-1].removeprefix('exec ')
    pod_flags = [
        flag for flag in shlex.split(command) if not flag.startswith(('--workdir', '--config'))
    ]
    tasks = [['bash', 'launch/slurm_ablation.sh']] * 2 + [pod_flags]
    environment = os.environ | {'SLURM_SUBMIT_DIR': str(ROOT), 'CNN_JAX_VENV': sys.prefix}
    running = [
        subprocess.Popen(
            [*task, *study_flags, f'--workdir={tmp_path}'],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in tasks
    ]
    assert [process.wait(timeout=240) for process in running] == [0, 0, 0]
    assert summary(tmp_path) == summary(study[0])
    totals = [json.loads(log.read_text().splitlines()[-1]) for log in tmp_path.glob('logs/*.log')]
    assert len(totals) == 3
    assert sum(total['cells'] for total in totals) == 33


def test_a_signal_to_all_of_its_processes_is_a_request_to_stop(
    launch, study, tmp_path, study_flags, summary
):
    """As from timeout, or Ctrl-C in a terminal: launcher and workers have it at once."""
    command = [sys.executable, '-m', 'launch.ablate', *study_flags, f'--workdir={tmp_path}']
    process = subprocess.Popen(
        [*command, '--workers=2'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until_cells(tmp_path, 1, process)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == os.EX_TEMPFAIL, printed
    assert 'rerun the same command' in printed
    launch('ablate', *study_flags, f'--workdir={tmp_path}', check=0)
    assert summary(tmp_path) == summary(study[0])
