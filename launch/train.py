"""Train a network.

  python -m launch.train --config=experiments/small.py --workdir=runs/small
  python -m launch.train --config=experiments/strided.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.train.epochs=30
  python -m launch.train --config=experiments/small.py --workdir=runs/timed --profile
  python -m launch.train --config=experiments/small.py --workdir=gs://bucket/small

The same command again goes on where the run stopped. The work directory holds config.json,
manifest.json, metrics.jsonl, steps.f32 (objective and gradient norm of every step), timing.jsonl,
TensorBoard events, curves.png, speed.json, checkpoints/ and, if images were left out, skipped.csv.

All devices that JAX finds share each batch, of one process or, with --distributed, of several;
launch.processes tries the latter out on this machine.

The last line says how fast the run was: images and FLOP a second, the latter as a share of what a
plain matrix product reaches here, the time spent compiling, and the most memory held. --profile
adds which layers the time went to, and a trace to look at, in profile/.
"""

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from cnn_jax import config as cfg
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
WAIT = flags.DEFINE_bool(
    'wait', False, 'If another process trains in --workdir, go on after it instead of giving up.'
)


def main(_) -> int:
    """Train; returns the exit code."""
    from cnn_jax.train import manifest, workdir
    from cnn_jax.train.mirror import Mirror, is_remote

    config = cli.read_config(CONFIG)
    mirror = Mirror(WORKDIR.value) if is_remote(WORKDIR.value) else None
    folder = mirror.folder if mirror else Path(WORKDIR.value)
    with contextlib.ExitStack() as stack:

        def claim() -> int:
            """Have the work directory; returns the threads that its run computes with."""
            stack.enter_context(workdir.held(mirror.base if mirror else folder, WAIT.value))
            if mirror:
                mirror.resume()
            workdir.claim(folder, config)
            threads = manifest.threads(folder, config)
            if mirror:  # not before all that may be refused
                mirror.take()
            return threads

        if DISTRIBUTED.value:
            settings = cli.start(config.train.threads, distributed=True)

            from cnn_jax.mesh import on_process_zero

            on_process_zero(claim)
        else:
            settings = cli.start(claim())
        print(settings)
        if not mirror:
            return train(config, folder, settings)

        from cnn_jax.mesh import on_process_zero

        code = train(config, folder, settings, lambda: on_process_zero(mirror.push))
        on_process_zero(lambda: mirror.push(last=True))
        return code


def train(
    config: cfg.Config, folder: Path, settings: Any, saved: Callable[[], object] | None = None
) -> int:
    """Run or continue the training in `folder`, printing what a person wants to see."""
    from cnn_jax import runtime
    from cnn_jax.mesh import is_process_zero, on_process_zero
    from cnn_jax.models import build
    from cnn_jax.summary import layers, summary
    from cnn_jax.tools import profile as profiling
    from cnn_jax.train import loop, manifest, metrics, setup
    from cnn_jax.train.checkpoint import digest
    from cnn_jax.train.skipped import write_skipped

    clock = profiling.CompileClock()
    options = {'model': MODEL_PARALLEL.value, 'fsdp': FSDP.value}
    layout = setup.layout_of(config, **options)
    images, evaluation, description, weights = setup.open_data(config, layout)
    on_process_zero(lambda: manifest.check_data(folder, description))
    if is_process_zero() and (
        count := write_skipped(folder, {'train': images, 'eval': evaluation})
    ):
        print(f'{count:,} images cannot be read and are left out: {folder}/skipped.csv')
    if weights:
        print(f'weights: {weights.source}, digest {weights.digest[:12]}…, {weights.licence}')
    task = setup.make_task(config, description, weights)
    print(
        f'{config.data.source}: {images.n:,} training and {evaluation.n:,} evaluation images, '
        f'{setup.shape_text(task.image_shape)}, {task.num_classes} classes; '
        f'{task.ends[-1]:,} steps of {config.data.batch} on {runtime.devices()}'
        f'{f", {layout}" if layout else ""}'
    )
    net, shape = build(config.model, task.num_classes), setup.prepared_shape(task)
    print(summary(net, shape))
    phases, state = setup.open_phases(config, description, task, images, evaluation, layout)
    for number, phase in enumerate(phases, start=1):
        kind = 'cached features' if phase.steps.cached else 'images'
        print(f'phase {number}, to step {phase.end:,}, on {kind}:')
        print(setup.parameter_table(config, phase.steps))
    now = manifest.manifest(cfg.content_hash(config), runtime.machine(settings), description)
    if layout:
        now['machine']['layout'] = layout.facts

    def begin() -> list[str]:
        if manifest.stored(folder) is None:  # of a run that goes on it is written down
            now['initial_state'] = digest(state)
        return manifest.begin(folder, now)

    for note in on_process_zero(begin):
        print(f'note: {note}')
    rows = layers(net, shape)
    profile = None
    if PROFILE.value:  # each process traces; the first one's is kept
        traces = folder / 'profile' if is_process_zero() else Path(tempfile.mkdtemp())
        profile = profiling.LayerProfile(traces, [row.path for row in rows])
    outcome = loop.fit(
        config, task, phases, state, folder, layout=layout, profile=profile, saved=saved
    )
    if outcome.stopped:
        print(f'stopped and saved; the same command goes on from here ({WORKDIR.value})')
    else:
        assert outcome.metrics is not None
        times = max(count for counts in outcome.compilations for count in counts.values())
        print(f'compilations of each step in each phase: {times}')
        final = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(outcome.metrics).items())
        print(f'done: {final}\nresults in {WORKDIR.value}')
    if profile and not profile.taken:
        print('no profile: it needs three steps, the first two of which are not traced')
    if not is_process_zero():
        return cli.STOPPED if outcome.stopped else cli.OK
    flops = [
        profiling.training_flops(rows, phase.steps.trainable, phase.steps.cached)
        for phase in phases
    ]
    dtype, stalls = config.model.dtype, outcome.stalls
    facts = profiling.measure(outcome.speeds, flops, dtype, clock, stalls=stalls, layout=layout)
    profiling.write_speed(folder, facts)
    print(profiling.speed_line(facts))
    return cli.STOPPED if outcome.stopped else cli.OK


if __name__ == '__main__':
    cli.run(main)
