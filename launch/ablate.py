"""Run an ablation: every arm of an experiment with every seed, then the statistics and a report.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/wide --seeds=10 \\
      --config.data.train='train[:1000]'

The same command again runs what is missing. --config.KEY=VALUE overrides change every arm. The
work directory holds ablation.json, cells/, summary.json, summary.csv and report.html.
"""

import importlib.util
import json
import os
import subprocess
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
WORKER = flags.DEFINE_integer('worker', -1, 'Set by the launcher for its own processes.')


def main(_) -> int:
    """Run the ablation; returns the exit code."""
    from cnn_jax.ablation.plan import plan_of

    folder = Path(WORKDIR.value)
    config = cli.read_config(CONFIG)
    # One thread a cell: results then do not depend on the number of workers.
    config.train.threads = config.train.threads or 1
    plan = plan_of(_experiment(), config, SEEDS.value)
    workers = WORKERS.value or len(os.sched_getaffinity(0)) // config.train.threads or 1
    if WORKER.value >= 0:
        _pin(WORKER.value, workers)
    settings = cli.start(config.train.threads)
    ledger, data = _open(folder, plan, settings)
    if WORKER.value >= 0:
        return _work(ledger, data, WORKER.value)
    if RETRY.value:
        ledger.forget_failed()
    print(settings)
    _introduce(plan, workers)
    _run_workers(ledger, workers)
    return _conclude(ledger, folder)


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
    from cnn_jax.train import record, setup

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
    machine = {
        'devices': runtime.devices(),
        'python': runtime.python_version(),
        **vars(settings),
    }
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


def _run_workers(ledger, workers: int) -> None:
    """Start the workers, show what gets done, and wait; stop them when asked to stop."""
    processes = []
    for number in range(workers):
        log = (ledger.folder / f'worker-{number}.log').open('w')
        processes.append(
            subprocess.Popen(
                [
                    *(sys.executable, '-m', 'launch.ablate', *sys.argv[1:]),
                    *(f'--workers={workers}', f'--worker={number}'),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    cells = ledger.cells()
    waiting = [cell for cell in cells if not cell.path.exists()]
    began, total = time.perf_counter(), len(waiting)
    if total < len(cells):
        print(f'{len(cells) - total} of {len(cells)} cells are done already')
    try:
        while waiting and any(process.poll() is None for process in processes):
            time.sleep(0.2)
            for cell in [cell for cell in waiting if cell.path.exists()]:
                waiting.remove(cell)
                _tell(ledger, cell, len(cells) - len(waiting), total - len(waiting), began)
        for number, process in enumerate(processes):
            if process.wait():
                log = (ledger.folder / f'worker-{number}.log').read_text().strip()
                raise RuntimeError(f'worker {number} failed: {log.splitlines()[-1:]}')
    finally:
        for process in processes:
            process.terminate()


def _pin(number: int, workers: int) -> None:
    """Give this worker a core of its own where there is one for each."""
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


def _conclude(ledger, folder: Path) -> int:
    from cnn_jax.ablation.report import write_report
    from cnn_jax.ablation.summary import summarize

    report = write_report(folder)
    for arm, found in summarize(folder)['arms'].items():
        if arm != ledger.plan.baseline:
            print(found['verdict']['sentence'])
    states = [cell.status() for cell in ledger.cells()]
    compiled = {}
    for number, log in enumerate(sorted(folder.glob('worker-*.log'))):
        lines = log.read_text().splitlines()
        if lines and lines[-1].startswith('{'):
            compiled[number] = json.loads(lines[-1])['compilations']
    print(f'compilations of the training step: {sum(compiled.values())}')
    print(f'report: {report}')
    if failed := states.count('failed'):
        print(f'{failed} cells failed; --retry_failed runs them again')
        return cli.FAILED
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
