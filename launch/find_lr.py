"""Find a learning rate: train a few steps at rates that grow from far too low to far too high.

  python -m launch.find_lr --config=experiments/small.py --out=runs/rates
  python -m launch.find_lr --config=experiments/small.py --out=runs/rates \\
      --config.optimizer.name=sgd --lowest=1e-5 --highest=10 --steps=200

Prints a tenth of the rate at which the smoothed loss is lowest, and writes the curve as
lr_finder.csv and lr_finder.png into the folder. For a run of two phases, the rate is that of the
first. No run is changed: a training afterwards gives the same bits as without it.
"""

import math
from pathlib import Path

from absl import flags

from cnn_jax.errors import UserError
from launch import cli

CONFIG = cli.define_config()
OUT = cli.define_path('out', 'The folder for the curve; created.', required=True)
LOWEST = flags.DEFINE_float('lowest', 1e-6, 'The first learning rate.', lower_bound=1e-12)
HIGHEST = flags.DEFINE_float('highest', 1.0, 'The last one.', lower_bound=1e-12)
STEPS = flags.DEFINE_integer('steps', 100, 'How many rates to try.', lower_bound=30)


def main(_) -> int:
    """Sweep the learning rate; returns the exit code."""
    (config, components), folder = cli.read_experiment(CONFIG), Path(OUT.value)
    if not LOWEST.value < HIGHEST.value < math.inf:
        raise UserError(
            f'--lowest is {LOWEST.value:g}; it must be below --highest, which is finite'
        )
    print(cli.start(config.train.threads))

    import numpy as np
    from tqdm import tqdm

    from cnn_jax import config as cfg
    from cnn_jax.files import make_writable
    from cnn_jax.tools import lr_finder
    from cnn_jax.train import setup
    from cnn_jax.train.loop import shard_state

    make_writable(folder, 'the folder for the curve', '--out')
    # Without a schedule, so that the sweep sets the learning rate.
    plain = {'optimizer.schedule': 'constant', 'optimizer.warmup_epochs': 0.0}
    config = cfg.replace(config, plain)
    swept = cfg.replace(config, {'optimizer.learning_rate': HIGHEST.value})
    if any('optimizer.learning_rate' in phrase for phrase in components.unread(swept)):
        raise UserError('your own optimizer does not read config.optimizer.learning_rate')
    layout = setup.layout_of(config)
    data = setup.open_data(config, layout, components)
    spec = setup.make_spec(config, data.description, data.weights, components)
    phases, state = setup.open_phases(config, data, spec, layout)
    rates = np.geomspace(LOWEST.value, HIGHEST.value, STEPS.value)
    bar = tqdm(rates, 'learning rates', disable=None)
    losses = lr_finder.losses(config, phases[0], shard_state(state, layout), bar)
    lr_finder.write_csv(rates, losses, folder / 'lr_finder.csv')
    suggested = lr_finder.suggestion(rates, losses)
    lr_finder.draw(rates, losses, suggested, folder / 'lr_finder.png')
    print(f'tried {len(losses)} rates, from {rates[0]:g} to {rates[len(losses) - 1]:.2g}')
    print(f'suggestion: --config.optimizer.learning_rate={suggested:.2g}')
    print(f'written: {folder}/lr_finder.csv, lr_finder.png')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
