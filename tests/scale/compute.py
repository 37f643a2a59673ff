"""Train some steps on all devices of all processes and write down what came out.

Run by the tests in processes of its own: `python compute.py CONFIG STEPS OUT [fsdp] [model=N]`. The
results are whole arrays, whatever the layout, so that they can be compared.
"""

import itertools
import os
import sys
from pathlib import Path

import numpy as np


def main(config_file, steps, out, *options):
    from cnn_jax import config as cfg
    from cnn_jax import processes, runtime

    config = cfg.validate(cfg.from_json(Path(config_file).read_text()))
    runtime.prepare(config.train.threads)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        processes.join()

    import jax

    from cnn_jax import params
    from cnn_jax.train import metrics, setup
    from cnn_jax.train.loop import sum_metrics
    from cnn_jax.train.shared import jitted
    from cnn_jax.train.step import values_of

    model = next((int(o.removeprefix('model=')) for o in options if o.startswith('model=')), 1)
    layout = setup.layout_of(config, model=model, fsdp='fsdp' in options)
    *batches, description, weights = setup.open_data(config, layout)
    task = setup.make_task(config, description, weights)
    (phase, *_), state = setup.open_phases(config, description, task, *batches, layout)
    state = layout.place(state) if layout else state
    train, evaluate, _ = jitted(phase.steps, layout, state)
    values, found = values_of(config), {}

    def whole(tree):
        return processes.gathered(tree)

    losses, orders = [], []
    for number, batch in enumerate(itertools.islice(phase.train.train(), int(steps))):
        if number == 0:
            found |= {'mask': dropped(batch['image'], layout)}
        orders.append(whole(batch['index']))
        state, sums = train(state, batch, values)
        losses.append([float(sums['objective']), float(sums['gradient_norm'])])
    result = metrics.result(sum_metrics(evaluate, state, phase.evaluate.evaluate(), values))
    found |= {f'params/{k}': v for k, v in params.flatten(whole(state.params)).items()}
    found |= {f'stats/{k}': v for k, v in params.flatten(whole(state.batch_stats)).items()}
    found |= {'losses': losses, 'confusion': result['confusion'], 'loss': result['loss']}
    found |= {'order': orders, 'calibration': result['calibration_error']}
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    found['share'] = largest.addressable_shards[0].data.size / largest.size
    if processes.is_first():
        np.savez(out, **found)


def dropped(images, layout):
    """What dropout keeps of ones shaped like a batch, which lies as the batch does."""
    import jax
    import jax.numpy as jnp

    from cnn_jax import processes, rng
    from cnn_jax.nn.drop import Dropout

    drop = Dropout(0.5)

    def apply(x):
        rngs = {'dropout': rng.key(0, 'dropout', 3)}
        return drop.apply({}, jnp.ones(x.shape), train=True, rngs=rngs)

    return processes.gathered(jax.jit(apply, out_shardings=layout and layout.batch)(images))


if __name__ == '__main__':
    main(*sys.argv[1:])
