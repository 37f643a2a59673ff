"""The scripts for schedulers: SIGTERM reaches the run, which saves and is queued again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / 'launch' / 'kubernetes_train.yaml'


@pytest.fixture
def slurm(tmp_path):
    """Starts the Slurm script as sbatch does, with an `scontrol` that writes its arguments down."""
    calls = tmp_path / 'calls'
    command = tmp_path / 'bin' / 'scontrol'
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    command.chmod(0o755)
    environment = {
        'SLURM_JOB_ID': '42',
        'SLURM_SUBMIT_DIR': str(ROOT),
        'CNN_JAX_VENV': sys.prefix,
        'PATH': f'{command.parent}:{os.environ["PATH"]}',
    }

    def start(*arguments):
        script = ['bash', str(ROOT / 'launch' / 'slurm_train.sh'), *arguments]
        return subprocess.Popen(
            script, cwd=tmp_path, env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )

    return start, calls


def test_a_slurm_job_that_is_preempted_saves_and_is_queued_again(
    slurm, until_saved, tiny, tmp_path
):
    start, calls = slurm
    folder = tmp_path / 'run'
    job = start(*tiny, '--config.train.epochs=2000', f'--workdir={folder}')
    until_saved(job, folder)
    job.send_signal(signal.SIGTERM)  # B:TERM goes to the script's shell alone
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == os.EX_TEMPFAIL, printed
    assert 'stopped and saved' in printed
    assert calls.read_text() == 'requeue 42\n'


def test_a_slurm_job_that_ends_or_fails_is_not_queued_again(slurm, tiny, tmp_path):
    start, calls = slurm
    job = start(*tiny, f'--workdir={tmp_path}/run')
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 0, printed
    job = start(*tiny, '--config.seed=1', f'--workdir={tmp_path}/run')
    job.communicate(timeout=120)
    assert job.returncode == 2
    assert not calls.exists()


def test_the_kubernetes_job_follows_the_newest_schema_and_is_never_twice():
    job = yaml.safe_load(JOB.read_text())
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    assert job['spec']['podReplacementPolicy'] == 'Failed'
    assert job['spec']['template']['spec']['terminationGracePeriodSeconds'] >= 60
