"""Run an ablation: every arm of an experiment with every seed, then the statistics and a report.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/wide --seeds=10 \\
      --config.data.train='train[:1000]'
  python -m launch.ablate --config=experiments/regularization.py --workdir=/shared/regularization \\
      --executor=ray --ray_address=auto --workers=16

The same command again runs what is missing. --config.KEY=VALUE overrides change every arm. The
work directory holds ablation.json, cells/, logs/, report.html, figures/, cost.json, and
summary.json, .csv and .tex.
"""

import ctypes
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from absl import flags

from cnn_jax.errors import UserError
from cnn_jax.runtime import cores
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir('Folder of the ablation; created if missing.')
SEEDS = flags.DEFINE_integer('seeds', 0, "How many seeds; 0: the experiment's own.", lower_bound=0)
WORKERS = flags.DEFINE_integer(
    'workers',
    0,
    'Processes that run cells; 0: one for each core, or one where there is a GPU or TPU.',
    lower_bound=0,
)
TOGETHER = flags.DEFINE_integer(
    'together',
    0,
    'Cells that a process trains at once, as one program on all its devices; 0: 1 on a CPU, up '
    'to 16 on a GPU or TPU.',
    lower_bound=0,
)
RETRY = flags.DEFINE_bool('retry_failed', False, 'Run failed cells again.')
EXECUTOR = flags.DEFINE_enum(
    'executor', 'local', ['local', 'ray'], 'Where workers run (ray: requirements-ray.txt).'
)
RAY_ADDRESS = flags.DEFINE_string(
    'ray_address', '', 'Of a Ray cluster that sees --workdir and this checkout; empty: start one.'
)
GPUS = flags.DEFINE_float('gpus', 0, 'GPUs that each Ray worker reserves; may be a fraction.')
TPUS = flags.DEFINE_float('tpus', 0, 'TPU chips that each Ray worker reserves.')
WORKER = flags.DEFINE_integer('worker', -1, 'Set by the launcher for its own processes.')

TOGETHER_ON_ACCELERATORS = 16


def main(_) -> int:
    """Run the ablation; returns the exit code."""
    from cnn_jax import runtime
    from cnn_jax.ablation.ledger import read_ledger
    from cnn_jax.ablation.plan import plan_of
    from cnn_jax.train.workdir import make_writable

    folder = Path(WORKDIR.value)
    config = cli.read_config(CONFIG)
    # One thread a cell: results then do not depend on the number of workers.
    threads = config.train.threads = config.train.threads or 1
    plan = plan_of(_experiment(), config, SEEDS.value)
    on_cpu = runtime.runs_on_cpu()
    workers = WORKERS.value or (max(1, cores() // threads) if on_cpu else 1)
    together = TOGETHER.value or (1 if on_cpu else TOGETHER_ON_ACCELERATORS)
    if WORKER.value >= 0:
        return _work(folder, plan, workers, together)
    make_writable(folder)
    if (folder / 'config.json').exists():
        raise UserError(f'{folder} holds a run of launch.train; choose another --workdir')
    if RETRY.value and (ledger := read_ledger(folder, plan)):
        ledger.forget_failed()
    # JAX is not started here: the devices are the workers'.
    print(runtime.configure(threads))
    _introduce(plan, workers, together)
    pool = _start_workers(folder, workers, threads)
    try:
        ledger = _watch(folder, plan, pool)
        if ledger is None:
            print('stopped; the same command goes on with the cells that are missing')
            return cli.STOPPED
        outputs = pool.outputs()
    finally:
        pool.stop()
    if len(outputs) < workers:
        print(f'{workers - len(outputs)} of {workers} workers died; {folder}/logs says why')
    return _conclude(ledger, outputs)


def _experiment():
    from ml_collections import config_flags

    path = config_flags.get_config_filename(flags.FLAGS['config'])
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _introduce(plan, workers: int, together: int) -> None:
    """Say what is compared, where, and what shares a compilation."""
    from cnn_jax.ablation.plan import by_structure

    print(
        f'{plan.name}: {len(plan.configs)} arms × {len(plan.seeds)} seeds on {workers} '
        f'worker{"s" * (workers > 1)}' + f', {together} cells at once in each' * (together > 1)
    )
    for arm, changes in plan.changes.items():
        told = ', '.join(f'{path}={value}' for path, value in changes.items())
        print(f'  {arm:<24} {told or "as it is"}')
    for arms in by_structure(plan):
        print(f'  one compilation: {", ".join(arms)}')


def _start_workers(folder: Path, workers: int, threads: int):
    """Start the workers by the executor that was chosen."""
    from cnn_jax.ablation.executors import LocalWorkers, RayWorkers

    command = [sys.executable, '-m', 'launch.ablate', *sys.argv[1:], f'--workers={workers}']
    if EXECUTOR.value == 'local':
        return LocalWorkers(command, workers, folder)
    return RayWorkers(
        command,
        workers,
        address=RAY_ADDRESS.value,
        cpus=threads,
        gpus=GPUS.value,
        tpus=TPUS.value,
    )


def _watch(folder: Path, plan, pool):
    """Show the cells as they are finished, here or elsewhere.

    Returns the ledger, or None when asked to stop.
    """
    from cnn_jax.ablation.ledger import read_ledger
    from cnn_jax.ablation.progress import Progress
    from cnn_jax.tools.progress import Interruption

    ledger = progress = None
    with Interruption() as interruption, ExitStack() as screen:
        going = True
        while going:
            time.sleep(0.2)
            if interruption.requested:  # the workers may have had the same signal
                break
            going = pool.running()
            if not progress and (ledger := read_ledger(folder, plan)):
                _tell_budgets(ledger.definition()['budgets'])
                progress = screen.enter_context(Progress(ledger))
            if progress:
                progress.update()
        return None if interruption.requested else ledger


def _tell_budgets(budgets: dict[str, str]) -> None:
    """A comparison is fair only when all arms may spend the same."""
    if len(set(budgets.values())) == 1:
        print(f'budget of every arm: {next(iter(budgets.values()))}')
    else:
        print('the arms have DIFFERENT budgets:')
        for arm, budget in budgets.items():
            print(f'  {arm:<24} {budget}')


def _work(folder: Path, plan, workers: int, together: int) -> int:
    """Run cells in this process."""
    from cnn_jax.ablation.runner import run_cells
    from cnn_jax.ablation.setup import open_ablation

    _end_with_the_launcher()
    threads = plan.configs[plan.baseline].train.threads
    if EXECUTOR.value == 'local':
        _pin(WORKER.value, workers, threads)
    settings = cli.start(threads)
    own = ('--worker=', '--workers=', '--retry')
    mine = [argument for argument in sys.argv[1:] if not argument.startswith(own)]
    command = shlex.join(['python', '-m', 'launch.ablate', *mine])
    ledger, data = open_ablation(folder, plan, settings, command)
    totals = run_cells(ledger, *data, start=WORKER.value, together=together)
    print(json.dumps(totals))
    return cli.OK


def _end_with_the_launcher() -> None:
    """Let the kernel end this worker when the process that started it ends, however it does."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _pin(number: int, workers: int, threads: int) -> None:
    """Give this worker cores of its own, one a thread, where the workers take all cores."""
    if not hasattr(os, 'sched_setaffinity'):  # macOS
        return
    mine = sorted(os.sched_getaffinity(0))
    if workers == len(mine) // threads > 1:  # fewer may have another launcher beside them
        os.sched_setaffinity(0, mine[number * threads : (number + 1) * threads])


def _conclude(ledger, outputs: list[str]) -> int:
    """Write the report and print what was found."""
    from cnn_jax.ablation.report import write_report
    from cnn_jax.ablation.summary import summarize

    report = write_report(ledger.folder)
    for arm in summarize(ledger.folder)['arms'].values():
        if arm['verdict']:
            print(arm['verdict']['sentence'])
    totals = [json.loads(text.splitlines()[-1]) for text in outputs]
    print(f'compilations of the training step: {sum(t["compilations"] for t in totals)}')
    print(f'report: {report}')
    if failed := [cell for cell in ledger.cells() if cell.status() == 'failed']:
        print(f'{len(failed)} cells failed; --retry_failed runs them again')
        return cli.FAILED
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
