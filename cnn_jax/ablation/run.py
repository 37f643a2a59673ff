"""Running an ablation: in worker processes, on a Ray cluster, or in this process."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.ablation import decisions
from cnn_jax.ablation.plan import METRICS, Changes, Metric, Plan, by_structure, make_plan
from cnn_jax.ablation.report import Ablation
from cnn_jax.ablation.results import (
    DEFINITION,
    FOLDER,
    Run,
    Store,
    extended,
    read_store,
    refuse_links,
    why_failed,
)
from cnn_jax.ablation.workers import (
    LocalWorkers,
    RayWorkers,
    Task,
    open_ablation,
    pin,
    provenance,
    run_missing,
)
from cnn_jax.components import NO_COMPONENTS, Components, one_of
from cnn_jax.errors import UserError
from cnn_jax.files import make_writable, workdir_path
from cnn_jax.tools.page import number
from cnn_jax.tools.progress import Interruption
from cnn_jax.train.trackers import check as check_trackers

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
    workers: int | None = None,
    together: int = 0,
    retry_failed: bool = False,
    trackers: Sequence[str] = (),
    executor: str = 'local',
    ray: Mapping[str, Any] | None = None,
    command: str = '',
    components: Components | None = None,
    **study: Any,
) -> Ablation:
    """Tune every arm, train its replicates, compare it with its control, write the report.

    A replicate draws a training subset (`config.data.subset`), initial weights and order, the same
    for all arms. What the study tunes is chosen on held-out images (`config.data.validation`), for
    accuracy and loss each by itself; the test images are used once, at a replicate's end.

    The same call again trains only what is missing, and more seeds add to what is there. The
    work directory holds `ablation.json`, `cells/` (a result for each run), `logs/`, `report.html`,
    `figures/`, `cost.json`, `summary.json` and `summary.csv`.

    >>> images = Data(source='mnist_5k', train='train[:2500]', subset=500, validation=500)
    >>> arms = {'dropout': {'model.dropout': 0.25}, 'L2': {'loss.l2': log(1e-5, 1e-2)}}
    >>> tune = {'optimizer.learning_rate': log(3e-4, 3e-2)}
    >>> result = ablate(arms, Config(data=images), tune=tune, workdir='runs/regularizers')
    >>> result.verdicts['dropout']
    'dropout: accuracy better, +0.9 points (0.3 to 1.5); …'

    Args:
        arms: The changes of each arm to the baseline, `{name: {config path: value}}`; an arm
            without changes is the baseline, and one of that name is added where there is none. A
            value may be a range to tune, `log(low, high)` or `linear(low, high)`. Or a `Plan`,
            which an experiment file gives.
        baseline: The config that the arms change.
        model, train, eval, optimizer, regularizers: Own parts of the runs, as `fit` takes them.
        workdir: Folder of the ablation; created if missing.
        workers: Worker processes; 0 trains in this process, as is the default on an accelerator
            and where own parts are given. On a CPU the default is one for each core.
        together: The most runs that a process trains at once as one program on all its devices;
            0: 1 on a CPU, up to 16 on an accelerator.
        retry_failed: True to repeat failed runs.
        trackers: Where else to log each replicate when all have ended: `tensorboard` (its HParams,
            in the folder `tracked`), `wandb`, `mlflow`.
        executor, ray: `local`, or `ray` with the options `address`, `gpus`, `tpus`.
        command: The command that the user typed, for the report.
        components: Own parts as one object.
        study: Arguments of `cnn_jax.ablation.plan.make_plan`: `seeds`, `until_decided`, `tune`,
            `trials`, `widen`, `primaries`, `margins`, `against`, `factors`, `curves`, `floor`,
            `name`, `question`.

    Errors:
        UserError: An arm is not a valid config, the data cannot be opened, or the folder holds
            another ablation.
        RunFailed: Every worker died.
    """
    components = one_of(components, model, train, eval, optimizer, regularizers)
    check_trackers(trackers)
    on_cpu = runtime.runs_on_cpu()
    here = components != NO_COMPONENTS and not components.experiment
    if here and (workers or executor != 'local'):
        raise UserError(
            'own parts that are given as Python objects live in this process; leave out workers '
            'and executor, or bring the parts by an experiment file'
        )
    if workers is None and executor == 'local' and (here or not on_cpu):
        workers = 0
    if isinstance(arms, Plan):
        if baseline or study:
            raise UserError('the plan says what the baseline and the study are; leave them out')
        plan = arms
    else:
        if not isinstance(baseline, cfg.Config | None):
            raise UserError(f'baseline must be a cnn_jax.Config, not {type(baseline).__name__}')
        config = components.mark(baseline or cfg.Config())
        if workers != 0:  # one thread a run: results do not depend on the number of workers
            config = cfg.replace(config, {'train.threads': config.train.threads or 1})
        plan = make_plan(_with_baseline(arms), config, **study)
    if workers is None:
        workers = max(1, runtime.cores() // (plan.threads or runtime.cores()))
    folder = Path(workdir_path(workdir))
    make_writable(folder)
    refuse_links(folder)
    if (folder / 'config.json').exists():
        raise UserError(f'{folder} holds a run of launch.train; choose another --workdir')
    if retry_failed and (folder / DEFINITION).exists():
        read_store(folder).retry_failed()
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
        result.log_to(trackers)
    return result


def repeat(
    folder: Path, arm: str, seed: int | None, tell: Callable[[str, str], object]
) -> tuple[bool, list[str]]:
    """Train a replicate of a finished ablation again, and compare bit for bit.

    It is two runs where accuracy and loss have chosen different settings.

    Args:
        folder: The work directory.
        arm, seed: Which replicate; '' and None for the first of the baseline.
        tell: Called with what was compared, and how it differs ('': not at all).

    Returns:
        Whether nothing differs; what has changed since the ablation began.

    Errors:
        UserError: There is no such replicate, or the data cannot be had.
    """
    store = read_store(folder)
    plan, arm = store.plan, arm or store.plan.baseline
    seed = plan.first_seed if seed is None else seed
    if arm not in plan.configs or seed not in plan.seeds:
        raise UserError(
            f'{folder} has no replicate of arm {arm!r} with seed {seed}; the arms are '
            f'{", ".join(plan.configs)}, the seeds {plan.seeds[0]} to {plan.seeds[-1]}'
        )
    kept = {run: store.result(run) for run in store.replicates(arm, seed - plan.first_seed)}
    if not kept or any(each is None or why_failed(each) for each in kept.values()):
        raise UserError(f'seed {seed} of {arm!r} is not trained; run launch.ablate to its end')
    if plan.configs[arm].own:
        raise UserError('this ablation has own parts, which its work directory does not hold')
    settings = runtime.configure(plan.threads)

    from cnn_jax.ablation.training import compile_structure, train_runs
    from cnn_jax.tools.selfcheck import self_check
    from cnn_jax.train.setup import open_data

    self_check()
    print(settings)
    pin(0, runtime.cores(), plan.threads)
    data = open_data(plan.configs[plan.baseline], test=True)
    now = provenance(plan, data, settings)
    changed = [name for name, value in now.items() if store.provenance.get(name) != value]
    for name in changed:
        print(f'changed since the ablation began: {name}')
    same = True
    for run, before in kept.items():
        assert before
        compiled = compile_structure(plan.configs[arm], data, before.get('together', 1))
        [after] = train_runs([run.config], compiled, data, curves=False)
        point = f' ({_listed(store.points(arm)[run.trial])})' if len(kept) > 1 else ''
        for what, name in (('metrics', 'metrics'), ('hits', 'correct'), ('losses', 'losses')):
            equal = before[name] == after.get(name)
            same &= equal
            tell(f'{what} of {arm}, seed {seed}{point}', '' if equal else 'other bits')
    return same, changed


def _with_baseline(arms: Mapping[str, Changes]) -> dict[str, Changes]:
    """The arms with the one that changes nothing in front; added where there is none."""
    if not isinstance(arms, Mapping):
        raise UserError('the arms must be {name: {config path: value}}')
    unchanged: dict[str, Changes] = {arm: {} for arm, changes in arms.items() if not changes}
    return {**(unchanged or {'baseline': {}}), **arms}


def _introduction(plan: Plan, workers: int, together: int) -> str:
    """The arms, where they are trained, and which share a compilation."""
    place = f'{workers} worker{"s" if workers > 1 else ""}' if workers else 'this process'
    at_once = f', up to {together} runs at once in each' if together > 1 else ''
    counts = f'{plan.looks[-1]} replicates'
    if len(plan.looks) > 1:
        counts = f'{", ".join(map(str, plan.looks[:-1]))} or {counts}'
    lines = [f'{plan.name}: {len(plan.configs)} arms, {counts}, in {place}{at_once}']
    for arm, changes in plan.changes.items():
        listed = [f'{path}={value}' for path, value in changes.items()]
        listed += [f'{path} tuned from {each}' for path, each in plan.ranges[arm].items()]
        lines.append(f'  {arm:<24} {", ".join(listed) or "no changes"}')
    if any(plan.ranges.values()):
        final = f'the best {plan.finalists} by each measure with {len(plan.tuning)} replicates'
        wider = f', up to {plan.widen} more beyond an edge' if plan.widen else ''
        lines.append(f'tuning: {plan.trials} trials of each arm{wider}, {final}')
    lines += [f'  one compilation: {", ".join(arms)}' for arms in by_structure(plan)]
    return '\n'.join(lines)


def _run_in_workers(folder: Path, plan: Plan, task: Task, ray: dict[str, Any] | None) -> bool:
    """Start the workers and follow them to their end; False if asked to stop before it."""
    logs = folder / 'logs'
    logs.mkdir(exist_ok=True)
    path = logs / f'task-{time.time_ns()}.json'
    path.write_text(json.dumps(asdict(task)), 'utf-8')
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
                if not progress and (folder / DEFINITION).exists():
                    store = read_store(folder)
                    store = replace(store, plan=extended(store.plan, plan))
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
        self._store = store
        self._finished: set[Run] = set()
        self._told: set[str] = set()
        self._files = -1
        self._began = time.perf_counter()
        self._before = len(self._new(decisions.due(store)))

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
            print(f'{self._before} runs were done before')
        return self

    def __exit__(self, *_):
        self.update()

    def update(self) -> None:
        """Print what was finished since the last call."""
        files = len([*(self._store.folder / FOLDER).glob('[!.]*.json')])
        if files == self._files:  # asked five times a second, beside the workers
            return
        self._files = files
        due = decisions.due(self._store)
        new, total = self._new(due), len(due) + decisions.waiting(self._store)
        for count, run in enumerate(new, len(self._finished) - len(new) + 1):
            print(f'[{count}/{total}] {self._line(run)}, {self._left(total)}', flush=True)
        plan = self._store.plan
        for arm, judge in itertools.product(plan.configs if new else (), plan.judges):
            choice = self._store.choice(arm, judge)
            line = f'{arm}: tuned for {METRICS[judge].title}'
            if choice and choice.point and line not in self._told:
                self._told.add(line)
                edge = f', at the edge: {", ".join(choice.at_edge)}' if choice.at_edge else ''
                print(f'{line} to {_listed(choice.point)}{edge}', flush=True)

    def _new(self, due: list[Run]) -> list[Run]:
        new = [run for run in due if run not in self._finished and self._store.result(run)]
        self._finished.update(new)
        return new

    def _line(self, run: Run) -> str:
        """The result of a run; of a replicate with the means of its arm so far."""
        result, plan = self._store.result(run), self._store.plan
        assert result is not None
        if run.kind == 'trial':
            point = self._store.points(run.arm)[run.trial]
            measures, split = plan.judges, 'validation'
            start = f'{run.arm}, trial {run.trial} ({_listed(point)})'
        else:
            name = run.arm if run.kind == 'replicate' else f'{run.arm}, {run.kind}'
            read = [m for m in plan.primaries if run == self._read(run, m)]
            measures, split = read or plan.primaries[:1], 'test'
            start = f'{name}, seed {run.seed}'
        if reason := why_failed(result):
            return f'{start}: FAILED: {reason}'
        parts = []
        for metric in map(METRICS.__getitem__, measures):
            value = result['metrics'][split].get(metric.name)
            parts.append(
                f'{metric.title} {number(value and value * metric.scale, 2)}{metric.suffix}'
            )
        if run.kind == 'replicate':
            parts[0] += self._means(run.arm, METRICS[measures[0]])
        line = f'{start}: {split} {", ".join(parts)}'
        return f'{line}, {result["wall_seconds"]:.1f} s'

    def _read(self, run: Run, measure: str) -> Run | None:
        """The run that a measure of this run's replicate is read off."""
        return self._store.replicate(run.arm, run.seed - self._store.plan.first_seed, measure)

    def _means(self, arm: str, metric: Metric) -> str:
        """The mean of an arm's replicates so far, and of its differences from its control."""
        plan = self._store.plan
        own = decisions.values(self._store, arm, metric.name)
        text = f' (mean of {np.isfinite(own).sum()}: {_mean_sd(own, metric.scale)}'
        if arm in plan.against:
            control = plan.against[arm]
            pairs = own - decisions.values(self._store, control, metric.name)
            if np.isfinite(pairs).any():
                text += f', against {control}: {_mean_sd(pairs, metric.scale, signed=True)}'
        return text + ')'

    def _left(self, total: int) -> str:
        """The time left of what is known to be needed, at the speed since the start."""
        here = len(self._finished) - self._before
        if not here:
            return 'time left unknown yet'
        each = (time.perf_counter() - self._began) / here
        minutes, seconds = divmod(round(each * (total - len(self._finished))), 60)
        return f'{minutes} min {seconds:02d} s left'


def _listed(point: Mapping[str, float]) -> str:
    return ', '.join(f'{path}={each:.3g}' for path, each in point.items())


def _mean_sd(sample: np.ndarray, scale: float, signed: bool = False) -> str:
    """`97.12 ± 0.40` of the finite numbers, the standard deviation only of two or more."""
    sample = sample[np.isfinite(sample)] * scale
    mean = number(float(sample.mean()), 2, signed)
    return mean if len(sample) < 2 else f'{mean} ± {number(float(sample.std(ddof=1)), 2)}'
