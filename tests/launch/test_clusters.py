"""The scripts for clusters, run against stand-ins for gcloud, srun, scancel and scontrol.

The stand-in for gcloud knows TPU VMs whose workers are folders of this machine, and hands commands
to a shell there as ssh does.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
JOBSET = ROOT / 'launch' / 'gke_jobset.yaml'
AWKWARD = [
    '--config.data.train=train[:10] \'a\' "b"  c',
    '--config.x=$HOME;`id`&|*\\n',
    '--y=\u00e9',
]

GCLOUD = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
cloud, arguments = Path(os.environ['CLOUD']), sys.argv[1:]
with open(cloud / 'calls', 'a') as out:
    out.write(json.dumps(arguments) + '\\n')
assert arguments[:2] == ['compute', 'tpus'], arguments
kind, verb, rest = arguments[2], arguments[3], arguments[4:]
flags = dict(a[2:].partition('=')[::2] for a in rest if a.startswith('--'))
assert flags['zone'] == 'us-west4-a' and 'quiet' in flags
vm, homes = cloud / f'{kind}.json', [cloud / f'worker{n}' for n in range(2)]
def end(code, text=''):
    print(text, file=sys.stderr)
    sys.exit(code)
def kill():
    for name in ('train', 'pid'):
        for home in homes:
            try:
                os.kill(int((home / 'cnn_jax_run' / name).read_text()), signal.SIGKILL)
            except (OSError, ValueError):
                pass
if verb == 'describe':
    if (cloud / 'offline').exists():
        end(1, 'ERROR: (gcloud) You do not currently have an active account selected.')
    if not vm.exists():
        end(1, "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource 'x' was not found")
    known = json.loads(vm.read_text())
    if known['state'] == 'WAITING_FOR_RESOURCES':
        vm.write_text(json.dumps(known | {'state': 'ACTIVE'}))
        (cloud / 'tpu-vm.json').write_text(json.dumps(known | {'state': 'READY'}))
    print(*[known[('state', 'owner')['labels' in field]] for field in flags['format'].split(',')],
        sep='\\t')
elif verb == 'create':
    if (cloud / 'full').exists():
        end(1, 'ERROR: (gcloud) There is no more capacity in the zone "us-west4-a"')
    assert not vm.exists()
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
    owner = flags['labels'].removeprefix('launched_by=')
    state = 'READY' if kind == 'tpu-vm' else 'WAITING_FOR_RESOURCES'
    vm.write_text(json.dumps({'state': state, 'owner': owner}))
elif verb == 'delete':
    kill()
    vm.unlink()
    if kind == 'queued-resources':
        assert 'force' in flags
        (cloud / 'tpu-vm.json').unlink(missing_ok=True)
elif verb == 'scp':
    assert rest[1] == 'mine:' and flags['worker'] == 'all'
    for home in homes:
        shutil.copy(rest[0], home)
elif verb == 'ssh':
    assert rest[0] == 'mine' and flags['worker'] == 'all'
    while True:
        shells = [
            subprocess.Popen(['bash', '-c', ' '.join(flags['command'].split(' '))], cwd=home,
                env=os.environ | {'HOME': str(home), 'TPU_WORKER_ID': str(number)})
            for number, home in enumerate(homes)
        ]
        broken = cloud / 'break'
        if not broken.exists() or 'worker.sh run' not in flags['command']:
            break
        while not all((home / 'cnn_jax_run' / 'train').exists() for home in homes):
            time.sleep(0.05)
        broken.unlink()
        for shell in shells:  # the real one tries again after ssh has ended with 255
            children = Path(f'/proc/{shell.pid}/task/{shell.pid}/children').read_text().split()
            shell.kill()
            shell.wait()
            for child in children:  # and with it what it reads the log with
                if Path(f'/proc/{child}/comm').read_text().strip() in ('tail', 'sed'):
                    os.kill(int(child), signal.SIGKILL)
    codes = [shell.wait() for shell in shells]
    sys.exit(next((code for code in codes if code), 0))
else:
    raise AssertionError(arguments)
"""

# launch.train of the copied checkout: does what the plan says for this start of it.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
cloud, number = Path(os.environ['CLOUD']), os.environ['TPU_WORKER_ID']
runs = cloud / f'runs{number}'
runs.touch()
start = len(runs.read_text().splitlines())
plan = json.loads((cloud / 'plan').read_text())
what = plan[start] if start < len(plan) else 0
def stopped(*_):
    print('stopped and saved', flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, stopped)
if what == 'stubborn':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(runs, 'a') as out:
    out.write(json.dumps(sys.argv[1:]) + '\\n')
print('step 1' if number == '0' else 'a warning', flush=True)
if what == 'preempted':
    (cloud / 'tpu-vm.json').write_text(json.dumps({'state': 'PREEMPTED', 'owner': 'tpu_vm_sh'}))
    time.sleep(600)
if what in ('long', 'stubborn'):
    time.sleep(600)
if what == 'killed':
    what = 1
    if number == '1':
        os.kill(os.getpid(), signal.SIGKILL)
if what == 'short':
    time.sleep(2)
    what = 0
print('the end', flush=True)
sys.exit(what)
"""


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A checkout, a cloud with at most one TPU VM of two workers, and the script in between."""

    def __init__(self, folder):
        self.folder, self.checkout = folder / 'cloud', folder / 'check out'
        self.folder.mkdir()
        (self.checkout / 'launch').mkdir(parents=True)
        (self.checkout / 'config.py').touch()
        (self.checkout / 'launch' / '__init__.py').touch()
        for name in ('tpu_vm.sh', 'tpu_worker.sh'):
            shutil.copy(ROOT / 'launch' / name, self.checkout / 'launch')
        (self.checkout / 'launch' / 'setup.sh').write_text(
            'cd "$(dirname "${BASH_SOURCE[0]}")/.."\n'
            'set_up() { echo "$@" >> ~/installed; echo "${PYTHON:-}" > ~/python; }\n'
        )
        (self.checkout / 'launch' / 'train.py').write_text(TRAIN)
        git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', self.checkout]
        for command in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'all']):
            subprocess.run([*git, *command], check=True)
        executable(folder / 'bin' / 'gcloud', f'#!{sys.executable} -IS\n{GCLOUD}')
        self.environment = os.environ | {
            'CLOUD': str(self.folder),
            'CNN_JAX_VENV': sys.prefix,
            'TPU_VM_POLL': '0.2',
            'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
        }
        self.plan()

    def plan(self, *starts):
        (self.folder / 'plan').write_text(json.dumps(starts))

    def begin(self, *arguments, parts=()):
        return subprocess.Popen(
            ['bash', 'launch/tpu_vm.sh', *parts, '--name=mine', '--zone=us-west4-a', *arguments],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments, parts=()):
        started = self.begin(*arguments, parts=parts)
        try:
            out, err = started.communicate(timeout=60)
        finally:
            started.kill()
        return started.returncode, out, err

    def train(self, *options, flags=('--workdir=gs://b/r',)):
        return self('--type=v5litepod-16', *options, '--', '--config=config.py', *flags)

    def calls(self, kind, verb):
        lines = (self.folder / 'calls').read_text().splitlines()
        calls = [json.loads(line) for line in lines]
        return [call[4:] for call in calls if call[2:4] == [kind, verb]]

    def runs(self, worker):
        file = self.folder / f'runs{worker}'
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def until_it_runs(self, starts=1):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if all(len(self.runs(n)) == starts for n in range(2)):
                return
            time.sleep(0.02)
        raise AssertionError('it was not started')

    @property
    def exists(self):
        return (self.folder / 'tpu-vm.json').exists()


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for file in cloud.folder.glob('worker*/cnn_jax_run/*'):
        if file.name in ('pid', 'train'):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)


def test_one_command_makes_a_tpu_vm_trains_on_all_workers_and_deletes_it(cloud):
    code, out, err = cloud.train('--spot', '--delete', flags=['--workdir=gs://b/r', *AWKWARD])
    assert code == 0, err
    assert out == 'step 1\nthe end\n'
    assert 'worker 1: a warning' in err
    sent = ['--distributed', '--config=config.py', '--workdir=gs://b/r', *AWKWARD]
    assert cloud.runs(0) == cloud.runs(1) == [sent]
    (created,) = cloud.calls('tpu-vm', 'create')
    assert {'--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite'} < set(created)
    assert '--spot' in created
    installed = (cloud.folder / 'worker1' / 'installed').read_text()
    assert installed == 'requirements-tpu.txt requirements-gcs.txt\n'
    assert not cloud.exists


def test_a_tpu_vm_that_is_taken_away_is_made_again_and_the_run_goes_on(cloud):
    cloud.plan('preempted', 'preempted', 0)
    code, out, err = cloud.train('--spot')
    assert code == 0, err
    assert len(cloud.runs(0)) == len(cloud.calls('tpu-vm', 'create')) == 3
    assert len(cloud.calls('tpu-vm', 'delete')) == 2
    assert out.endswith('step 1\nthe end\n')
    assert cloud.exists
    assert 'still there and charged' in err


def test_what_was_made_by_somebody_else_is_not_deleted_unasked(cloud):
    vm = cloud.folder / 'tpu-vm.json'
    vm.write_text(json.dumps({'state': 'PREEMPTED', 'owner': ''}))
    code, _, err = cloud.train()
    assert code == os.EX_TEMPFAIL
    assert 'was not made by this script' in err
    assert vm.exists()
    assert cloud.train('--delete')[0] == 0
    assert not vm.exists()


def test_a_queued_tpu_vm_is_waited_for_and_asked_for_again_when_it_is_taken_away(cloud):
    cloud.plan('preempted', 0)
    code, _, err = cloud.train('--queue', '--spot', '--delete')
    assert code == 0, err
    created = cloud.calls('queued-resources', 'create')
    assert len(created) == 2
    assert {'--node-id=mine', '--runtime-version=v2-alpha-tpuv5-lite', '--spot'} < set(created[0])
    assert not cloud.calls('tpu-vm', 'create')
    assert not cloud.exists
    assert not (cloud.folder / 'queued-resources.json').exists()


@pytest.mark.parametrize(
    ('starts', 'code', 'runs'),
    [
        ((75, 'killed', 0), 0, 3),
        ((2, 0), 2, 1),
        ((1, 0), 1, 1),
        ((75,) * 9, 75, 3),
    ],
)
def test_only_a_run_that_was_stopped_or_killed_is_started_again_and_not_for_ever(
    cloud, starts, code, runs
):
    cloud.plan(*starts)
    got, _, err = cloud.train('--restarts=2')
    assert (got, len(cloud.runs(0))) == (code, runs), err
    assert len(cloud.calls('tpu-vm', 'create')) == 1


def test_a_broken_connection_starts_nothing_twice(cloud):
    cloud.plan('short')
    (cloud.folder / 'break').touch()
    code, out, err = cloud.train()
    assert code == 0, err
    assert not (cloud.folder / 'break').exists()
    assert out.endswith('the end\n')
    assert len(cloud.runs(0)) == len(cloud.runs(1)) == 1


def test_ctrl_c_lets_the_run_save_and_a_second_one_leaves_it_alone(cloud):
    cloud.plan('long', 'stubborn')
    arguments = ('--type=v5litepod-16', '--', '--config=config.py', '--workdir=gs://b/r')
    started = cloud.begin(*arguments)
    cloud.until_it_runs()
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == os.EX_TEMPFAIL, err
    assert 'stopped and saved' in out

    started = cloud.begin(*arguments)
    cloud.until_it_runs(2)
    started.send_signal(signal.SIGINT)
    while 'stopping' not in (line := started.stderr.readline()):
        assert line
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert 'goes on without this command' in err
    assert cloud.exists
    assert all(
        psutil.pid_exists(int((cloud.folder / f'worker{n}' / 'cnn_jax_run' / 'train').read_text()))
        for n in range(2)
    )


def test_a_run_that_goes_on_is_come_back_to_and_can_be_stopped_from_elsewhere(cloud):
    cloud.plan('long')
    arguments = ('--type=v5litepod-16', '--', '--config=config.py', '--workdir=gs://b/r')
    first = cloud.begin(*arguments)
    cloud.until_it_runs()
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == first.pid:  # the laptop is closed
                process.kill()
    first.communicate()
    code, _, err = cloud.train(flags=['--workdir=gs://b/other'])
    assert code == 2
    assert 'another run goes on here' in err
    again = cloud.begin(*arguments)
    assert again.stdout.readline() == 'step 1\n'
    assert cloud(parts=['stop'])[0] == 0
    out, err = again.communicate(timeout=60)
    assert again.returncode == os.EX_TEMPFAIL, err
    assert 'stopped and saved' in out
    assert len(cloud.runs(0)) == 1
    assert cloud(parts=['logs'])[0] == os.EX_TEMPFAIL


def test_an_old_python_is_left_alone(cloud):
    executable(cloud.checkout.parent / 'bin' / 'python3', '#!/bin/sh\nexit 1\n')
    uv = '[ "$*" = "python find 3.12" ] && echo /new/python; exit 0'
    install = f"mkdir -p ~/.local/bin; cd ~/.local/bin; echo '{uv}' > uv; chmod +x uv"
    executable(cloud.checkout.parent / 'bin' / 'curl', f'#!/bin/sh\ncat <<"E"\n{install}\nE\n')
    code, _, err = cloud.train(flags=['--workdir=/x'])
    assert code == 0, err
    assert (cloud.folder / 'worker0' / 'python').read_text() == '/new/python\n'
    assert 'is lost with the TPU VM' in err


def test_mistakes_cost_nothing(cloud):
    code, _, err = cloud('--type=v5litepod-16', '--', '--config=other.py', '--workdir=gs://b/r')
    assert (code, 'not committed' in err) == (2, True)
    code, _, err = cloud('--typ=v5litepod-16')
    assert (code, '--typ=v5litepod-16 is unknown' in err) == (2, True)
    assert not (cloud.folder / 'calls').exists()
    code, _, err = cloud('--type=v99-1', '--', '--config=config.py', '--workdir=gs://b/r')
    assert (code, '--runtime=' in err) == (2, True)
    code, _, err = cloud('--', '--config=config.py', '--workdir=gs://b/r')
    assert (code, '--type=' in err) == (2, True)
    assert not cloud.calls('tpu-vm', 'create')


def test_no_capacity_and_no_account_are_failures_that_end(cloud):
    (cloud.folder / 'full').touch()
    code, _, err = cloud.train()
    assert (code, '--queue' in err) == (1, True)
    assert len(cloud.calls('tpu-vm', 'create')) == 1
    (cloud.folder / 'offline').touch()
    code, _, err = cloud.train()
    assert (code, 'active account' in err) == (1, True)


def test_create_and_delete_are_commands_of_their_own(cloud):
    assert cloud('--type=v6e-8', '--create_flag=--network=a b', parts=['create'])[0] == 0
    (created,) = cloud.calls('tpu-vm', 'create')
    assert {'--version=v2-alpha-tpuv6e', '--network=a b'} < set(created)
    assert cloud.exists
    assert cloud(parts=['delete'])[0] == 0
    assert not cloud.exists


SRUN = """
import json, os, signal, subprocess, sys
from pathlib import Path
place = Path(os.environ['SLURM'])
options = [a for a in sys.argv[1:] if a.startswith('--')][:3]
command = sys.argv[1 + len(options):]
(place / 'srun').write_text(json.dumps([options, command]))
count = int(os.environ['SLURM_NTASKS'])
tasks = [
    subprocess.Popen(command, env=os.environ | {
        'SLURM_PROCID': str(n), 'SLURM_LOCALID': str(n), 'SLURM_STEP_NODELIST': 'localhost'})
    for n in range(count)
]
def force(*_):  # what the real one does with SIGTERM
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, force)
(place / 'tasks').write_text(' '.join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCANCEL = '#!/bin/sh\n[ "$*" = "--signal=TERM 42" ] && kill -TERM $(cat "$SLURM/tasks")\n'


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm_train.sh with two tasks; `python` may be another program."""
    executable(tmp_path / 'bin' / 'srun', f'#!{sys.executable} -IS\n{SRUN}')
    executable(tmp_path / 'bin' / 'scancel', SCANCEL)
    executable(tmp_path / 'bin' / 'scontrol', '#!/bin/sh\necho "$@" >> "$SLURM/queued"\n')
    environment = os.environ | {
        'SLURM': str(tmp_path),
        'SLURM_JOB_ID': '42',
        'SLURM_NTASKS': '2',
        'SLURM_CPUS_PER_TASK': '3',
        'SLURM_SUBMIT_DIR': str(ROOT),
        'CNN_JAX_VENV': sys.prefix,
        'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
    }

    def start(*arguments, python='', **more):
        if python:
            executable(tmp_path / 'venv' / 'python', f'#!/bin/sh\n{python}\n')
            (tmp_path / 'venv' / 'bin').mkdir(exist_ok=True)
            (tmp_path / 'venv' / 'bin' / 'activate').write_text(f'PATH={tmp_path}/venv:$PATH\n')
            more['CNN_JAX_VENV'] = str(tmp_path / 'venv')
        script = ['bash', str(ROOT / 'launch' / 'slurm_train.sh'), *arguments]
        return subprocess.Popen(
            script, cwd=tmp_path, env=environment | more, stdout=subprocess.PIPE, text=True
        )

    return start, tmp_path


@pytest.mark.parametrize(
    ('codes', 'before', 'code', 'again'),
    [
        ('75 75', 0, 75, True),
        ('75 75', 99, 75, True),
        ('2 2', 0, 2, False),
        ('1 1', 0, 1, False),
        ('1 KILL', 0, 137, True),
        ('ABRT 1', 4, 134, True),
        ('1 KILL', 5, 137, False),
        ('0 0', 0, 0, False),
    ],
)
def test_a_slurm_job_of_several_tasks_is_queued_again_when_that_may_help(
    slurm, codes, before, code, again
):
    start, folder = slurm
    ends = f'set -- {codes}; shift $SLURM_PROCID; case $1 in [A-Z]*) kill -$1 $$;; esac; exit $1'
    job = start('--workdir=a b', python=ends, SLURM_RESTART_COUNT=str(before))
    job.communicate(timeout=60)
    assert job.returncode == code
    assert (folder / 'queued').exists() == again
    options, command = json.loads((folder / 'srun').read_text())
    assert options == ['--kill-on-bad-exit=0', '--wait=180', '--cpus-per-task=3']
    assert command[1:] == ['-m', 'launch.train', '--wait', '--distributed', '--workdir=a b']


@pytest.mark.slow
def test_a_slurm_job_of_two_real_processes_saves_and_goes_on(slurm, until_saved, tiny, tmp_path):
    start, folder = slurm
    run = tmp_path / 'run'
    flags = (*tiny, '--config.train.epochs=2000', f'--workdir={run}')
    job = start(*flags, JAX_PLATFORMS='cpu')
    until_saved(job, run)
    job.send_signal(signal.SIGTERM)  # B:TERM goes to the script's shell alone
    printed, _ = job.communicate(timeout=90)
    assert job.returncode == os.EX_TEMPFAIL, printed
    assert printed.count('stopped and saved') == 1
    assert (folder / 'queued').read_text() == 'requeue 42\n'


def test_jobset_starts_all_again_but_not_after_a_mistake():
    jobset = yaml.safe_load(JOBSET.read_text())
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    spec = jobset['spec']
    (slice_,) = spec['replicatedJobs']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'x'}}
    job |= {'spec': slice_['template']['spec']}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    template = job['spec']['template']['spec']
    assert template['terminationGracePeriodSeconds'] >= 60
    (container,) = template['containers']
    topology = template['nodeSelector']['cloud.google.com/gke-tpu-topology']
    chips = math.prod(int(side) for side in topology.split('x'))
    of_one = int(container['resources']['limits']['google.com/tpu'])
    assert job['spec']['parallelism'] == job['spec']['completions'] == chips // of_one
    assert '--distributed' in container['args'][0]

    def action(code=None, condition=None):
        """What JobSet does after a pod's end, by the messages of Kubernetes' Job controller."""
        for index, rule in enumerate(job['spec']['podFailurePolicy']['rules']):
            end = f'matching FailJob rule at index {index}'
            if code in rule.get('onExitCodes', {}).get('values', []):
                message = (
                    f'Container train for pod default/x-0-2 failed with exit code {code} {end}'
                )
            elif condition in [c['type'] for c in rule.get('onPodConditions', [])]:
                message = f'Pod default/x-0-2 has condition {condition} {end}'
            else:
                continue
            for wider in spec['failurePolicy']['rules']:
                if any(re.search(p, message) for p in wider['onJobFailureMessagePatterns']):
                    return wider['action']
        return 'RestartJobSet'  # counted

    assert action(2) == 'FailJobSet'
    assert action(75) == action(137, 'DisruptionTarget') == 'RestartJobSetAndIgnoreMaxRestarts'
    assert action(1) == action(137) == 'RestartJobSet'
    assert 0 < spec['failurePolicy']['maxRestarts'] < 100
    assert spec['failurePolicy']['restartStrategy'] == 'BlockingRecreate'


def test_shell_scripts_have_no_known_traps():
    scripts = sorted((ROOT / 'launch').glob('*.sh'))
    command = [Path(sys.prefix) / 'bin' / 'shellcheck', '-x', '-P', 'SCRIPTDIR', *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
