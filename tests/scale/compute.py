"""Train 50 steps on all devices of all processes, and write down what came out.

Run by the tests in processes of its own. Twice: freely, from the first state; and, where the states
of another run are given, each step from the state that the other one had before it, so that no
rounding is carried on. Results are whole arrays, whatever the layout, so that they can be compared.
"""

import argparse
import itertools
import os
from pathlib import Path

import numpy as np

STEPS = 50


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('config', type=Path, help='a config.json')
    parser.add_argument('out', type=Path, help='a .npz file, written by process 0')
    parser.add_argument('--states', type=Path, help='what an earlier call wrote')
    parser.add_argument('--model', type=int, default=1)
    parser.add_argument('--fsdp', action='store_true')
    args = parser.parse_args()

    from cnn_jax import config as cfg
    from cnn_jax import mesh, runtime

    config = cfg.validate(cfg.from_json(args.config.read_text()))
    runtime.configure(config.train.threads)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        mesh.initialize()

    import jax

    from cnn_jax.train import setup
    from cnn_jax.train.program import traced_values

    layout = setup.layout_of(config, model=args.model, fsdp=args.fsdp)
    data = setup.open_data(config, layout)
    spec = setup.make_spec(config, data.description, data.weights)
    (phase, *_), state = setup.open_phases(config, data, spec, layout)
    state = layout.shard(state) if layout else state
    train, values, found = phase.train_step, traced_values(config), {}
    trained = [
        number
        for number, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(state))
        if 'backbone' not in jax.tree_util.keystr(path)  # which is frozen
    ]

    def note(kind, number, state):
        leaves = jax.tree.leaves(state)
        for leaf, whole in enumerate(mesh.gather_to_host([leaves[k] for k in trained])):
            found[f'{kind}/{number}/{leaf}'] = whole

    def objective(kind, number, sums):
        found[f'{kind} objective/{number}'] = np.float32(sums['objective'])

    note('state', 0, state)
    for number, batch in enumerate(itertools.islice(phase.train.train(0), STEPS)):
        found[f'order/{number}'] = mesh.gather_to_host(batch['index'])
        if number in (0, STEPS - 1):
            found[f'mask/{number}'] = kept(batch['index'], number, layout)
        state, sums = train(state, batch, values)
        objective('free', number, sums)
        if args.states is None or number == STEPS - 1:
            note('state', number + 1, state)
    result = phase.metrics(state, values)
    found |= {'confusion': result['confusion'], 'evaluation loss': result['loss']}
    largest = max((jax.tree.leaves(state)[k] for k in trained), key=lambda leaf: leaf.size)
    found['share'] = largest.addressable_shards[0].data.size / largest.size

    if args.states:
        assert layout, 'it is compared with one device'
        given = np.load(args.states)
        for number, batch in enumerate(itertools.islice(phase.train.train(0), STEPS)):
            leaves, structure = jax.tree.flatten(state)
            before = [given[f'state/{number}/{leaf}'] for leaf in range(len(trained))]
            for k, leaf in zip(trained, layout.shard(before)):
                leaves[k] = leaf
            state, sums = train(jax.tree.unflatten(structure, leaves), batch, values)
            objective('forced', number, sums)
            note('after', number, state)
    if mesh.is_process_zero():
        np.savez(args.out, **found)


def kept(index, step, layout):
    """Which elements dropout keeps, of images that lie as the batch does."""
    import jax
    import jax.numpy as jnp

    from cnn_jax import mesh, rng
    from cnn_jax.nn.noise import Dropout

    def apply(index):
        images = jnp.ones((len(index), 8, 8, 3))
        rngs = {'dropout': rng.key(0, 'dropout', step)}
        return Dropout(0.5).apply({}, images, train=True, rngs=rngs)

    return mesh.gather_to_host(jax.jit(apply, out_shardings=layout and layout.batch)(index))


if __name__ == '__main__':
    main()
