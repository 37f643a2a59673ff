"""The workers of an ablation: processes of this machine, or tasks of a Ray cluster.

`python -m cnn_jax.ablation.workers --workdir=FOLDER --task=FILE --worker=N` is a worker; it takes
runs from the store in the work directory until none is left. Both kinds of workers are used alike:
`running`, `ended`, `stop`. When a worker dies the others take over its run; only the death of all
is an error. JAX is imported by the workers alone: the process that starts them needs no device.
"""

import ctypes
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.ablation import decisions
from cnn_jax.ablation.plan import Plan, budget, by_structure, code_digest
from cnn_jax.ablation.results import DEFINITION, FLOOR, Result, Run, Store, open_store
from cnn_jax.components import NO_COMPONENTS, Components, from_experiment
from cnn_jax.errors import RunFailed, UserError, printable, reason_of

RETRIES = 10  # of a Ray worker, for nodes that die
MISTAKE = 2  # a worker's exit code when the user must mend something
OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'  # in XLA's message
LIBC = ctypes.CDLL(None)  # loaded before any fork
WAIT = 0.5  # seconds between looks at runs that other processes have claimed


@dataclass(frozen=True)
class Task:
    """All that a worker must know."""

    plan: dict[str, Any]  # as JSON
    command: str  # that the user typed, for the report
    workers: int  # their number
    together: int  # the most runs that a process trains at once
    experiment: str  # the file that brings components; '' for none
    pinned: bool  # whether each worker has cores of its own


class Workers:
    """Workers that have been started; `LocalWorkers` and `RayWorkers` differ in where."""

    def results(self) -> list[tuple[int | None, str]]:
        """The exit code, None while it runs, and the output of each worker."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the workers; their unfinished runs are free again."""
        raise NotImplementedError

    def running(self) -> bool:
        """Tell whether any worker is still at work.

        Errors:
            UserError: A worker cannot work, for a reason that the user must mend.
            RunFailed: All have ended with errors.
        """
        results = self.results()
        lines = [(code, (text.strip().splitlines() or ['no output'])[-1]) for code, text in results]
        for code, line in lines:
            if code == MISTAKE:
                raise UserError(line.removeprefix('error: '))
        if all(code for code, _ in lines):
            code, line = lines[-1]
            raise RunFailed(f'every worker died, the last one with exit code {code}: {line}')
        return any(code is None for code, _ in lines)

    def ended(self) -> int:
        """The number of workers that ended well."""
        return sum(code == 0 for code, _ in self.results())


class LocalWorkers(Workers):
    """Processes of this machine; their output goes to the folder `logs`."""

    def __init__(self, command: list[str], workers: int, logs: Path):
        name = f'{socket.gethostname()}-{os.getpid()}'  # another launcher may use the folder
        self._logs = [logs / f'{name}-{number}.log' for number in range(workers)]
        self._processes = []
        for number, log in enumerate(self._logs):
            line = [*command, f'--worker={number}']
            with log.open('w') as file:
                process = subprocess.Popen(
                    line,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    preexec_fn=functools.partial(end_with_parent, os.getpid()),
                )
            self._processes.append(process)

    def results(self) -> list[tuple[int | None, str]]:
        codes = [process.poll() for process in self._processes]
        return [
            (code, '' if code is None else log.read_text(errors='replace'))
            for code, log in zip(codes, self._logs)
        ]

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()


def _environment() -> dict[str, str]:
    """The environment of a worker, which finds this package wherever it was imported from."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
    return os.environ | {'PYTHONPATH': os.pathsep.join(paths)}


class RayWorkers(Workers):
    """Ray tasks. All nodes must see the work directory and this checkout under the same paths.

    Ray starts a worker again when its process or its node dies; the run it had claimed is free
    again then, and finished ones are not repeated.
    """

    def __init__(self, command: list[str], workers: int, address: str = '', **reserved: float):
        try:
            import ray
        except ImportError as error:
            raise UserError(f'{error}; --executor=ray needs requirements-ray.txt') from error
        self._ray = ray
        ray.init(address=address or None, log_to_driver=False, include_dashboard=False)
        folder = str(Path.cwd())

        tpus = reserved.get('tpus')
        resources = {'TPU': tpus} if tpus else {}

        @ray.remote(
            num_cpus=reserved['cpus'],
            num_gpus=reserved.get('gpus', 0),
            resources=resources,
            max_retries=RETRIES,
        )
        def work(number: int) -> tuple[int, str]:
            line = [*command, f'--parent={os.getpid()}', f'--worker={number}']
            done = subprocess.run(
                line, cwd=folder, capture_output=True, text=True, errors='replace'
            )
            return done.returncode, done.stdout if done.returncode == 0 else done.stderr

        self._tasks = [work.remote(number) for number in range(workers)]

    def results(self) -> list[tuple[int | None, str]]:
        ended, _ = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        return [self._ray.get(task) if task in ended else (None, '') for task in self._tasks]

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()


def work(folder: Path, task: Task, worker: int) -> None:
    """Train runs in this process, a worker's, and print what was done."""
    from cnn_jax.tools.selfcheck import self_check

    plan = Plan.from_json(task.plan)
    if task.pinned:
        pin(worker, task.workers, plan.threads)
    settings = runtime.configure(plan.threads)
    self_check()
    components = from_experiment(task.experiment) if task.experiment else NO_COMPONENTS
    store, data = open_ablation(folder, plan, settings, task.command, components)
    cells = run_missing(store, data, start=worker, together=task.together, components=components)
    print(json.dumps({'cells': cells}))


def open_ablation(
    folder: Path,
    plan: Plan,
    settings: runtime.Settings,
    command: str,
    components: Components = NO_COMPONENTS,
) -> tuple[Store, Any]:
    """Open the data of an ablation and its store.

    Errors:
        UserError: The data cannot be opened, an arm cannot be trained on them, or the folder holds
            an ablation with other configs, data or code.
    """
    from cnn_jax.train import manifest, setup

    first = plan.configs[plan.baseline]
    data = setup.open_data(first, components=components, test=True)
    description = data.description
    facts = {
        'command': command,
        'manifest': manifest.manifest(first, settings, description),
        'budgets': {arm: budget(config, data.train.n) for arm, config in plan.configs.items()},
        'counts': {
            'pool': data.pool.n,
            'train': data.train.n,
            'validation': data.held_out.n if data.held_out else 0,
            'reserved': data.held_out.n if data.held_out and not data.validation else 0,
            'test': data.test.n,
            'classes': len(description['class_names']),
        },
    }
    if not (folder / DEFINITION).exists():
        _check_arms(plan, data, components)
        facts['notes'] = _notes(folder, plan, data, components)
    return open_store(folder, plan, provenance(plan, data, settings), facts), data


def provenance(plan: Plan, data: Any, settings: runtime.Settings) -> dict[str, str]:
    """The facts that the results of an ablation depend on besides the configs."""
    from cnn_jax.train import manifest

    machine = runtime.machine(settings)
    found = {
        'code': code_digest(),
        'training data': data.pool.fingerprint,
        'test data': data.test.fingerprint,
        **manifest.packages(),
        'convolutions': 'XLA' if machine['convolutions'] == 'XLA' else 'native',
        'devices': machine['devices'],
        'XLA_FLAGS': settings.xla_flags,
    }
    if not plan.threads:  # as many as the cores of this machine
        found['threads'] = str(settings.threads)
    return found


def _notes(folder: Path, plan: Plan, data: Any, components: Components) -> list[str]:
    """The lines about what was given and is not used; `skipped.csv` lists the images left out."""
    from cnn_jax.train import setup
    from cnn_jax.train.record import data_notes

    first = plan.configs[plan.baseline]
    notes = data_notes(folder, data.train, data.test) + setup.shared_images(first, data)
    channels, silent = data.description['image_shape'][-1], {}
    for arm, config in plan.configs.items():
        for phrase in (*cfg.unread(config, channels), *components.unread(config)):
            silent.setdefault(phrase, []).append(arm)
    for phrase, arms in silent.items():
        where = 'every arm'
        if len(arms) < len(plan.configs):  # what they share is for the others
            where = ', '.join(a for a in arms if any(p in phrase for p in plan.changes[a]))
        if where:
            notes.append(f'note: without effect in {where}: {phrase}')
    return notes


def _check_arms(plan: Plan, data: Any, components: Components) -> None:
    """Refuse a plan with an arm that cannot be trained on the data, before any is."""
    from cnn_jax.train import setup

    firsts, classes = (
        [group[0] for group in by_structure(plan)],
        len(data.description['class_names']),
    )
    if any(plan.ranges.values()) and plan.folds:
        raise UserError(
            'the ablation tunes, on images that other folds are tested on; leave out '
            'config.data.folds, or give values in place of ranges'
        )
    choosing = any(plan.ranges.values()) or any(c.train.patience for c in plan.configs.values())
    own = data.validation  # images of the source's, to hold out
    if choosing and own and own.fingerprint == data.test.fingerprint:
        raise UserError(
            'the images held out to choose by are the test images (there is a val/, but no test/); '
            'set config.data.validation=N, which holds out N of train/, and '
            'config.data.validation_share=0'
        )
    if 'top5' in plan.primaries and classes <= 5:
        raise UserError(f'the measure top5 needs more than 5 classes; the data have {classes}')
    least = data.train.n
    if plan.folds:
        least = min(least, data.pool.n - math.ceil(data.pool.n / plan.folds))
    for arm, config in plan.configs.items():
        try:
            if config.data.batch > least:
                raise UserError(f'config.data.batch is larger than its {least} images')
            own = setup.for_arm(config, data) if arm in firsts else data
            spec = setup.make_spec(config, own.description, own.weights, components)
            if arm in firsts:
                setup.make_programs(config, spec)
        except UserError as error:
            raise UserError(f'arm {arm!r}: {error}') from error


def run_missing(
    store: Store,
    data: Any,
    *,
    start: int = 0,
    together: int = 1,
    go_on: Callable[[], bool] = lambda: True,
    components: Components = NO_COMPONENTS,
) -> int:
    """Train every run that no other process has, until all have a result.

    Runs of one structure follow each other and share one compilation. A run that another process
    has claimed is waited for, and taken over if that process dies.

    Args:
        store: The runs.
        data: The opened data.
        start: The structure to begin with; several workers begin with different ones.
        together: The most runs that are trained together; fewer where memory is short.
        go_on: Called after each; False stops.
        components: Own parts of the runs.

    Returns:
        The number of runs that were trained here.
    """
    groups = by_structure(store.plan)
    shift = start % len(groups)
    structures = [
        _Structure(store, arms, data, together, components)
        for arms in groups[shift:] + groups[:shift]
    ]
    done, stopped = 0, False
    while decisions.missing(store) and not stopped:
        before = done
        for structure in structures:
            while not stopped and (count := structure.run_some()):
                done += count
                stopped = not go_on()
        if done == before:
            time.sleep(WAIT)
            stopped = not go_on()
    return done


class _Structure:
    """The arms that share one compilation."""

    def __init__(
        self, store: Store, arms: list[str], data: Any, together: int, components: Components
    ):
        self._store, self._arms, self._data = store, arms, data
        self._together, self._components = together, components
        self._compiled: Any = None

    def run_some(self) -> int:
        """Claim, train and record as many runs as are trained together; returns their number.

        Runs of one kind are trained together; those of the classifier of pixels are one by one.
        """
        missing = [run for run in decisions.missing(self._store) if run.arm in self._arms]
        with ExitStack() as claims:
            runs: list[Run] = []
            for run in missing:
                if runs and run.kind != runs[0].kind:
                    continue
                if claims.enter_context(self._store.claim(run)):
                    runs.append(run)
                if runs and len(runs) == self._width(runs[0].kind):
                    break
            results = self._train(runs) if runs else []
            for run, result in zip(runs, results):
                self._store.write(run, result)
        return len(runs)

    def _width(self, kind: str) -> int:
        """The number of runs to train together: as compiled, else so that all rounds are full.

        Whatever is missing: sums of more or fewer runs together have another rounding.
        """
        if kind == FLOOR:
            return 1
        if self._compiled:
            return self._compiled.together
        plan = self._store.plan
        count = sum(len(plan.points[arm]) or plan.looks[0] for arm in self._arms)
        return math.ceil(count / math.ceil(count / self._together))

    def _train(self, runs: list[Run]) -> list[Result]:
        """The results of claimed runs, all of one kind."""
        began = time.perf_counter()
        results: list[Result] = []
        try:
            results = self._results(runs)
        except (UserError, OSError):
            raise
        except Exception as error:  # which says nothing of the arm, as a diverging loss does
            arm, reason = runs[0].arm, reason_of(error)
            if OUT_OF_MEMORY not in str(error) and not isinstance(error, MemoryError):
                told = f'a run of arm {arm!r} raised {type(error).__name__}: {reason}'
                raise RunFailed(told) from error
            if len(runs) == 1:
                raise UserError(
                    f'a run of arm {arm!r} does not fit into the memory ({reason}); make room, or '
                    'lower config.data.batch, and rerun the same command'
                ) from error
        if not results:  # outside of `except`, which would keep the memory of what has failed
            return self._train_fewer(runs)
        for result in results:
            result['wall_seconds'] = (time.perf_counter() - began) / len(runs)
            result['classes'] = len(self._data.description['class_names'])
            result['examples'] = self._data.test.n
        return results

    def _results(self, runs: list[Run]) -> list[Result]:
        from cnn_jax.ablation.floor import train_floor
        from cnn_jax.ablation.training import compile_structure, train_runs

        data, kind, configs = self._data, runs[0].kind, [run.config for run in runs]
        if kind == FLOOR:
            return [train_floor(configs[0], data)]
        if not self._compiled:
            # Not a trial's own config: beyond an edge, a strength of 0 would be compiled out.
            config = self._store.plan.configs[runs[0].arm]
            self._compiled = compile_structure(config, data, len(runs), self._components)
        curves = self._store.plan.curves and kind == 'replicate'
        results = train_runs(configs, self._compiled, data, trial=kind == 'trial', curves=curves)
        return [{**each, 'together': self._compiled.together} for each in results]

    def _train_fewer(self, runs: list[Run]) -> list[Result]:
        """Train the same, half as many at a time, and so those that follow."""
        self._compiled, self._together = None, len(runs) // 2
        results = []
        while len(results) < len(runs):
            results += self._train(runs[len(results) :][: self._together])
        return results


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process when `parent`, which started it, ends, however it does.

    Local workers do so between fork and exec, so that no kill of their launcher is too early.
    """
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(MISTAKE)


def pin(number: int, workers: int, threads: int) -> None:
    """Give a worker cores of its own, one a thread, where the workers take all cores."""
    if not hasattr(os, 'sched_setaffinity'):  # macOS
        return
    mine = sorted(os.sched_getaffinity(0))
    if threads and workers == len(mine) // threads > 1:  # fewer may have others beside them
        os.sched_setaffinity(0, mine[number * threads : (number + 1) * threads])


def main() -> None:
    """Be a worker; an error's last line says what it was; a `UserError` is exit code 2."""
    options = dict(argument.lstrip('-').split('=', 1) for argument in sys.argv[1:])
    if 'parent' in options:
        end_with_parent(int(options['parent']))
    task = Task(**json.loads(Path(options['task']).read_text('utf-8')))
    try:
        work(Path(options['workdir']), task, int(options['worker']))
    except UserError as error:
        print(f'error: {printable(error)}', file=sys.stderr)
        sys.exit(MISTAKE)
    except Exception as error:
        traceback.print_exc()  # whose last line is JAX's, about its frames
        print(f'{type(error).__name__}: {printable(error)}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
