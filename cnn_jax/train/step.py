"""A training step, from a batch to the next state, and the other functions that are compiled.

`batch → augment → network → loss + regularizers → gradients of the trained leaves → Optax → state`

Everything static is in a `Program`. Everything that may differ between runs of one structure
(rates, learning rate, strengths, seed) is in `values`, an argument, so that a whole arm of an
ablation shares one compilation.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cnn_jax import config as cfg
from cnn_jax import freezing, optim, params, rng
from cnn_jax.config import is_on
from cnn_jax.data.augment import augment_and_normalize, mix
from cnn_jax.data.batches import Batch
from cnn_jax.packing import packed
from cnn_jax.regularizers import (
    Context,
    Regularizer,
    add_terms,
    cross_entropy,
    example_losses,
    log_probabilities,
)
from cnn_jax.train import metrics
from cnn_jax.train.program import Program, State, Values, eval_state_shapes, traced_values


def train_step(
    program: Program, state: State, batch: Batch, values: Values
) -> tuple[State, metrics.Sums]:
    """Take one training step.

    Args:
        program: Everything static.
        state: Before the step.
        batch: `image` (uint8 images, or cached features), `label`, `index`, `mask`.
        values: The config's numbers and the seed, as `traced_values` gives them.

    Returns:
        The state after the step; the sums that the batch's metrics follow from, with the
        `objective` and the `gradient_norm`.
    """
    config = bound_config(program, state, values)
    grads, batch_stats, sums = step_gradients(program, config, state, batch)
    if config.optimizer.clip_norm:
        # g · min(1, c/‖g‖) over all parameters (Pascanu, Mikolov & Bengio 2013, algorithm 1)
        clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
        grads: Any = clip.update(grads, optax.EmptyState())[0]
    if is_on(config.optimizer.gradient_noise):  # after clipping, which would take the gradient out
        key = rng.key(config.seed, 'gradient_noise', state.step)
        grads = optim.add_gradient_noise(key, grads, config.optimizer.gradient_noise, state.step)

    trainable, frozen = params.partition(state.params, program.trainable)
    whole = params.merge(grads, jax.tree.map(jnp.zeros_like, frozen))  # which the optimizer masks
    updates: Any
    updates, opt_state = program.optimizer(config).update(
        whole, state.opt_state, state.params, value=sums['objective']
    )
    trainable: Any = optax.apply_updates(trainable, params.partition(updates, trainable)[0])
    if is_on(config.optimizer.max_norm):
        for path in program.acted_on['optimizer.max_norm_on']:
            trainable[path] = optim.project_max_norm(trainable[path], config.optimizer.max_norm)
    averaged: Any = state.averaged
    if program.averages:
        weight = averaging_weight(config.train, state.step, program.spec.steps_per_epoch)
        averaged = optax.incremental_update(trainable, averaged, weight)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params.merge(trainable, frozen),
        batch_stats=batch_stats,
        opt_state=opt_state,
        averaged=averaged,
    )
    return state, sums


def check_step(program: Program) -> None:
    """Trace a step on images: what cannot be trained raises its error before anything is."""
    config, count = program.config, program.config.data.batch
    program = dataclasses.replace(program, cached='')
    kinds = {'label': jnp.int32, 'index': jnp.int32, 'mask': jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct((count,), kind) for name, kind in kinds.items()}
    batch['image'] = jax.ShapeDtypeStruct((count, *program.spec.image_shape), jnp.uint8)

    def take(weights: Any, batch: Any, values: Values) -> Any:
        shapes = eval_state_shapes(program)
        blank: Any = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        begun = program.optimizer(config).init(weights)
        state = dataclasses.replace(blank, params=weights, opt_state=begun)
        return train_step(program, state, batch, values)

    jax.eval_shape(take, program.shapes, batch, traced_values(config))


def bound_config(program: Program, state: State, values: Values) -> cfg.Config:
    """The config with its numbers at the state's step.

    dropout(t) = dropout · min(1, t / drop_ramp), t the share of the training that is done

    Source: Ghiasi et al. 2018, "DropBlock", section 3: a linear scheme with `drop_ramp` = 1.
    """
    config = cfg.bind(program.config, values)
    if not is_on(config.model.drop_ramp):
        return config
    done = state.step / float(program.spec.phase_ends[-1])
    share = jnp.minimum(1.0, done / config.model.drop_ramp)
    return cfg.replace(config, {'model.dropout': config.model.dropout * share})


def step_gradients(
    program: Program, config: cfg.Config, state: State, batch: Batch
) -> tuple[params.Flat, dict[str, Any], metrics.Sums]:
    """The gradients of a training step as they are before clipping.

    They are the mean over `optimizer.accumulate` equal micro-batches, one after the other. That
    loop is unrolled: XLA's CPU convolutions are ten times slower inside a compiled one.

    Returns:
        The gradients of the trained parameters; the batch statistics after the last micro-batch;
        the sums over all, with the `objective` and the `gradient_norm`.
    """
    batch = _augmented(program, config, batch, rng.key(config.seed, 'augment', state.step))
    trainable, frozen = params.partition(state.params, program.trainable)
    count = config.optimizer.accumulate
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    keys = jax.random.split(rng.key(config.seed, 'dropout', state.step), count)
    value_and_grad = jax.value_and_grad(
        functools.partial(_objective, program, config, state, frozen), has_aux=True
    )

    def gradients(trainable: params.Flat) -> Any:
        batch_stats: Any = state.batch_stats
        total: Any = None
        for i, key in enumerate(keys):
            part = {name: leaf[i] for name, leaf in parts.items()}
            (_, (batch_stats, sums)), grads = value_and_grad(trainable, batch_stats, part, key)
            new = grads, sums
            total = new if total is None else jax.tree.map(jnp.add, total, new)
        grads, sums = total
        sums['objective'] /= count
        return jax.tree.map(lambda g: g / count, grads), batch_stats, sums

    grads, batch_stats, sums = gradients(trainable)
    if is_on(config.optimizer.sam):  # statistics and metrics remain those of the weights themselves
        grads, *_ = gradients(optim.sam_perturb(trainable, grads, config.optimizer.sam))
    grads = packed(grads)
    return grads, batch_stats, sums | {'gradient_norm': optim.global_norm(grads)}


def _augmented(program: Program, config: cfg.Config, batch: Batch, key: Array) -> Batch:
    """The batch as the network sees it in training."""
    weights = jnp.asarray(program.spec.class_weights, jnp.float32)
    if weights.size:
        batch = batch | {'weight': weights[batch['label']]}
    if program.cached:
        return batch
    augment, index = config.augment, batch['index']
    images = augment_and_normalize(augment, key, batch['image'], index, program.spec.prepare)
    if is_on(augment.mixup) or is_on(augment.cutmix):
        images, other, share = mix(augment, key, images, batch['label'], index)
        batch = batch | {'other_label': other, 'share': share}
        if weights.size:
            batch['other_weight'] = weights[other]
    return batch | {'image': images}


def _objective(
    program: Program,
    config: cfg.Config,
    state: State,
    frozen: params.Flat,
    trainable: params.Flat,
    batch_stats: dict[str, Any],
    batch: Batch,
    key: Array,
) -> tuple[Array, tuple[dict[str, Any], metrics.Sums]]:
    """The mean loss of the batch's examples plus the penalties, and what comes with it."""
    variables = {'params': params.merge(trainable, frozen), 'batch_stats': batch_stats}
    network = functools.partial(forward, program, config, variables)
    log_probs, batch_stats, activations = network(batch['image'], key)

    def again(images: Array, mask: int = 0) -> Array:
        return network(images, jax.random.fold_in(key, mask) if mask else key)[0]

    def context(regularizer: Regularizer) -> Context:
        paths, watches = program.acted_on.get(regularizer.on, []), regularizer.needs_activations
        some = regularizer.on and not watches
        return Context(
            config,
            {path: trainable[path] for path in paths} if some else trainable,
            state.init_params if regularizer.needs_initial else {},
            {path: activations[path] for path in paths} if watches else {},
            log_probs,
            batch,
            again,
        )

    each = example_losses(config, log_probs, batch)
    each, penalty = add_terms(program.regularizers, context, each)
    sums = metrics.batch_sums(log_probs, each, batch['label'], batch['mask'])
    objective = sums['loss'] / sums['count'] + penalty
    return objective, (batch_stats, sums | {'objective': objective})


def forward(
    program: Program, config: cfg.Config, variables: dict[str, Any], images: Array, key: Array
) -> tuple[Float[Array, 'b k'], dict[str, Any], params.Flat]:
    """`Program.forward` with log class probabilities in place of logits."""
    logits, statistics, outputs = program.forward(config, variables, images, key)
    return log_probabilities(logits), statistics, outputs


def predict_step(
    program: Program, state: State, images: Array, values: Values
) -> Float[Array, 'b k']:
    """Log class probabilities of uint8 images (or of cached features) in inference."""
    config = cfg.bind(program.config, values)
    net = program.spec.network(config)
    x = images if program.cached else program.spec.prepare(images)
    mode: dict[str, Any] = freezing.mode_arguments(net, train=False)
    with nn.intercept_methods(program.evaluating):
        logits: Any = net.apply(state.eval_variables, x, **mode, **program.entry)
    return log_probabilities(logits)


def eval_step(program: Program, state: State, batch: Batch, values: Values) -> metrics.Sums:
    """The sums that a batch's metrics in inference follow from."""
    return eval_sums(predict_step(program, state, batch['image'], values), batch)


def eval_sums(log_probs: Float[Array, 'b k'], batch: Batch) -> metrics.Sums:
    """`eval_step` of a batch whose log class probabilities are known."""
    labels, mask = batch['label'], batch['mask']
    sums = metrics.batch_sums(log_probs, cross_entropy(log_probs, labels), labels, mask)
    return sums | {'confusion': metrics.confusion(log_probs, labels, mask)}


def estimate_step(
    program: Program, state: State, batch: Batch, count: Int[Array, ''], values: Values
) -> dict[str, Any]:
    """`State.eval_batch_stats` after one more batch, the `count`-th from 1.

    The moving averages of batch normalization lag behind the weights, were taken under dropout,
    and belong to the raw weights where averaged ones are evaluated. Here they are taken anew, from
    passes without noise before each evaluation and checkpoint; training never sees them.
    """
    changes = cfg.without_noise(program.config)
    config = cfg.bind(cfg.replace(program.config, changes), values | changes)
    images = batch['image'] if program.cached else program.spec.prepare(batch['image'])
    variables = state.eval_variables | {'batch_stats': state.batch_stats}
    key = rng.key(config.seed, 'dropout')
    with nn.intercept_methods(freezing.without_memory):
        _, batch_stats, _ = forward(program, config, variables, images, key)
    return pool_statistics(state.eval_batch_stats, batch_stats, count)


def pool_statistics(average: dict[str, Any], batch: dict[str, Any], count: Int[Array, '']):
    """The batch statistics of n equal batches, from those of n − 1 and of the n-th (from 1).

    mean ← mean + δ/n,  var ← var + (σ² − var)/n + δ²·(n − 1)/n²,  δ = μ − mean

    μ and σ² of the batch are the leaves `mean` and `var` of a module. Other leaves are averaged.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; the update is that of
        Chan, Golub & LeVeque 1983.
    """
    old, new = params.flatten(average), params.flatten(batch)
    n = jnp.asarray(count, jnp.float32)
    moved = {path: leaf + (new[path] - leaf) / n for path, leaf in old.items()}
    for path in moved:
        module, _, name = path.rpartition('/')
        mean = f'{module}/mean'
        if name == 'var' and mean in old:
            moved[path] += jnp.square(new[mean] - old[mean]) * (n - 1) / (n * n)
    # Frozen statistics are the same in each batch, and keep their bits.
    return params.unflatten(
        {
            path: jnp.where(count == 1, new[path], leaf).astype(new[path].dtype)
            for path, leaf in moved.items()
        }
    )


def averaging_weight(
    config: cfg.Train, step: Int[Array, ''], steps_per_epoch: float
) -> Float[Array, '']:
    """The weight s of the newest parameters in their average after a step: a ← (1 − s)·a + s·w.

    ema:       s = 1 − d, so a_t = d^t·w_0 + (1 − d)·Σ_i d^(t−i)·w_i
    swa_from:  s = 1/n for the n-th step after the first `swa_from` epochs, so a is their mean;
               until then s = 1, so a is w

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging";
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
        who take one of the weights an epoch or a cycle; here every step's.
    """
    if is_on(config.ema):
        return jnp.asarray(1 - config.ema)
    first = jnp.round(config.swa_from * steps_per_epoch)
    return 1 / jnp.maximum(step + 1 - first, 1)
