"""Check that a run can be had again: train parts of it once more and compare every bit.

  python -m launch.verify --workdir=runs/small
  python -m launch.verify --workdir=runs/small --steps=100

The first steps are trained again, and those after the newest checkpoint that has some after it.
What has changed since the run began (device, threads, versions, flags, data, code) is told. Nothing
in the work directory is changed. Exit code 0: bit for bit the same; 1: something differs.
"""

from absl import flags

from launch import cli

WORKDIR = cli.define_workdir('Folder of a run of launch.train, or its gs:// URL.', url=True)
STEPS = flags.DEFINE_integer(
    'steps', 10, 'How many steps to train again, in each of the two places.', lower_bound=1
)


def main(_) -> int:
    """Verify; returns the exit code."""
    from cnn_jax.train import manifest, mirror, workdir

    folder = mirror.opened(WORKDIR.value)
    config, before = workdir.load_config(folder), manifest.read(folder)
    settings = cli.start(manifest.threads(folder, config))
    print(settings)

    from cnn_jax import config as cfg
    from cnn_jax import runtime
    from cnn_jax.train import setup
    from cnn_jax.train.verify import verify

    had = before['machine'].get('layout') or {}
    layout = setup.layout_of(config, model=had.get('model', 1), fsdp=had.get('fsdp', False))
    images, split, description, weights = setup.open_data(config, layout)
    now = manifest.manifest(cfg.content_hash(config), runtime.machine(settings), description)
    if layout:
        now['machine']['layout'] = layout.facts
    changed = manifest.differences(before, now)
    for name, (old, new) in changed.items():
        print(f'changed since the run began: {name}: {old} → {new}')
    task = setup.make_task(config, description, weights)
    phases, state = setup.open_phases(config, description, task, images, split, layout)

    def tell(what: str, difference: str) -> None:
        print(f'  differs  {what}: {difference}' if difference else f'  same     {what}')

    if verify(config, phases, state, folder, STEPS.value, tell, layout):
        print(f'verified: what was trained again of {WORKDIR.value} is the same, bit for bit')
        return cli.OK
    print(
        f'not the same: {", ".join(changed)} changed since the run began'
        if changed
        else 'not the same, though nothing that is known to matter has changed: a file of the run '
        'was altered, or this machine does not compute the same twice'
    )
    return cli.FAILED


if __name__ == '__main__':
    cli.run(main)
