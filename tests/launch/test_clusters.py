"""The scripts for clusters: no known traps, valid manifests, and the ways a run usually goes.

Stand-ins for gcloud, srun and scontrol come first in PATH. The one for gcloud knows one TPU VM,
whose two workers are folders of this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.environments import ROOT

AWKWARD = ['--config.data.train=train[:10] \'a\' "b"  c', '--config.x=$HOME;`id`&|*\\n', '--y=é']

GCLOUD = """
import json, os, shutil, subprocess, sys
from pathlib import Path
cloud, (kind, verb, *rest) = Path(os.environ['CLOUD']), sys.argv[3:]
with open(cloud / 'calls', 'a') as out:
    out.write(json.dumps([verb, *rest]) + '\\n')
flags = dict(a[2:].partition('=')[::2] for a in rest if a.startswith('--'))
assert kind == 'tpu-vm' and flags['zone'] == 'us-west4-a'
vm, homes = cloud / 'vm', [cloud / f'worker{n}' for n in range(2)]
if verb == 'describe':
    if not vm.exists():
        sys.exit('ERROR: NOT_FOUND: Resource was not found')
    print(vm.read_text(), 'tpu_vm_sh', sep='\\t')
elif verb == 'create':
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
    vm.write_text('READY')
elif verb == 'delete':
    vm.unlink()
    pass
elif verb == 'scp':
    for home in homes:
        shutil.copy(rest[0], home)
elif verb == 'ssh':
    shells = [
        subprocess.Popen(['bash', '-c', flags['command']], cwd=home,
            env=os.environ | {'HOME': str(home), 'TPU_WORKER_ID': str(number)})
        for number, home in enumerate(homes)
    ]
    codes = [shell.wait() for shell in shells]
    sys.exit(next((code for code in codes if code), 0))
"""

# launch.train of the copied checkout: does what the plan says for this start of it.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
cloud, number = Path(os.environ['CLOUD']), os.environ['TPU_WORKER_ID']
runs = cloud / f'runs{number}'
runs.touch()
what = json.loads((cloud / 'plan').read_text())[len(runs.read_text().splitlines())]
with open(runs, 'a') as out:
    out.write(json.dumps(sys.argv[1:]) + '\\n')
print('step 1' if number == '0' else 'a warning', flush=True)
if what == 'taken away':
    (cloud / 'vm').write_text('PREEMPTED')
    time.sleep(20)
if what == 'killed' and number == '1':
    os.kill(os.getpid(), signal.SIGKILL)
print('the end', flush=True)
sys.exit(what if what != 'killed' else 1)
"""


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def tpu(tmp_path):
    """Runs launch/tpu_vm.sh in a checkout of its own; returns the process, calls and runs."""
    cloud, checkout = tmp_path / 'cloud', tmp_path / 'check out'
    cloud.mkdir()
    (checkout / 'launch').mkdir(parents=True)
    (checkout / 'config.py').touch()
    (checkout / 'launch' / '__init__.py').touch()
    for name in ('tpu_vm.sh', 'tpu_worker.sh'):
        shutil.copy(ROOT / 'launch' / name, checkout / 'launch')
    (checkout / 'launch' / 'setup.sh').write_text('cd ~/cnn_jax\nset_up() { :; }\n')
    (checkout / 'launch' / 'train.py').write_text(TRAIN)
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', checkout]
    for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
        subprocess.run([*git, *command], check=True)
    executable(tmp_path / 'bin' / 'gcloud', f'#!{sys.executable} -IS\n{GCLOUD}')
    environment = os.environ | {
        'CLOUD': str(cloud),
        'CNN_JAX_VENV': sys.prefix,
        'TPU_VM_POLL': '0.2',
        'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
    }

    def lines(name):
        file = cloud / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def call(plan, *arguments):
        (cloud / 'plan').write_text(json.dumps(plan))
        command = ['bash', 'launch/tpu_vm.sh', '--name=mine', '--zone=us-west4-a', *arguments]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
        )
        return done, lines('calls'), [lines(f'runs{n}') for n in range(2)]

    return call


@pytest.mark.parametrize(
    ('plan', 'code', 'made'),
    [
        ([0], 0, 1),
        (['taken away', 75, 'killed', 0], 0, 2),
        ([75, 75, 75, 75], 75, 1),
        ([2, 0], 2, 1),
        ([1, 0], 1, 1),
    ],
)
def test_a_tpu_vm_is_made_set_up_and_made_again_when_it_is_taken_away(tpu, plan, code, made):
    own = ['--config=config.py', '--workdir=gs://b/r', *AWKWARD]
    options = ['--type=v5litepod-16', '--spot', '--restarts=3', '--delete', '--', *own]
    done, calls, runs = tpu(plan, *options)
    assert done.returncode == code, done.stderr
    starts = len(plan) if code in (0, 75) else 1
    assert runs == [[['--distributed', *own]] * starts] * 2
    created = [set(call[1:]) for call in calls if call[0] == 'create']
    assert len(created) == made == len([call for call in calls if call[0] == 'delete'])
    assert {'--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite'} < created[0]
    assert 'worker 1: a warning' in done.stderr
    assert 'step 1\n' in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        (['--type=v5litepod-16', '--', '--config=other.py'], 'not committed'),
        (['--typ=v5litepod-16'], 'unknown'),
        (['--type=v99-1', '--', '--config=config.py'], '--runtime='),
        (['--', '--config=config.py'], '--type='),
    ],
)
def test_usage_errors_make_no_tpu_vm(tpu, arguments, word):
    done, calls, _ = tpu([], *arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert 'create' not in [call[0] for call in calls]


SRUN = """#!/bin/sh
echo "$@" > "$SLURM/srun"
while [ "$1" != python ]; do shift; done
for n in 0 1; do SLURM_PROCID=$n "$@" & eval "p$n=$!"; done
wait $p0; a=$?; wait $p1; b=$?
exit $((a > b ? a : b))
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm_train.sh as sbatch does; what `scontrol` is asked is in `queued`."""
    executable(tmp_path / 'bin' / 'srun', SRUN)
    executable(tmp_path / 'bin' / 'scontrol', '#!/bin/sh\necho "$@" >> "$SLURM/queued"\n')

    def start(*arguments, **more):
        environment = {
            'SLURM': str(tmp_path),
            'SLURM_JOB_ID': '42',
            'SLURM_SUBMIT_DIR': str(ROOT),
            'CNN_JAX_VENV': sys.prefix,
            'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
        }
        script = ['bash', str(ROOT / 'launch' / 'slurm_train.sh'), *arguments]
        environment = os.environ | environment | more
        return subprocess.Popen(
            script, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(
    ('codes', 'before', 'code', 'again'),
    [
        ('75 75', 99, 75, True),
        ('1 1', 0, 1, False),
        ('1 KILL', 0, 137, True),
        ('1 KILL', 5, 137, False),
        ('0 0', 0, 0, False),
    ],
)
def test_a_slurm_job_of_several_tasks_is_queued_again_when_that_may_help(
    slurm, tmp_path, codes, before, code, again
):
    ends = f'set -- {codes}; shift $SLURM_PROCID; case $1 in [A-Z]*) kill -$1 $$;; esac; exit $1'
    executable(tmp_path / 'python' / 'python', f'#!/bin/sh\n{ends}\n')
    (tmp_path / 'bin' / 'activate').write_text(f'PATH={tmp_path}/python:$PATH\n')
    more = {'SLURM_NTASKS': '2', 'SLURM_RESTART_COUNT': str(before), 'CNN_JAX_VENV': str(tmp_path)}
    job = slurm('--workdir=runs/a', **more)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert (tmp_path / 'queued').exists() == again
    called = (tmp_path / 'srun').read_text()
    assert called.endswith('-m launch.train --wait --distributed --workdir=runs/a\n')


def test_a_slurm_job_that_is_preempted_saves_and_is_queued_again(
    slurm, until_saved, tiny, tmp_path
):
    folder = tmp_path / 'run'
    job = slurm(*tiny, '--config.train.epochs=2000', f'--workdir={folder}')
    until_saved(job, folder)
    job.send_signal(signal.SIGTERM)  # B:TERM goes to the script's shell alone
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == os.EX_TEMPFAIL, printed
    assert (tmp_path / 'queued').read_text() == 'requeue 42\n'


@pytest.mark.parametrize('name', ['kubernetes_train', 'kubernetes_ablation', 'gke_jobset'])
def test_kubernetes_manifests_follow_the_newest_schema(name):
    job = yaml.safe_load((ROOT / 'launch' / f'{name}.yaml').read_text())
    if name == 'gke_jobset':
        assert job['spec']['failurePolicy']['restartStrategy'] == 'BlockingRecreate'
        (part,) = job['spec']['replicatedJobs']
        job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}}
        job['spec'] = part['template']['spec']
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    if name != 'kubernetes_ablation':  # its cells need no time to save
        assert job['spec']['template']['spec']['terminationGracePeriodSeconds'] >= 60
    if name == 'kubernetes_train':
        assert job['spec']['podReplacementPolicy'] == 'Failed'  # one writer at a time


def test_shell_scripts_have_no_known_traps():
    scripts = [*sorted((ROOT / 'launch').glob('*.sh')), ROOT / '.ci' / 'run']
    command = [Path(sys.prefix) / 'bin' / 'shellcheck', '-x', '-P', 'SCRIPTDIR', *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
