"""Running an ablation: in worker processes, on a Ray cluster, or in this process."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.ablation.plan import METRICS, Changes, Plan, by_structure, make_plan, number
from cnn_jax.ablation.report import Ablation
from cnn_jax.ablation.results import Result, Run, Store, read_store, refuse_links
from cnn_jax.ablation.workers import LocalWorkers, RayWorkers, Task, open_ablation, run_missing
from cnn_jax.components import NO_COMPONENTS, Components, from_objects
from cnn_jax.errors import UserError
from cnn_jax.files import make_writable
from cnn_jax.tools.progress import Interruption

TOGETHER_ON_ACCELERATORS = 16


def ablate(
    arms: Mapping[str, Changes] | Plan,
    baseline: cfg.Config | None = None,
    *,
    model: Any = None,
    train: Any = None,
    eval: Any = None,
    optimizer: Any = None,
    regularizers: Sequence[Any] = (),
    workdir: str | Path,
    seeds: int = 5,
    metric: str = 'accuracy',
    name: str = 'ablation',
    question: str = '',
    workers: int | None = None,
    together: int = 0,
    retry_failed: bool = False,
    executor: str = 'local',
    ray: Mapping[str, Any] | None = None,
    command: str = '',
    components: Components | None = None,
) -> Ablation:
    """Train every arm with every seed, compare the arms with the baseline, write the report.

    The same call again trains only what is missing, and more seeds add to what is there. The
    work directory holds `ablation.json`, `cells/` (a result for each run), `logs/`, `report.html`,
    `figures/`, `cost.json`, `summary.json` and `summary.csv`.

    >>> config = Config(data=Data(source='mnist_5k', train='train[:500]', eval='test'))
    >>> arms = {'dropout': {'model.dropout': 0.25}, 'L2': {'loss.l2': 5e-4}}
    >>> result = ablate(arms, baseline=config, seeds=20, workdir='runs/regularizers')
    >>> result.verdicts['dropout']
    'dropout: +0.4 percentage points, 95% CI …'

    Args:
        arms: The changes of each arm to the baseline, `{name: {config path: value}}`; an arm
            without changes is the baseline, and one of that name is added where there is none.
            Or a `Plan`, which an experiment file gives.
        baseline: The config that the arms change.
        model, train, eval, optimizer, regularizers: Own parts of the runs, as `fit` takes them.
        workdir: Folder of the ablation; created if missing.
        seeds: Number of seeds; each arm is trained once with each.
        metric: The metric that is compared: accuracy, top5, calibration_error or loss.
        name, question: Headings of the report.
        workers: Worker processes; 0 trains in this process, as is the default on an accelerator
            and where own parts are given. On a CPU the default is one for each core.
        together: The most runs that a process trains at once as one program on all its devices;
            0: 1 on a CPU, up to 16 on an accelerator.
        retry_failed: True to repeat failed runs.
        executor, ray: `local`, or `ray` with the options `address`, `gpus`, `tpus`.
        command: The command that the user typed, for the report.
        components: Own parts as one object.

    Errors:
        UserError: An arm is not a valid config, the data cannot be opened, or the folder holds
            another ablation.
        RunFailed: Every worker died.
    """
    if components is None:
        components = from_objects(model, train, eval, optimizer, regularizers)
    on_cpu = runtime.runs_on_cpu()
    here = components != NO_COMPONENTS and not components.experiment
    if here and (workers or executor != 'local'):
        raise UserError(
            'own parts that are given as Python objects live in this process; leave out workers '
            'and executor, or bring the parts by an experiment file'
        )
    if workers is None and (here or not on_cpu):
        workers = 0
    if isinstance(arms, Plan):
        plan = arms
    else:
        config = components.mark(baseline or cfg.Config())
        if workers != 0:  # one thread a run: results do not depend on the number of workers
            config = cfg.replace(config, {'train.threads': config.train.threads or 1})
        options = {'seeds': seeds, 'metric': metric, 'name': name, 'question': question}
        plan = make_plan(_with_baseline(arms), config, **options)
    if workers is None:
        workers = max(1, runtime.cores() // plan.threads)
    workers = min(workers, len(plan.configs) * len(plan.seeds))
    folder = Path(workdir)
    make_writable(folder)
    refuse_links(folder)
    if (folder / 'config.json').exists():
        raise UserError(f'{folder} holds a run of launch.train; choose another --workdir')
    if retry_failed and (store := read_store(folder, plan)):
        store.retry_failed()
    together = together or (1 if on_cpu else TOGETHER_ON_ACCELERATORS)
    settings = runtime.configure(plan.threads)  # starts no JAX: the devices are the workers'
    print(settings)
    print(_introduction(plan, workers, together))
    if workers:
        local = executor == 'local'
        task = Task(plan.to_json(), command, workers, together, components.experiment, local)
        options = dict(ray or {}, cpus=plan.threads) if executor == 'ray' else None
        finished = _run_in_workers(folder, plan, task, options)
    else:
        finished = _run_here(folder, plan, settings, command, together, components)
    result = Ablation(folder, interrupted=not finished)
    if finished:
        result.write_report()
    return result


def _with_baseline(arms: Mapping[str, Changes]) -> dict[str, Changes]:
    """The arms with the one that changes nothing in front; added where there is none."""
    unchanged: dict[str, Changes] = {arm: {} for arm, changes in arms.items() if not changes}
    return {**(unchanged or {'baseline': {}}), **arms}


def _introduction(plan: Plan, workers: int, together: int) -> str:
    """The arms, where they are trained, and which share a compilation."""
    place = f'{workers} worker{"s" if workers > 1 else ""}' if workers else 'this process'
    at_once = f', up to {together} runs at once in each' if together > 1 else ''
    lines = [f'{plan.name}: {len(plan.configs)} arms × {len(plan.seeds)} seeds in {place}{at_once}']
    for arm, changes in plan.changes.items():
        listed = ', '.join(f'{path}={value}' for path, value in changes.items())
        lines.append(f'  {arm:<24} {listed or "no changes"}')
    lines += [f'  one compilation: {", ".join(arms)}' for arms in by_structure(plan)]
    return '\n'.join(lines)


def _run_in_workers(folder: Path, plan: Plan, task: Task, ray: dict[str, Any] | None) -> bool:
    """Start the workers and follow them to their end; False if asked to stop before it."""
    logs = folder / 'logs'
    logs.mkdir(exist_ok=True)
    path = logs / f'task-{time.time_ns()}.json'
    path.write_text(json.dumps(asdict(task)))
    module = 'cnn_jax.ablation.workers'
    command = [sys.executable, '-m', module, f'--workdir={folder}', f'--task={path}']
    if ray is None:
        pool = LocalWorkers(command, task.workers, logs)
    else:
        pool = RayWorkers(command, task.workers, **ray)
    try:
        with Interruption() as interruption, ExitStack() as screen:
            progress, going = None, True
            while going:
                time.sleep(0.2)
                if interruption.requested:  # the workers may have had the same signal
                    return False
                going = pool.running()
                if not progress and (store := read_store(folder, plan)):
                    progress = screen.enter_context(Progress(store))
                if progress:
                    progress.update()
        died = task.workers - pool.ended()
    finally:
        pool.stop()
        path.unlink(missing_ok=True)
    if died:
        print(f'{died} of {task.workers} workers died; see {logs}')
    return True


def _run_here(
    folder: Path,
    plan: Plan,
    settings: runtime.Settings,
    command: str,
    together: int,
    components: Components,
) -> bool:
    """Train all runs in this process; False if asked to stop."""
    from cnn_jax.tools.selfcheck import self_check

    self_check()
    store, data = open_ablation(folder, plan, settings, command, components)
    with Interruption() as interruption, Progress(store) as progress:

        def after_each() -> bool:
            progress.update()
            return not interruption.requested

        run_missing(store, data, together=together, go_on=after_each, components=components)
    return not interruption.requested


class Progress:
    """The progress of an ablation, whoever trains: a line for each run that ends.

    Use as a context manager.
    """

    def __init__(self, store: Store):
        self._store, self._metric = store, METRICS[store.plan.metric]
        self._results: dict[Run, Result] = {}
        self._began = time.perf_counter()
        self._before = len(self._read_new())

    def __enter__(self):
        definition = self._store.definition()
        budgets = definition['budgets']
        for note in definition.get('notes', ()):
            print(note)
        bare = {budget.partition(';')[0] for budget in budgets.values()}  # without notes
        if len(bare) > 1:  # then the comparison is not fair
            print('the arms have DIFFERENT budgets:')
        else:
            print(f'budget of every arm: {bare.pop()}')
        for arm, each in budgets.items():
            if ';' in each or bare:
                print(f'  {arm:<24} {each}')
        if self._before:
            print(f'{self._before} of {len(self._store.runs)} runs were done before')
        return self

    def __exit__(self, *_):
        self.update()

    def update(self) -> None:
        """Print what was finished since the last call."""
        new = self._read_new()
        for count, run in enumerate(new, len(self._results) - len(new) + 1):
            print(f'[{count}/{len(self._store.runs)}] {self._line(run)}', flush=True)

    def _read_new(self) -> list[Run]:
        new = [run for run in self._store.runs if run not in self._results and run.path.exists()]
        self._results |= {run: run.result() for run in new}
        return new

    def _values(self, arm: str) -> dict[int, float]:
        return {
            run.seed: each['metrics']['eval'].get(self._metric.name, math.nan)
            for run, each in self._results.items()
            if run.arm == arm and each['status'] == 'done'
        }

    def _line(self, run: Run) -> str:
        """The result of a run, with the mean of its arm and of its differences so far."""
        result, metric, baseline = self._results[run], self._metric, self._store.plan.baseline
        start, left = f'{run.arm}, seed {run.seed}:', self._left()
        if result['status'] != 'done':
            return f'{start} FAILED: {result["reason"]}, {left}'
        values, reference = self._values(run.arm), self._values(baseline)
        pairs = [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
        means = f'mean of {len(values)}: {_mean_sd(list(values.values()), metric.scale)}'
        if pairs and run.arm != baseline:
            means += f', against {baseline}: {_mean_sd(pairs, metric.scale, signed=True)}'
        value = f'{number(values[run.seed] * metric.scale, 2)}{metric.suffix}'
        seconds = f'{result["wall_seconds"]:.1f} s'
        return f'{start} {metric.title} {value} ({means})  {seconds}, {left}'

    def _left(self) -> str:
        """The time left, if the rest runs as fast as since the start."""
        here, total = len(self._results) - self._before, len(self._store.runs)
        if not here:
            return 'time left unknown yet'
        each = (time.perf_counter() - self._began) / here
        minutes, seconds = divmod(round(each * (total - len(self._results))), 60)
        return f'{minutes} min {seconds:02d} s left'


def _mean_sd(sample: list[float], scale: float, signed: bool = False) -> str:
    """`97.12 ± 0.40`, the standard deviation only of two or more."""
    mean = number(float(np.mean(sample)) * scale, 2, signed)
    if len(sample) < 2:
        return mean
    return f'{mean} ± {number(float(np.std(sample, ddof=1)) * scale, 2)}'
