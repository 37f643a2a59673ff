"""Run an ablation: every arm of an experiment with every seed, then the statistics and a report.

  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/regularization
  python -m launch.ablate --config=experiments/regularization.py --workdir=runs/at_1000 \\
      --config.data.subset=1000 --seeds=10
  python -m launch.ablate --config=experiments/regularization.py --workdir=/shared/regularization \\
      --executor=ray --ray_address=auto --workers=16

Rerun the same command to train what is missing. --config.KEY=VALUE overrides change every arm
that does not set the field itself; one that is tuned in all arms is refused. The work directory
holds ablation.json, cells/, logs/, report.html, figures/, cost.json, and summary.json and .csv.
"""

import shlex
import sys

from absl import flags

from cnn_jax import runtime
from cnn_jax.components import load_experiment
from cnn_jax.errors import UserError
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir('Folder of the ablation; created if missing.')
SEEDS = flags.DEFINE_integer(
    'seeds', 0, 'Replicates of each arm; 0: as many as the experiment says.', lower_bound=0
)
UNTIL = flags.DEFINE_enum(
    'until',
    '',
    ['', 'decided'],
    'decided: add replicates (5, 10, 20, 30) until every arm is decided, or 30 are not enough.',
)
TRIALS = flags.DEFINE_integer(
    'trials',
    0,
    'Trials of each arm that is tuned; 0: as many as the experiment says.',
    lower_bound=0,
)
WIDEN = flags.DEFINE_integer(
    'widen',
    0,
    'The most further trials of an arm whose choice is at the edge of what was tried, each a step '
    'beyond it; 0: as many as the experiment says.',
    lower_bound=0,
)
CURVES = flags.DEFINE_bool('curves', False, 'Evaluate runs while they train, for learning curves.')
WORKERS = flags.DEFINE_integer(
    'workers',
    0,
    'Processes that train; 0: one for each core, or one where there is a GPU or TPU.',
    lower_bound=0,
)
TOGETHER = flags.DEFINE_integer(
    'together',
    0,
    'Runs that a process trains at once, as one program on all its devices; 0: 1 on a CPU, up '
    'to 16 on a GPU or TPU.',
    lower_bound=0,
)
TRACKERS = cli.define_trackers()
RETRY = flags.DEFINE_bool('retry_failed', False, 'Repeat failed runs.')
EXECUTOR = flags.DEFINE_enum(
    'executor', 'local', ['local', 'ray'], 'Where workers run (ray: requirements-ray.txt).'
)
RAY_ADDRESS = flags.DEFINE_string(
    'ray_address',
    '',
    'Address of a Ray cluster that sees --workdir and this checkout; empty: start one.',
)
GPUS = flags.DEFINE_float('gpus', 0, 'GPUs that each Ray worker reserves; may be a fraction.')
TPUS = flags.DEFINE_float('tpus', 0, 'TPU chips that each Ray worker reserves.')


def main(_) -> int:
    """Run the ablation; returns the exit code."""
    from cnn_jax.ablation.plan import plan_of
    from cnn_jax.ablation.run import ablate

    config, components = cli.read_experiment(CONFIG)
    # One thread a run: results then do not depend on the number of workers.
    threads = config.train.threads = config.train.threads or 1
    workers = max(1, runtime.cores() // threads) if runtime.runs_on_cpu() else 1
    arguments = [each for each in sys.argv[1:] if not each.startswith(('--workers=', '--retry'))]
    if SEEDS.value and UNTIL.value:
        raise UserError('--seeds and --until=decided both say how many replicates; give one')
    given = {'seeds': SEEDS.value, 'trials': TRIALS.value, 'widen': WIDEN.value}
    options = {name: value for name, value in given.items() if value}
    plan = plan_of(
        load_experiment(CONFIG.value),
        config,
        until_decided=bool(UNTIL.value),
        curves=CURVES.value,
        **options,
    )
    in_all = set.intersection(*({*plan.ranges[a], *plan.changes[a]} for a in plan.configs))
    if useless := sorted(in_all & cli.overridden()):
        raise UserError(
            f'--config.{useless[0]} would change nothing: every arm of {CONFIG.value} sets or '
            'tunes it; leave it out'
        )
    if EXECUTOR.value != 'ray' and (RAY_ADDRESS.value or GPUS.value or TPUS.value):
        raise UserError('--ray_address, --gpus and --tpus need --executor=ray')
    result = ablate(
        plan,
        workdir=WORKDIR.value,
        components=components,
        workers=WORKERS.value or workers,
        together=TOGETHER.value,
        retry_failed=RETRY.value,
        trackers=TRACKERS.value,
        executor=EXECUTOR.value,
        ray={'address': RAY_ADDRESS.value, 'gpus': GPUS.value, 'tpus': TPUS.value},
        command=shlex.join(['python', '-m', 'launch.ablate', *arguments]),
    )
    if result.interrupted:
        print('stopped; rerun the same command to train what is missing')
        return cli.STOPPED
    print(result)
    print(f'report: {result.workdir}/report.html')
    failed, missing = result.failed, result.summary['runs']['missing']
    if failed:
        print(f'{runtime.count(len(failed), "run")} failed; --retry_failed repeats them')
    if missing:
        print(f'{runtime.count(len(missing), "run")} missing; rerun the same command to train them')
    return cli.FAILED if failed or missing else cli.OK


if __name__ == '__main__':
    cli.run(main)
