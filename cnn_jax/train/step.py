"""The training state and the pure functions that a run is made of: init, train, evaluate, predict.

`data → augment → model → loss → grads of the trainable leaves → Optax → state`. Everything that
may differ between runs of one structure (rates, learning rate, penalties, seed) is an argument,
so that a whole arm of an ablation shares one compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from cnn_jax import config as cfg
from cnn_jax import losses, optim, params, rng
from cnn_jax.data.augment import augmented
from cnn_jax.models.build import build
from cnn_jax.train import metrics
from cnn_jax.train.frozen import frozen_modules
from cnn_jax.train.task import Task, phase_members, update_groups

Batch = dict[str, Array]  # image uint8 [b h w c], label int32 [b], index int32 [b], mask bool [b]
Values = dict[str, Any]  # dotted config path -> number, and 'seed'


@flax.struct.dataclass
class State:
    """All that a run is, besides its config and its data.

    `opt_state` and `ema` have leaves for trainable parameters only; `ema` is {} without averaging.
    """

    step: Int[Array, '']
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    ema: dict[str, Array]


@dataclass(frozen=True)
class Steps:
    """The functions of one phase; `train` and `evaluate` are meant to be jitted once.

    `init` makes the state before the first step of the first phase, and `enter` that of this
    phase from the last state of the one before.
    """

    init: Callable[[int], State]
    enter: Callable[[State], State]
    train: Callable[[State, Batch, Values], tuple[State, metrics.Sums]]
    evaluate: Callable[[State, Batch, Values], metrics.Sums]
    predict: Callable[[State, Array, Values], Array]
    shapes: dict[str, Any]  # of the parameters
    trainable: list[str]
    penalized: list[str]
    decayed: list[str]
    cached: bool


def values_of(config: cfg.Config) -> Values:
    """The arguments of the compiled steps: every `value` field, and the seed."""
    return {**cfg.values(config), 'seed': jnp.uint32(config.seed)}


def make_steps(config: cfg.Config, task: Task, phase: int = 0, cached: bool = False) -> Steps:
    """Build the functions of one phase of a run.

    Args:
        config: A validated config. Its value fields are ignored: they come in as arguments.
        task: Shapes, preprocessing and length.
        phase: 0, or 1 for the one that `config.unfreeze` describes.
        cached: Whether batches hold features of the frozen backbone instead of images.

    Errors:
        UserError: A parameter pattern matches nothing, or the images are too small for the net.
    """
    model = build(config.model, task.num_classes)
    blank = np.zeros((1, *task.image_shape), np.uint8)

    def draw(seed) -> Any:
        return model.init(rng.key(seed, 'params'), task.prepare(jnp.asarray(blank)), train=False)

    shapes = jax.eval_shape(draw, 0)['params']
    names = list(params.flatten(shapes))
    members = phase_members(config, names)[: phase + 1]
    trainable = sorted(name for group in members for name in group)
    frozen = (config.train.frozen, config.unfreeze.frozen)[phase]
    penalized = _penalized(names, trainable, config.loss.l2_on, config.loss.l2, 'loss.l2_on')
    decayed = _penalized(
        names,
        trainable,
        config.optimizer.decay_on,
        config.optimizer.weight_decay,
        'optimizer.decay_on',
    )
    in_inference = frozen_modules(names, trainable, frozen)
    method = 'classify' if cached else None

    def chain(current: cfg.Config) -> optax.GradientTransformation:
        groups = update_groups(current, task, members)
        return optim.chain(current.optimizer, groups, decayed)

    given = params.flatten(task.initial(shapes)) if task.initial else {}

    # Compiled once, run once a seed: at this level it compiles in a third of the time.
    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 1})
    def draw_the_rest(seed):
        drawn = draw(seed)
        flat = params.flatten(drawn['params'])
        rest = {path: leaf for path, leaf in flat.items() if path not in given}
        return rest, drawn.get('batch_stats', {})

    def init(seed: int) -> State:
        rest, batch_stats = draw_the_rest(seed)
        flat = rest | {path: jnp.copy(leaf) for path, leaf in given.items()}
        learned = {path: flat[path] for path in members[0]}
        first = optim.chain(config.optimizer, update_groups(config, task, members[:1]), decayed)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params.unflatten(flat),
            batch_stats=batch_stats,
            opt_state=first.init(learned),
            # A copy: the step donates its input, and a buffer cannot be donated twice.
            ema=jax.tree.map(jnp.copy, learned) if config.train.ema else {},
        )

    def enter(state: State) -> State:
        flat = params.flatten(state.params)
        fresh: Any = chain(config).init({path: flat[path] for path in trainable})
        kept = state.opt_state
        new = {path: jnp.copy(flat[path]) for path in trainable if path not in state.ema}
        return dataclasses.replace(
            state,
            opt_state=(*kept, *fresh[len(kept) :]),
            ema={**state.ema, **new} if config.train.ema else {},
        )

    def gradients(current: cfg.Config, learned, fixed, batch_stats, batch: Batch, dropout):
        """Gradient of the trainable leaves, the new batch statistics, and the metrics' sums."""

        def loss(learned):
            net = build(current.model, task.num_classes)
            variables = {'params': params.merge(learned, fixed), 'batch_stats': batch_stats}
            with nn.intercept_methods(in_inference):
                applied: Any = net.apply(
                    variables,
                    batch['image'],
                    train=True,
                    rngs={'dropout': dropout},
                    mutable=['batch_stats'],
                    method=method,
                )
            logits, updated = applied
            log_probs = losses.log_probabilities(logits)
            each = losses.cross_entropy(log_probs, batch['label'], current.loss.label_smoothing)
            sums = metrics.batch_sums(log_probs, each, batch['label'], batch['mask'])
            penalty = losses.l2_penalty(learned, penalized, current.loss.l2)
            objective = sums['loss'] / sums['count'] + penalty
            return objective, (updated.get('batch_stats', batch_stats), sums)

        (objective, (batch_stats, sums)), grads = jax.value_and_grad(loss, has_aux=True)(learned)
        return grads, batch_stats, sums | {'objective': objective}

    def train(state: State, batch: Batch, values: Values) -> tuple[State, metrics.Sums]:
        current = cfg.replace(config, values)
        learned, fixed = params.partition(state.params, trainable)
        if not cached:
            key = rng.key(current.seed, 'augment', state.step)
            images = task.prepare(batch['image'])
            batch = batch | {'image': augmented(config.augment, key, images, batch['index'])}
        dropout = rng.key(current.seed, 'dropout', state.step)
        grads, batch_stats, sums = _accumulate(
            lambda stats, piece, key: gradients(current, learned, fixed, stats, piece, key),
            state.batch_stats,
            batch,
            jax.random.split(dropout, config.optimizer.accumulate),
        )
        updates, opt_state = chain(current).update(grads, state.opt_state, learned)
        learned: Any = optax.apply_updates(learned, updates)
        ema: Any = state.ema
        if config.train.ema:
            ema = optax.incremental_update(learned, ema, 1 - config.train.ema)
        new = State(
            step=state.step + 1,
            params=params.merge(learned, fixed),
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
        )
        return new, sums | {'gradient_norm': optim.global_norm(grads)}

    def outputs(state: State, images: Array, values: Values) -> Array:
        """Log class probabilities in inference, from the averaged weights where there are any."""
        current = cfg.replace(config, values)
        learned, fixed = params.partition(state.params, trainable)
        variables = {
            'params': params.merge(state.ema or learned, fixed),
            'batch_stats': state.batch_stats,
        }
        net = build(current.model, task.num_classes)
        x = images if cached else task.prepare(images)
        logits: Any = net.apply(variables, x, train=False, method=method)
        return losses.log_probabilities(logits)

    def evaluate(state: State, batch: Batch, values: Values) -> metrics.Sums:
        log_probs = outputs(state, batch['image'], values)
        each = losses.cross_entropy(log_probs, batch['label'])
        return metrics.batch_sums(log_probs, each, batch['label'], batch['mask'])

    return Steps(
        init, enter, train, evaluate, outputs, shapes, trainable, penalized, decayed, cached
    )


def _penalized(names, trainable, patterns, strength: float, field: str) -> list[str]:
    """The trainable paths that a penalty acts on; a pattern in use must match something.

    They do not depend on the strength: a compiled step serves every one, 0 included.
    """
    if strength:
        params.select(names, patterns, field=field)
    return [name for name in trainable if params.matches(name, patterns)]


def _accumulate(gradients: Callable, batch_stats, batch: Batch, keys: Array):
    """Mean gradient over len(keys) equal micro-batches taken in turn; batch statistics follow.

    The loop is unrolled: XLA's CPU convolutions are ten times slower inside a compiled one.
    """
    pieces = len(keys)
    parts = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
    grads, sums = None, None
    for number in range(pieces):
        piece = jax.tree.map(lambda x, number=number: x[number], parts)
        new_grads, batch_stats, new_sums = gradients(batch_stats, piece, keys[number])
        grads = new_grads if grads is None else jax.tree.map(jnp.add, grads, new_grads)
        sums = new_sums if sums is None else jax.tree.map(jnp.add, sums, new_sums)
    assert grads is not None
    assert sums is not None
    sums['objective'] /= pieces
    return jax.tree.map(lambda g: g / pieces, grads), batch_stats, sums
