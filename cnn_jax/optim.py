"""The learning-rate schedule and the Optax chain over the trainable leaves.

The chain only ever sees the trainable parameters (a flat dict), never a mask over all of them:
`optax.masked` passes the gradients of unmasked leaves through unchanged, and setting updates to
zero still allocates optimizer memory for them. Numbers may be traced, so nothing here branches
on one.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

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


def global_norm(tree: Any) -> Array:
    """√Σ‖leaf‖² over all leaves; as inner products, which take XLA on a CPU a third of the time."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def uphill(params: Flat, gradients: Flat, radius: float | Array) -> Flat:
    """The point at which sharpness-aware minimization (SAM) takes the gradient.

    w + ρ·g/‖g‖, ‖g‖ over all parameters: the worst point within ρ of w, to first order

    Args:
        params: w.
        gradients: g, of the whole objective at w; w itself is returned where it is 0.
        radius: ρ ≥ 0; may be traced.

    Source: Foret et al. 2021, "Sharpness-Aware Minimization", equation 2 with p = 2.
    """
    scale = radius / jnp.maximum(global_norm(gradients), 1e-12)
    return jax.tree.map(lambda w, g: w + scale * g, params, gradients)


def clipped(gradients: Flat, bound: float) -> Flat:
    """The gradients, scaled down to a norm that they may have: g · min(1, c/‖g‖).

    Args:
        gradients: g; the norm is over all parameters.
        bound: c > 0.

    Source: Pascanu, Mikolov & Bengio 2013, "On the difficulty of training recurrent neural
        networks", algorithm 1; Optax's.
    """
    clip = optax.clip_by_global_norm(bound)
    result: Any = clip.update(gradients, clip.init(gradients))
    return result[0]


def with_noise(
    key: Key[Array, ''], gradients: Flat, strength: float | Array, step: int | Array
) -> Flat:
    """The gradients plus Gaussian noise that fades as training goes on.

    g + N(0, σ²), σ² = η/(1 + t)^0.55

    Args:
        key: Of the step; each parameter's noise depends on it and on the path alone.
        gradients: g.
        strength: η ≥ 0; may be traced.
        step: t, from 0.

    Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep
        Networks", equations 1 and 2 with γ = 0.55.
    """
    deviation = jnp.sqrt(strength / (1.0 + step) ** 0.55)

    def noise(path: str, leaf: Array) -> Array:
        of_path = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return deviation * jax.random.normal(of_path, leaf.shape, leaf.dtype)

    return {path: leaf + noise(path, leaf) for path, leaf in gradients.items()}


def bounded(kernel: Float[Array, '... o'], bound: float | Array) -> Float[Array, '... o']:
    """Max-norm constraint: the weights into an output unit, scaled down to a norm they may have.

    w_j ← w_j · min(1, c/‖w_j‖₂), over all axes but the last

    Units within the bound keep their bits.

    Args:
        kernel: Convolution or Dense; a unit is a filter.
        bound: c > 0; may be traced.

    Source: Srivastava et al. 2014, "Dropout", section 5.1 (c of 3 to 4 with dropout).
    """
    norms = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))))
    return jnp.where(norms > bound, kernel * (bound / jnp.maximum(norms, bound)), kernel)


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together: by one rule, with a state and a step count of its own.

    Attributes:
        paths: The parameters.
        rate: Learning rate at the group's own step.
        scales: Factor of the rate for single parameters; 1 where there is none.
    """

    paths: Sequence[str]
    rate: Callable
    scales: Mapping[str, float | Array] = field(default_factory=dict)


def chain(
    config: Optimizer, groups: Sequence[Group], decayed: Iterable[str]
) -> optax.GradientTransformation:
    """The update rule for a flat dict of trainable parameters.

    sgd:          u = m ← momentum·m + g                      (Nesterov: u = momentum·m + g)
    adam, adamw:  u = m̂ / (√v̂ + epsilon)                      (Kingma & Ba 2015)
    w ← w − scale·rate(t)·(u + weight_decay·w [w decayed])    (Loshchilov & Hutter 2019)

    Args:
        config: Names and numbers; the numbers may be traced.
        groups: Each parameter is in exactly one.
        decayed: Paths that decoupled decay applies to.

    Returns:
        An Optax transformation. Its state is a tuple with one entry a group, which has leaves for
        the group's parameters and no others.
    """
    decayed = set(decayed)

    def part(tree: Flat, group: Group) -> Flat:
        return {path: tree[path] for path in group.paths}

    def is_decayed(params: Any) -> dict[str, bool]:
        return {path: path in decayed for path in params}

    def rule(group: Group) -> optax.GradientTransformation:
        if config.name == 'sgd':
            direction = optax.trace(decay=config.momentum, nesterov=config.nesterov)
        else:
            direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
        decay = optax.add_decayed_weights(config.weight_decay, mask=is_decayed)
        return optax.chain(direction, decay, optax.scale_by_learning_rate(group.rate))

    def init(params: Any) -> Any:
        return tuple(rule(group).init(part(params, group)) for group in groups)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        steps, states = {}, []
        for group, before in zip(groups, state, strict=True):
            result: Any = rule(group).update(part(updates, group), before, part(params, group))
            step, after = result
            steps |= {path: u * group.scales.get(path, 1.0) for path, u in step.items()}
            states.append(after)
        return steps, tuple(states)

    return optax.GradientTransformation(init, update)
