"""Find where a number stopped being finite: the parameter, the layer, the examples.

A step gives away the memory of the state that it starts from, so this state is gone when the
failure shows. But a run repeats itself bit for bit: `train.loop.before_step` leads from a saved
state to the failing step, and `locate` looks into it.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.data.batches import Batch
from cnn_jax.train.metrics import Sums
from cnn_jax.train.program import Program, State, Values, traced_values
from cnn_jax.train.step import bound_config, step_gradients

LISTED = 8  # examples that a sentence names

Output = tuple[str, Any, Any]  # layer, whether each example is finite, whether there is an infinity


def locate(program: Program, state: State, batch: Batch) -> str:
    """The first thing that is not finite in a training step, as a sentence without its full stop.

    In this order: the parameters of the state before the step, what the network is given, the
    outputs of its layers as they are called, the loss, the gradients by path, their norm. E.g.
    `block2_conv1 gave inf for all 32 examples (the parameters were finite)`.
    """
    for path, leaf in params.flatten(state.params).items():
        if kind := _kind(leaf):
            return f'{path} was {kind} before the step'
    outputs, sums, gradients = _repeat(program, state, batch)
    for layer, finite, infinite in outputs:
        if not finite.all():
            kind = 'inf' if infinite else 'nan'
            examples = _examples(np.asarray(batch['index'])[~finite], len(finite))
            return f'{layer} gave {kind} for {examples} (the parameters were finite)'
    if kind := _kind(sums['loss']):
        return f'the loss was {kind} (the outputs of all layers were finite)'
    if kind := _kind(sums['objective']):
        fields = [r.field for r in program.regularizers if cfg.get(program.config, r.field)]
        named = ' or '.join(f'config.{field}' for field in fields or ['loss.l2'])
        return f'the penalty {named} was {kind} (the loss without it was finite)'
    for path, gradient in gradients.items():
        if kind := _kind(gradient):
            return f'the gradient of {path} was {kind} (the loss was finite)'
    if kind := _kind(sums['gradient_norm']):
        largest = max(gradients, key=lambda path: np.max(abs(gradients[path])))
        return f'the norm of the gradient was {kind}, of which {largest} has the largest number'
    if sam := program.config.optimizer.sam:
        return (
            'the loss or its gradient was not finite uphill, where SAM takes it; lower '
            f'config.optimizer.sam, which is {sam:g}'
        )
    return 'the step was finite when it was repeated: let launch.verify check the run'


def _repeat(program: Program, state: State, batch: Batch) -> tuple[list[Output], Sums, params.Flat]:
    """The outputs of the layers in the order of their calls, the sums, and the gradients."""
    seen: list[Any] = []

    def look(layer: str, x: Any) -> None:
        place, axes = len(seen), tuple(range(1, x.ndim))
        seen.append(None)

        def keep(finite, infinite):
            seen[place] = layer, np.asarray(finite), bool(infinite)

        jax.debug.callback(keep, jnp.isfinite(x).all(axes), jnp.isinf(x).any())

    def intercept(call, args, kwargs, context):
        path = '/'.join(context.module.path)
        if not path and args:
            given = 'the frozen backbone' if program.cached else 'the preparation of the images'
            look(given, args[0])
        out = call(*args, **kwargs)
        if isinstance(out, jax.Array):
            look(path or 'the network', out)
        return out

    def compute(state: State, batch: Batch, values: Values) -> Any:
        return step_gradients(plain, bound_config(plain, state, values), state, batch)

    # SAM would call the layers a second time.
    plain = dataclasses.replace(program, config=cfg.replace(program.config, {'optimizer.sam': 0.0}))
    with nn.intercept_methods(intercept):
        gradients, _, sums = jax.jit(compute)(state, batch, traced_values(program.config))
    jax.effects_barrier()  # all that was looked at is in `seen`

    outputs, count = [], program.config.optimizer.accumulate
    calls = len(seen) // count  # of one micro-batch; those of the next follow
    for first in range(calls):
        layers, finite, infinite = zip(*seen[first::calls])
        outputs.append((layers[0], np.concatenate(finite), any(infinite)))
    return outputs, sums, gradients


def _kind(x: Any) -> str:
    """`nan` or `inf` if the array is not finite, else nothing."""
    if np.isfinite(x).all():
        return ''
    return 'inf' if np.isinf(x).any() else 'nan'


def _examples(index: np.ndarray, size: int) -> str:
    """`all 32 examples`, `example 17`, `examples 17, 203`."""
    if len(index) == size:
        return f'all {size} examples'
    names = ', '.join(map(str, index[:LISTED]))
    more = f' and {len(index) - LISTED} more' if len(index) > LISTED else ''
    return f'{"example" if len(index) == 1 else "examples"} {names}{more}'
