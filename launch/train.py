"""Train a network.

  python -m launch.train --config=experiments/small.py --workdir=runs/small
  python -m launch.train --config=experiments/strided.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.train.epochs=30
  python -m launch.train --config=experiments/small.py --workdir=runs/timed --profile
  python -m launch.train --config=experiments/small.py --workdir=gs://bucket/small

Run the same command again to resume. The work directory holds config.json,
manifest.json, metrics.jsonl, steps.f32 (objective and gradient norm of every step), timing.jsonl,
TensorBoard events, curves.png, speed.json, checkpoints/, tuning.json if trials chose its numbers
and, if images were left out, skipped.csv.

The devices that JAX finds share each batch, as many as divide it, of one process or, with
--distributed, of several; launch.processes tries the latter out on this machine.

The last line says how fast the run was: images and FLOP a second, the latter as a share of what a
plain matrix product reaches here, the time spent compiling, and the most memory held. --profile
adds which layers the time went to, and a trace to look at, in profile/.
"""

from absl import flags

from cnn_jax import runtime
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir(
    'Folder of the run; created if missing. With gs://BUCKET/FOLDER the run works in a local one, '
    'which is uploaded after every checkpoint.',
    url=True,
)
PROFILE = flags.DEFINE_bool(
    'profile',
    False,
    'Trace five steps soon after the start, for Perfetto and TensorBoard, and print where their '
    'time went.',
)

MODEL_PARALLEL, FSDP = cli.define_layout()
DISTRIBUTED = flags.DEFINE_bool(
    'distributed',
    False,
    'This process is one of several, which Slurm, Open MPI, a TPU pod or GKE started, or that '
    'have JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set.',
)
TRACKERS = cli.define_trackers()
WAIT = flags.DEFINE_bool(
    'wait', False, 'If another process trains in --workdir, resume after it instead of giving up.'
)


def main(_) -> int:
    """Train; returns the exit code."""
    config, components = cli.read_experiment(CONFIG)
    runtime.configure(config.train.threads)  # before JAX is imported

    from cnn_jax.components import load_experiment
    from cnn_jax.train.fit import fit

    run = fit(
        config,
        WORKDIR.value,
        tune=getattr(load_experiment(CONFIG.value), 'TUNE', None) if config.train.trials else None,
        components=components,
        wait=WAIT.value,
        trace=PROFILE.value,
        trackers=TRACKERS.value,
        model_parallel=MODEL_PARALLEL.value,
        fsdp=FSDP.value,
        distributed=DISTRIBUTED.value,
    )
    return cli.STOPPED if run.stopped else cli.OK


if __name__ == '__main__':
    cli.run(main)
