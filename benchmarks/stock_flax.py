"""The peer: the strided net and its step as a Flax example would write them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class StockNet(nn.Module):
    """The same layers as `cnn_jax.models.strided_net.StridedNet`, from Flax's own modules."""

    stem: bool
    widths: tuple[int, ...]
    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x, train):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-3)(x)

        def drop(rate, x):
            return nn.Dropout(rate, deterministic=not train)(x)

        if self.stem:
            x = nn.Conv(16, (7, 7), strides=2, padding='VALID')(x)
        for width in self.widths:
            x = norm(nn.relu(nn.Conv(width, (3, 3))(x)))
            x = norm(nn.relu(nn.Conv(width, (3, 3), strides=2)(x)))
            x = drop(0.25, x)
        x = x.reshape(x.shape[0], -1)
        x = drop(0.5, norm(nn.relu(nn.Dense(self.hidden)(x))))
        return nn.Dense(self.outputs)(x)


def stock_step(model: nn.Module, l2: float, rate: float):
    """`init(images)` and a jitted, donating `step(state, images, labels)`; Adam and the L2."""
    optimizer = optax.adam(rate, eps=1e-7)

    def init(images):
        drawn = model.init(jax.random.key(0), images, False)
        return drawn['params'], drawn['batch_stats'], optimizer.init(drawn['params'])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels, key):
        weights, stats, opt_state = state

        def loss(weights):
            logits, updated = model.apply(
                {'params': weights, 'batch_stats': stats},
                images,
                True,
                rngs={'dropout': key},
                mutable=['batch_stats'],
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            squares = sum(
                jnp.sum(module['kernel'] ** 2) for name, module in weights.items() if 'Conv' in name
            )
            return each.mean() + l2 * squares, updated['batch_stats']

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(weights)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        return (optax.apply_updates(weights, updates), stats, opt_state), value

    return init, step
