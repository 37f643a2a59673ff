"""Where a number stopped being finite: the parameter, the layer, the examples.

A step gives away the memory of the state that it starts from, so that this state is gone when the
failure shows. But a run repeats itself bit for bit: `replay` leads from a kept state to the
failing step, and `locate` looks into it.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.data.batches import Batch
from cnn_jax.mesh import Layout
from cnn_jax.train.metrics import Sums
from cnn_jax.train.shared import jitted
from cnn_jax.train.state import State, Values
from cnn_jax.train.step import make_steps, values_of
from cnn_jax.train.task import Task

SHOWN = 8  # examples that a sentence names
PENALTIES = ('loss.l2', 'loss.l1', 'loss.orthogonality', 'loss.l2_sp')

Output = tuple[str, Any, Any]  # layer, whether each example is finite, whether there is an infinity


def replay(
    phases: Sequence[Any],
    number: int,
    state: State,
    step: int,
    failing: int,
    values: Values,
    layout: Layout | None = None,
) -> tuple[int, State, Batch]:
    """Repeat a run up to its failing step.

    Args:
        phases: As `loop.fit` takes them.
        number: Of the phase that the state is in.
        state: After `step` steps; its memory is given away.
        step: Less than `failing`.
        failing: The step to look into, counted from 1.
        values: As the steps take them.
        layout: Of batches and state, on several devices.

    Returns:
        The number of the failing step's phase, the state before the step, and its batch.
    """
    while True:
        phase = phases[number]
        train, *_ = jitted(phase.steps, layout, state)
        batches = phase.train.train(step)
        while step < phase.end:
            batch = next(batches)
            step += 1
            if step == failing:
                return number, state, batch
            state, _ = train(state, batch, values)
        number += 1
        state = phases[number].steps.enter(state)


def locate(
    config: cfg.Config, task: Task, phase: int, cached: bool, state: State, batch: Batch
) -> str:
    """What is not finite first in a training step, as a sentence without its full stop.

    In this order: the parameters before the step, what the network is given, the outputs of its
    layers as they are called, the loss, the gradients in the order of their paths, their norm.

    Args:
        config, task, phase, cached: As `make_steps` takes them.
        state: Before the step.
        batch: Of the step.

    Returns:
        E.g. `block2_conv1 gave inf for all 32 examples (the parameters were finite)`.
    """
    for path, leaf in params.flatten(state.params).items():
        if kind := _kind(leaf):
            return f'{path} was {kind} before the step'
    outputs, sums, gradients = _repeated(config, task, phase, cached, state, batch)
    for layer, finite, infinite in outputs:
        if not finite.all():
            kind = 'inf' if infinite else 'nan'
            examples = _examples(np.asarray(batch['index'])[~finite], len(finite))
            return f'{layer} gave {kind} for {examples} (the parameters were finite)'
    if kind := _kind(sums['loss']):
        return f'the loss was {kind} (the outputs of all layers were finite)'
    if kind := _kind(sums['objective']):
        used = [name for name in PENALTIES if cfg.get(config, name)] or PENALTIES[:1]
        named = ' or '.join(f'config.{name}' for name in used)
        return f'the penalty {named} was {kind} (the loss without it was finite)'
    for path, gradient in gradients.items():
        if kind := _kind(gradient):
            return f'the gradient of {path} was {kind} (the loss was finite)'
    if kind := _kind(sums['gradient_norm']):
        largest = max(gradients, key=lambda path: np.max(abs(gradients[path])))
        return f'the norm of the gradient was {kind}, of which {largest} has the largest number'
    if config.optimizer.sam:
        return (
            'the loss or its gradient was not finite uphill, where SAM takes it; lower '
            f'config.optimizer.sam, which is {config.optimizer.sam:g}'
        )
    return 'repeated, the step was finite: see whether launch.verify gives the run again'


def _repeated(
    config: cfg.Config, task: Task, phase: int, cached: bool, state: State, batch: Batch
) -> tuple[list[Output], Sums, params.Flat]:
    """The outputs of the layers in the order of their calls, the sums, and the gradients."""
    # Clipped, NaN would be in all gradients; SAM would call the layers a second time.
    changes = {'clip_norm': 0.0, 'gradient_noise': 0.0, 'sam': 0.0}
    plain = cfg.replace(config, {f'optimizer.{name}': off for name, off in changes.items()})
    steps = make_steps(plain, task, phase, cached)
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
            look('the frozen backbone' if cached else 'the preparation of the images', args[0])
        out = call(*args, **kwargs)
        if isinstance(out, jax.Array):
            look(path or 'the network', out)
        return out

    # An optimizer that remembers nothing yet remembers this step's gradient afterwards.
    empty = jax.tree.map(jnp.zeros_like, state.opt_state)
    state = dataclasses.replace(state, opt_state=empty)
    with nn.intercept_methods(intercept):
        new, sums = jax.jit(steps.train)(state, batch, values_of(config))
    jax.effects_barrier()  # all that was looked at is in `seen`

    calls = len(seen) // config.optimizer.accumulate  # of one micro-batch; the next follow it
    outputs = []
    for parts in zip(*(seen[start : start + calls] for start in range(0, len(seen), calls))):
        layers, finite, infinite = zip(*parts)
        outputs.append((layers[0], np.concatenate(finite), any(infinite)))
    memory = 'trace' if config.optimizer.name == 'sgd' else 'mu'
    gradients = [getattr(direction, memory) for direction, *_ in new.opt_state]
    return outputs, sums, params.flatten(functools.reduce(operator.or_, gradients))


def _kind(x: Any) -> str:
    """`nan` or `inf` if the array is not finite, else nothing."""
    x = np.asarray(x)
    if np.isfinite(x).all():
        return ''
    return 'inf' if np.isinf(x).any() else 'nan'


def _examples(index: np.ndarray, size: int) -> str:
    """`all 32 examples`, `example 17`, `examples 17, 203`."""
    if len(index) == size:
        return f'all {size} examples'
    names = ', '.join(map(str, index[:SHOWN]))
    more = f' and {len(index) - SHOWN} more' if len(index) > SHOWN else ''
    return f'example{"s" * (len(index) > 1)} {names}{more}'
