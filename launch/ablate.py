"""Run an ablation: every arm of an experiment with every seed, then the statistics and a report.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/wide --seeds=10 \\
      --config.data.train='train[:1000]'
  python -m launch.ablate --config=experiments/regularization.py --workdir=/shared/regularization \\
      --executor=ray --ray_address=auto --workers=16

The same command again runs what is missing. --config.KEY=VALUE overrides change every arm. The
work directory holds ablation.json, cells/, summary.json, summary.csv and report.html.
"""

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

from absl import flags

from cnn_jax.errors import UserError
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir('Folder of the ablation; created if missing.')
SEEDS = flags.DEFINE_integer('seeds', 0, "How many seeds; 0: the experiment's own.", lower_bound=0)
WORKERS = flags.DEFINE_integer(
    'workers', 0, 'Processes, one core each; 0: one for each core.', lower_bound=0
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


def main(_) -> int:
    """Run the ablation; returns the exit code."""
    from cnn_jax import runtime
    from cnn_jax.ablation.plan import plan_of

    folder = Path(WORKDIR.value)
    config = cli.read_config(CONFIG)
    # One thread a cell: results then do not depend on the number of workers.
    config.train.threads = config.train.threads or 1
    plan = plan_of(_experiment(), config, SEEDS.value)
    workers = WORKERS.value or runtime.cores() // config.train.threads or 1
    if WORKER.value >= 0:
        _end_with_the_launcher()
        if EXECUTOR.value == 'local':
            _pin(WORKER.value, workers)
    settings = cli.start(config.train.threads)
    ledger, data = _open(folder, plan, settings)
    if WORKER.value >= 0:
        return _work(ledger, data, WORKER.value)
    if RETRY.value:
        ledger.forget_failed()
    print(settings)
    _introduce(plan, workers)
    pool = _workers(ledger, workers, config.train.threads)
    try:
        if not _watch(ledger, pool):
            print('stopped; the same command goes on with the cells that are missing')
            return cli.STOPPED
        outputs = pool.outputs()
    finally:
        pool.stop()
    return _conclude(ledger, folder, outputs)


def _experiment():
    from ml_collections import config_flags

    path = config_flags.get_config_filename(flags.FLAGS['config'])
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open(folder: Path, plan, settings):
    """The ledger and the decoded data."""
    from cnn_jax import config as cfg
    from cnn_jax import runtime
    from cnn_jax.ablation.ledger import open_ledger
    from cnn_jax.ablation.plan import code_digest
    from cnn_jax.data.batches import DeviceBatches
    from cnn_jax.data.memory import load
    from cnn_jax.data.source import open_split
    from cnn_jax.train import record, setup, workdir

    workdir.make_writable(folder)
    first = plan.configs[plan.baseline]
    for arm, config in plan.configs.items():
        if config.data != first.data:
            raise UserError(f'arm {arm!r} changes config.data; all arms must see the same images')
    splits = {
        which: load(open_split(first.data, which), first.data.resize, first.data.size,
                    first.data.channels)
        for which in ('train', 'eval')
    }  # fmt: skip
    train, evaluation = (
        DeviceBatches(arrays, batch=first.data.batch) for arrays in splits.values()
    )
    description = setup.describe(first, train, evaluation)
    description['preprocessing'] = setup.preprocessing(first, train, setup.load_weights(first))
    machine = runtime.machine(settings)
    manifest = record.manifest(cfg.content_hash(first), machine, description)
    identity = {
        'code': code_digest(),
        'training data': description['train']['fingerprint'],
        'evaluation data': description['eval']['fingerprint'],
        'jaxlib': runtime.jaxlib_version(),
        'devices': runtime.devices(),
        'XLA_FLAGS': settings.xla_flags,
    }
    command = 'python -m launch.ablate ' + ' '.join(
        a for a in sys.argv[1:] if not a.startswith(('--worker=', '--workers=', '--retry'))
    )
    facts = {'command': command, 'manifest': manifest}
    return open_ledger(folder, plan, identity, facts), (description, *splits.values())


def _work(ledger, data, number: int) -> int:
    """Run cells in this process, on a core of its own."""
    from cnn_jax.ablation.runner import run_cells

    totals = run_cells(ledger, *data, tell=lambda *_: None, start=number)
    print(json.dumps(totals))
    return cli.OK


def _introduce(plan, workers: int) -> None:
    from cnn_jax.ablation.plan import by_structure

    print(f'{plan.name}: {len(plan.configs)} arms × {len(plan.seeds)} seeds on {workers} workers')
    for arms in by_structure(plan):
        print(f'  one compilation: {", ".join(arms)}')
    for arm, config in plan.configs.items():
        changes = ', '.join(f'{k}={v}' for k, v in plan.changes[arm].items()) or 'as it is'
        print(f'  {arm:<24} {config.train.epochs:g} epochs of {config.data.batch}  {changes}')


def _workers(ledger, workers: int, threads: int):
    """Start the workers by the executor that was chosen."""
    from cnn_jax.ablation.executors import LocalWorkers, RayWorkers

    command = [sys.executable, '-m', 'launch.ablate', *sys.argv[1:], f'--workers={workers}']
    if EXECUTOR.value == 'local':
        return LocalWorkers(command, workers, ledger.folder)
    return RayWorkers(
        command,
        workers,
        address=RAY_ADDRESS.value,
        cpus=threads,
        gpus=GPUS.value,
        tpus=TPUS.value,
    )


def _watch(ledger, pool) -> bool:
    """Show the cells as they are finished; False when asked to stop."""
    from cnn_jax.train.interruption import Interruption

    cells = ledger.cells()
    waiting = [cell for cell in cells if not cell.path.exists()]
    began, total = time.perf_counter(), len(waiting)
    if total < len(cells):
        print(f'{len(cells) - total} of {len(cells)} cells are done already')
    with Interruption() as interruption:
        going = True
        while going and not interruption.requested:
            time.sleep(0.2)
            going = pool.running()
            for cell in [cell for cell in waiting if cell.path.exists()]:
                waiting.remove(cell)
                _tell(ledger, cell, len(cells) - len(waiting), total - len(waiting), began)
        return not interruption.requested


def _end_with_the_launcher() -> None:
    """Let the kernel end this worker when the process that started it ends, however it does."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _pin(number: int, workers: int) -> None:
    """Give this worker a core of its own where there is one for each."""
    if not hasattr(os, 'sched_setaffinity'):  # macOS
        return
    cores = sorted(os.sched_getaffinity(0))
    if 1 < workers <= len(cores):
        os.sched_setaffinity(0, {cores[number]})


def _tell(ledger, cell, done: int, here: int, began: float) -> None:
    result = json.loads(cell.path.read_text())
    total = len(ledger.plan.configs) * len(ledger.plan.seeds)
    left = (time.perf_counter() - began) / here * (total - done)
    if result['status'] == 'done':
        metric = ledger.plan.metric
        text = f'{metric} {result["metrics"]["eval"][metric]:.4f}  {result["wall_seconds"]:.1f} s'
    else:
        text = f'FAILED: {result["reason"]}'
    print(f'[{done}/{total}] {cell.arm}, seed {cell.seed}: {text}  ({left:.0f} s left)', flush=True)


def _conclude(ledger, folder: Path, outputs: list[str]) -> int:
    from cnn_jax.ablation.report import write_report
    from cnn_jax.ablation.summary import summarize

    report = write_report(folder)
    for arm, found in summarize(folder)['arms'].items():
        if arm != ledger.plan.baseline:
            print(found['verdict']['sentence'])
    states = [cell.status() for cell in ledger.cells()]
    totals = [json.loads(text.splitlines()[-1]) for text in outputs]
    print(f'compilations of the training step: {sum(t["compilations"] for t in totals)}')
    print(f'report: {report}')
    if failed := states.count('failed'):
        print(f'{failed} cells failed; --retry_failed runs them again')
        return cli.FAILED
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
