"""The pure functions that a run is made of: init, train, evaluate, predict.

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
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from cnn_jax import config as cfg
from cnn_jax import losses, optim, params, rng
from cnn_jax.data.augment import augment_and_normalize, mix
from cnn_jax.data.batches import Batch
from cnn_jax.models import build
from cnn_jax.train import averaging, metrics, precise_norm
from cnn_jax.train.frozen import frozen_modules
from cnn_jax.train.objective import make_gradients
from cnn_jax.train.state import State, Values
from cnn_jax.train.task import Task, acted_on, penalized_by, phase_members, update_groups


@dataclass(frozen=True)
class Steps:
    """The functions of one phase; `train`, `evaluate` and `estimate` are meant to be jitted once.

    `init` makes the state before the first step of the first phase, and `enter` that of this
    phase from the last state of the one before. `estimate` gives `State.precise` after one more
    batch, of which it takes the number, from 1. `penalized` are the paths of each penalty, by its
    field in `config.loss`.
    """

    init: Callable[[int], State]
    enter: Callable[[State], State]
    train: Callable[[State, Batch, Values], tuple[State, metrics.Sums]]
    evaluate: Callable[[State, Batch, Values], metrics.Sums]
    estimate: Callable[[State, Batch, Int[Array, ''], Values], dict[str, Any]]
    predict: Callable[[State, Array, Values], Array]
    shapes: dict[str, Any]  # of the parameters
    trainable: list[str]
    penalized: dict[str, list[str]]
    decayed: list[str]
    cached: bool


def values_of(config: cfg.Config) -> Values:
    """The arguments of the compiled steps: every `value` field, and the seed."""
    return {**cfg.values(config), 'seed': np.uint32(config.seed)}


def make_steps(config: cfg.Config, task: Task, phase: int = 0, cached: bool = False) -> Steps:
    """Build the functions of one phase of a run.

    Args:
        config: A validated config. Its value fields come in as arguments; of those given here
            only whether a switch is on matters.
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
    of_all_phases = phase_members(config, names)
    members = of_all_phases[: phase + 1]
    ever = {name for group in of_all_phases for name in group}
    trainable = sorted(name for group in members for name in group)
    frozen = (config.train.frozen, config.unfreeze.frozen)[phase]
    optimizer = config.optimizer
    penalized = penalized_by(config.loss, names, ever, trainable)
    decayed, constrained = (
        acted_on(names, ever, trainable, patterns, strength, f'optimizer.{field}')
        for patterns, strength, field in (
            (optimizer.decay_on, optimizer.weight_decay, 'decay_on'),
            (optimizer.max_norm_on, optimizer.max_norm, 'max_norm_on'),
        )
    )
    in_inference = frozen_modules(names, trainable, frozen)
    method = 'classify' if cached else None
    gradients = make_gradients(config, task, penalized, in_inference, method)

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

    def copies(flat: params.Flat, names: list[str]) -> params.Flat:
        # The step donates its input, and a buffer cannot be donated twice.
        return {name: jnp.copy(flat[name]) for name in names}

    averaged = trainable if config.train.ema or config.train.swa_from else []
    pulled = penalized['l2_sp'] if config.loss.l2_sp else []

    def init(seed: int) -> State:
        rest, batch_stats = draw_the_rest(seed)
        flat = rest | {path: jnp.copy(leaf) for path, leaf in given.items()}
        learned = {path: flat[path] for path in members[0]}
        first = optim.chain(optimizer, update_groups(config, task, members[:1]), decayed)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params.unflatten(flat),
            batch_stats=batch_stats,
            opt_state=first.init(learned),
            ema=copies(flat, [name for name in averaged if name in learned]),
            start=copies(flat, [name for name in pulled if name in learned]),
            precise=jax.tree.map(jnp.copy, batch_stats) if config.train.precise_norm else {},
        )

    def enter(state: State) -> State:
        flat = params.flatten(state.params)
        fresh: Any = chain(config).init({path: flat[path] for path in trainable})
        kept = state.opt_state
        return dataclasses.replace(
            state,
            opt_state=(*kept, *fresh[len(kept) :]),
            ema=copies(flat, averaged) | state.ema,
            start=copies(flat, pulled) | state.start,
        )

    def train(state: State, batch: Batch, values: Values) -> tuple[State, metrics.Sums]:
        current = cfg.replace(config, values)
        if config.model.drop_ramp:
            current = ramped(current, state.step / task.ends[-1])
        learned, fixed = params.partition(state.params, trainable)
        if not cached:
            key = rng.key(current.seed, 'augment', state.step)
            images, index = batch['image'], batch['index']
            augment = bound_augment(config.augment, current.augment)
            images = augment_and_normalize(augment, key, images, index, task.prepare)
            batch = batch | {'image': images}
            if config.augment.mixup or config.augment.cutmix:
                mixed = mix(augment, key, images, batch['label'], index)
                batch |= dict(zip(('image', 'other_label', 'share'), mixed))
        key = rng.key(current.seed, 'dropout', state.step)
        grads, batch_stats, sums = gradients(
            current, learned, fixed, state.start, state.batch_stats, batch, key
        )
        sums |= {'gradient_norm': optim.global_norm(grads)}
        if optimizer.clip_norm:
            grads = optim.clipped(grads, optimizer.clip_norm)
        if optimizer.gradient_noise:  # after clipping, which would take the gradient out of it
            key = rng.key(current.seed, 'gradient_noise', state.step)
            grads = optim.with_noise(key, grads, current.optimizer.gradient_noise, state.step)
        updates, opt_state = chain(current).update(grads, state.opt_state, learned)
        learned: Any = optax.apply_updates(learned, updates)
        if optimizer.max_norm:
            bound = current.optimizer.max_norm
            learned |= {path: optim.bounded(learned[path], bound) for path in constrained}
        ema = state.ema
        if averaged:
            share = averaging.share(config.train, current.train, state.step, task.steps_per_epoch)
            ema = averaging.averaged(ema, learned, share)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params.merge(learned, fixed),
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
        )
        return new, sums

    def estimate(state: State, batch: Batch, number: Array, values: Values) -> dict[str, Any]:
        current = cfg.replace(config, values | precise_norm.quiet(config))
        net = build(current.model, task.num_classes)
        x = batch['image'] if cached else task.prepare(batch['image'])
        with nn.intercept_methods(in_inference):
            applied: Any = net.apply(
                state.evaluated | {'batch_stats': state.batch_stats},
                x,
                train=True,
                rngs={'dropout': rng.key(current.seed, 'dropout')},
                mutable=['batch_stats'],
                method=method,
            )
        return precise_norm.pooled(state.precise, applied[1].get('batch_stats', {}), number)

    def outputs(state: State, images: Array, values: Values) -> Array:
        """Log class probabilities in inference."""
        current = cfg.replace(config, values)
        net = build(current.model, task.num_classes)
        x = images if cached else task.prepare(images)
        logits: Any = net.apply(state.evaluated, x, train=False, method=method)
        return losses.log_probabilities(logits)

    def evaluate(state: State, batch: Batch, values: Values) -> metrics.Sums:
        log_probs = outputs(state, batch['image'], values)
        each = losses.cross_entropy(log_probs, batch['label'])
        return metrics.batch_sums(log_probs, each, batch['label'], batch['mask'])

    return Steps(
        init,
        enter,
        train,
        evaluate,
        estimate,
        outputs,
        shapes,
        trainable,
        penalized,
        decayed,
        cached,
    )


def bound_augment(static: cfg.Augment, traced: cfg.Augment) -> cfg.Augment:
    """The traced settings, with 0 for every switch that is off."""
    fields = cfg.fields_by_path(static)
    off = {n: 0.0 for n, f in fields.items() if f.metadata.get('switch') and not getattr(static, n)}
    return dataclasses.replace(traced, **off)


def ramped(config: cfg.Config, done: Array) -> cfg.Config:
    """The config with the rate of dropout that holds after a share of the training.

    r(t) = r · min(1, t / drop_ramp)

    Args:
        config: With `model.dropout` r and `model.drop_ramp`, both perhaps traced.
        done: t, 0 at the start of the run and 1 at its end.

    Source: Ghiasi et al. 2018, "DropBlock", section 3: a linear scheme with `drop_ramp` = 1.
    """
    share = jnp.minimum(1.0, done / config.model.drop_ramp)
    return cfg.replace(config, {'model.dropout': config.model.dropout * share})
