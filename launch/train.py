"""Train a network.

  python -m launch.train --config=experiments/small.py --workdir=runs/small
  python -m launch.train --config=experiments/strided.py --workdir=runs/mine \\
      --config.data.source=folder:photos --config.train.epochs=30
  python -m launch.train --config=experiments/small.py --workdir=runs/timed --profile

The same command again goes on where the run stopped. The work directory holds config.json,
manifest.json, metrics.jsonl, steps.f32 (objective and gradient norm of every step), TensorBoard
events, curves.png, speed.json, checkpoints/ and, if images were left out, skipped.csv.

The last line says how fast the run was: images and FLOP a second, the latter as a share of what a
plain matrix product reaches here, the time spent compiling, and the most memory held. --profile
adds which layers the time went to, and a trace to look at, in profile/.
"""

from pathlib import Path

from absl import flags

from cnn_jax import config as cfg
from launch import cli

CONFIG = cli.define_config()
WORKDIR = cli.define_workdir('Folder of the run; created if missing.')
PROFILE = flags.DEFINE_bool(
    'profile',
    False,
    'Trace five steps soon after the start, for Perfetto and TensorBoard, and print where their '
    'time went.',
)


WAIT = flags.DEFINE_bool(
    'wait', False, 'If another process trains in --workdir, go on after it instead of giving up.'
)


def main(_) -> int:
    """Train; returns the exit code."""
    from cnn_jax.train import workdir

    config, folder = cli.read_config(CONFIG), Path(WORKDIR.value)
    with workdir.held(folder, WAIT.value):
        return train(config, folder, PROFILE.value)


def train(config: cfg.Config, folder: Path, profiled: bool = False) -> int:
    """Run or continue the training in `folder`, printing what a person wants to see."""
    from cnn_jax.train import manifest, workdir

    workdir.claim(folder, config)
    settings = cli.start(manifest.threads(folder, config))
    print(settings)

    from cnn_jax import runtime
    from cnn_jax.models.build import build
    from cnn_jax.models.summary import layers, summary
    from cnn_jax.train import loop, metrics, setup, speed
    from cnn_jax.train.checkpoint import digest
    from cnn_jax.train.profile import Profile
    from cnn_jax.train.skipped import write_skipped

    clock = speed.CompileClock()
    *batches, description, weights = setup.open_data(config)
    manifest.check_data(folder, description)
    if count := write_skipped(folder, dict(zip(('train', 'eval'), batches))):
        print(f'{count:,} images cannot be read and are left out: {folder}/skipped.csv')
    if weights:
        print(f'weights: {weights.source}, digest {weights.digest[:12]}…, {weights.licence}')
    task = setup.make_task(config, description, weights)
    print(
        f'{config.data.source}: {batches[0].n:,} training and {batches[1].n:,} evaluation images, '
        f'{setup.shape_text(task.image_shape)}, {task.num_classes} classes; '
        f'{task.ends[-1]:,} steps of {config.data.batch} on {runtime.devices()}'
    )
    net, shape = build(config.model, task.num_classes), setup.prepared_shape(task)
    print(summary(net, shape))
    phases, state = setup.open_phases(config, description, task, *batches)
    for number, phase in enumerate(phases, start=1):
        kind = 'cached features' if phase.steps.cached else 'images'
        print(f'phase {number}, to step {phase.end:,}, on {kind}:')
        print(setup.parameter_table(config, phase.steps))
    now = manifest.manifest(cfg.content_hash(config), runtime.machine(settings), description)
    if manifest.stored(folder) is None:  # of a run that goes on it is written down
        now['initial_state'] = digest(state)
    for note in manifest.begin(folder, now):
        print(f'note: {note}')
    rows = layers(net, shape)
    profile = Profile(folder / 'profile', [row.path for row in rows]) if profiled else None
    outcome = loop.fit(config, task, phases, state, folder, profile=profile)
    if outcome.stopped:
        print(f'stopped and saved; the same command goes on from here ({folder})')
    else:
        assert outcome.metrics is not None
        times = max(count for counts in outcome.compilations for count in counts.values())
        print(f'compilations of each step in each phase: {times}')
        final = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(outcome.metrics).items())
        print(f'done: {final}\nresults in {folder}')
    if profile and not profile.taken:
        print('no profile: it needs three steps, the first two of which are not traced')
    flops = [speed.training_flops(rows, phase.steps) for phase in phases]
    facts = speed.measure(outcome.speeds, flops, config.model.dtype, clock)
    speed.write(folder, facts)
    print(speed.line(facts))
    return cli.STOPPED if outcome.stopped else cli.OK


if __name__ == '__main__':
    cli.run(main)
