"""The learning-rate schedule and the Optax chain over the trainable leaves.

The chain only ever sees the trainable parameters (a flat dict), never a mask over all of them:
`optax.masked` passes the gradients of unmasked leaves through unchanged, and setting updates to
zero still allocates optimizer memory for them. Numbers may be traced, so nothing here branches
on one.
"""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
import optax
from jaxtyping import Array

from cnn_jax.config import Optimizer
from cnn_jax.params import Flat


def schedule(config: Optimizer, steps_per_epoch: float, total_steps: int) -> Callable:
    """The learning rate at a step.

    constant:      lr
    cosine:        lr · ½(1 + cos(π·t/T))
    step:          lr · decay_rate^(boundaries passed)
    inverse_time:  lr / (1 + decay_rate · t / decay_steps)       (Keras's InverseTimeDecay)

    each multiplied by min(1, (t + 1)/W) during a linear warm-up of W steps; t counts from 0.
    After the warm-up, the cosine runs over the T − W steps that are left.

    Args:
        config: `learning_rate`, `decay_rate` may be traced; epochs are converted to steps here.
        steps_per_epoch: Updates an epoch; need not be whole.
        total_steps: Updates of the whole run.

    Returns:
        `step -> learning rate`, both scalar arrays.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    boundaries = jnp.array([round(b * steps_per_epoch) for b in config.boundaries], jnp.int32)

    def factor(step: Array) -> Array:
        if config.schedule == 'cosine':
            done = (step - warmup) / max(total_steps - warmup, 1)
            return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        if config.schedule == 'step':
            return jnp.asarray(config.decay_rate) ** jnp.sum(step >= boundaries)
        if config.schedule == 'inverse_time':
            return 1 / (1 + config.decay_rate * step / config.decay_steps)
        return jnp.ones(())

    def rate(step: Array) -> Array:
        ramp = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        return config.learning_rate * ramp * factor(step)

    return rate


def chain(
    config: Optimizer, rate: Callable, decayed: Iterable[str]
) -> optax.GradientTransformation:
    """The update rule for a flat dict of trainable parameters.

    g ← g · min(1, clip_norm/‖g‖)                             if clip_norm > 0
    sgd:          u = m ← momentum·m + g                      (Nesterov: u = momentum·m + g)
    adam, adamw:  u = m̂ / (√v̂ + epsilon)                      (Kingma & Ba 2015)
    w ← w − rate(t)·(u + weight_decay·w [w decayed])          (Loshchilov & Hutter 2019)

    Args:
        config: Names and numbers; the numbers may be traced.
        rate: The schedule.
        decayed: Paths that decoupled decay applies to.

    Returns:
        An Optax transformation; its state has leaves for the parameters it is given and no others.
    """
    decayed = set(decayed)

    def is_decayed(params: Flat) -> dict[str, bool]:
        return {path: path in decayed for path in params}

    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == 'sgd':
        parts.append(optax.trace(decay=config.momentum, nesterov=config.nesterov))
    else:
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon))
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=is_decayed))
    parts.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*parts)
