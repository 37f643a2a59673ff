"""Learning-rate schedules, the optimizer, and what else changes gradients or weights in a step.

The optimizer is one `optax.partition` over all parameters: frozen ones have no memory in it, no
decay and no update. Numbers may be traced, so nothing here branches on one.
"""

import ast
import inspect
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Key

from cnn_jax.config import Optimizer
from cnn_jax.errors import UserError
from cnn_jax.freezing import FROZEN, keep
from cnn_jax.packing import joined
from cnn_jax.params import Flat, map_paths

LAST_STEP = 2**31 - 1  # that an int32 holds
# These need more than a training step gives them, a rate without a schedule, or weights other than
# the trained ones to evaluate.
UNFIT = re.compile('sam|schedule_free.*|lbfgs|dpsgd|noisy_sgd|rprop|sophia|scale_by.*')


def schedule(config: Optimizer, steps_per_epoch: float, total_steps: int) -> Callable:
    """The learning rate as a function of the step.

    constant:      lr
    cosine:        lr · ½(1 + cos(π·t/T))
    step:          lr · decay_rate^(number of boundaries ≤ t)
    inverse_time:  lr / (1 + decay_rate · t / decay_steps)       (Keras's InverseTimeDecay)

    each multiplied by min(1, (t + 1)/W) during a linear warm-up of W steps; t counts from 0.
    After the warm-up, the cosine runs over the T − W steps that are left. Numbers of the config
    may be traced; epochs are converted to steps here.
    """
    # A step is an int32, which no run reaches the end of: what lies beyond it is never.
    warmup, *boundaries = (
        round(min(epochs * steps_per_epoch, LAST_STEP))
        for epochs in (config.warmup_epochs, *config.boundaries)
    )

    def factor(step: Array) -> Array:
        if config.schedule == 'cosine':
            done = (step - warmup) / float(max(total_steps - warmup, 1))
            return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        if config.schedule == 'step':
            passed = jnp.sum(step >= jnp.array(boundaries, jnp.int32))
            return jnp.asarray(config.decay_rate) ** passed
        if config.schedule == 'inverse_time':
            return 1 / (1 + config.decay_rate * step / float(config.decay_steps))
        return jnp.ones(())

    def rate(step: Array) -> Array:
        ramp = jnp.minimum(1.0, (step + 1) / float(warmup)) if warmup else 1.0
        return config.learning_rate * ramp * factor(step)

    return rate


def global_norm(tree: Any) -> Array:
    """√Σ‖leaf‖² over all leaves; as inner products, which take XLA on a CPU a third of the time."""
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(tree)]
    leaves = joined(wide)
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in leaves))


def sam_perturb(params: Flat, gradients: Flat, radius: float | Array) -> Flat:
    """The point at which sharpness-aware minimization (SAM) takes the gradient.

    w + ρ·g/‖g‖, ‖g‖ over all parameters: the worst point within ρ of w, to first order

    g is the gradient of the whole objective at w; w itself is returned where it is 0.

    Source: Foret et al. 2021, "Sharpness-Aware Minimization", equation 2 with p = 2.
    """
    scale = radius / jnp.maximum(global_norm(gradients), 1e-12)
    return jax.tree.map(lambda w, g: w + scale * g, params, gradients)


def add_gradient_noise(
    key: Key[Array, ''], gradients: Flat, strength: float | Array, step: int | Array
) -> Flat:
    """The gradients plus Gaussian noise that fades as training goes on.

    g + N(0, σ²), σ² = η/(1 + t)^0.55, t from 0

    The noise of a parameter depends on the key and on its path alone.

    Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep
        Networks", equations 1 and 2 with γ = 0.55.
    """
    deviation = jnp.sqrt(strength / (1.0 + step) ** 0.55)

    def noise(path: str, leaf: Array) -> Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return deviation * jax.random.normal(leaf_key, leaf.shape, leaf.dtype)

    return {path: leaf + noise(path, leaf) for path, leaf in gradients.items()}


def project_max_norm(kernel: Float[Array, '... o'], bound: float | Array) -> Float[Array, '... o']:
    """Max-norm constraint: the weights into an output unit, scaled down to a norm they may have.

    w_j ← w_j · min(1, c/‖w_j‖₂), over all axes but the last; c > 0

    Units within the bound keep their bits.

    Source: Srivastava et al. 2014, "Dropout", section 5.1 (c of 3 to 4 with dropout).
    """
    norms = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1))))
    return jnp.where(norms > bound, kernel * (bound / jnp.maximum(norms, bound)), kernel)


@dataclass(frozen=True)
class Group:
    """Parameters that one rule updates, with a state of their own; `scales` multiply the rate."""

    paths: Sequence[str]
    rate: Callable
    scales: Mapping[str, float | Array] = field(default_factory=dict)


def make_optimizer(
    config: Optimizer,
    groups: Sequence[Group],
    frozen: Iterable[str] = (),
    decayed: Iterable[str] = (),
    own: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The update rule: `optax.partition` with one part a group, and one that keeps the frozen rest.

    sgd:          u = m ← momentum·m + g                      (Nesterov: u = momentum·m + g)
    adam, adamw:  u = m̂ / (√v̂ + epsilon)                      (Kingma & Ba 2015, algorithm 1)
    w ← w − scale·rate(t)·(u + weight_decay·w [w decayed])    (Loshchilov & Hutter 2019)

    Adam's m̂ and v̂ are without their bias toward 0, as in PyTorch and Optax. Keras adds epsilon to
    √v before that correction, which at step t is ε here of epsilon/√(1 − b2^t): 32 times its 1e-7
    at the first step. Any other name is one of `optax` or `optax.contrib`, made with
    `config.arguments`; `own` takes the place of the rule that the config names.
    """
    label = dict.fromkeys(frozen, FROZEN)
    parts: dict[Any, optax.GradientTransformation] = {FROZEN: keep()}
    for number, group in enumerate(groups):
        label |= dict.fromkeys(group.paths, f'group {number}')
        parts[f'group {number}'] = storable(own) if own else _rule(config, group, decayed)
    return optax.partition(parts, lambda tree: map_paths(lambda path, _: label[path], tree))


def _rule(config: Optimizer, group: Group, decayed: Iterable[str]) -> optax.GradientTransformation:
    if config.name == 'sgd':
        direction = optax.trace(decay=config.momentum, nesterov=config.nesterov)
    elif config.name in ('adam', 'adamw'):
        direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    else:
        return optax.chain(storable(_from_optax(config, group.rate)), _scaled(group.scales))
    named = set(decayed)
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda tree: map_paths(lambda path, _: path in named, tree)
    )
    rate = optax.scale_by_learning_rate(group.rate)
    return optax.chain(direction, decay, rate, _scaled(group.scales))


def storable(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with the random keys of its state as the numbers that they consist of.

    A checkpoint holds numbers, and its digest is of them.
    """
    inner = optax.with_extra_args_support(optimizer)

    def is_key(leaf: Any) -> bool:
        return hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def numbers(state: Any) -> Any:
        return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)

    def init(params: Any) -> Any:
        # A step gives the memory of its state away, which may be that of the user's own key.
        return jax.tree.map(jnp.copy, numbers(inner.init(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        kinds: list[Any] = []

        def begin(tree: Any) -> None:
            leaves = jax.tree.leaves(inner.init(tree))
            kinds.extend(jax.random.key_impl(x) if is_key(x) else None for x in leaves)

        jax.eval_shape(begin, updates if params is None else params)
        leaves, tree = jax.tree.flatten(state)
        leaves = [
            jax.random.wrap_key_data(leaf, impl=kind) if kind else leaf
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        updates, state = inner.update(updates, tree.unflatten(leaves), params, **extra)
        return updates, numbers(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(scales: Mapping[str, float | Array]) -> optax.GradientTransformation:
    """Updates times a factor of their own; paths without one keep theirs."""
    if not scales:
        return optax.identity()

    def times(path: str, update: Array) -> Array:
        return update * scales[path] if path in scales else update

    return optax.stateless(lambda updates, _: map_paths(times, updates))


def _from_optax(config: Optimizer, rate: Callable) -> optax.GradientTransformation:
    """The optimizer that Optax has under `config.name`, or a `UserError`."""
    named = f'config.optimizer.name is {config.name}'
    factory = getattr(optax, config.name, None) or getattr(optax.contrib, config.name, None)
    try:
        parameters = inspect.signature(factory).parameters  # pyright: ignore
    except (TypeError, ValueError):
        parameters = {}
    if 'learning_rate' not in parameters or UNFIT.fullmatch(config.name):
        raise UserError(
            f'{named}; it can be adam, sgd, adamw or an optimizer of optax or optax.contrib that '
            'takes a learning_rate and needs no more than gradients and parameters, such as lion'
        )
    arguments = dict(_argument(each, parameters, named) for each in config.arguments)
    try:
        return factory(rate, **arguments)  # pyright: ignore
    except (TypeError, ValueError) as error:
        raise UserError(f'{named}, which Optax cannot make: {error}') from error


def _argument(text: str, known: Iterable[str], named: str) -> tuple[str, Any]:
    name, equals, value = text.partition('=')
    if not equals or name not in known:
        raise UserError(
            f'{named}, and config.optimizer.arguments has {text!r}; it takes NAME=VALUE with a '
            f'name from {", ".join(each for each in known if each != "learning_rate")}'
        )
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word
