"""Monte-Carlo dropout: how sure a network is, from many draws of its dropout."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import entr

from cnn_jax import losses, rng
from cnn_jax.errors import UserError
from cnn_jax.models import Classifier
from cnn_jax.nn.noise import Dropout
from cnn_jax.train.restore import Run


def with_dropout(call, args, kwargs, context):
    """A Linen interceptor that lets every `Dropout` act as in training, and nothing else.

    In a network called with `train=False`, normalization then stays in inference mode, and noise
    on the images off.
    """
    if isinstance(context.module, Dropout) and context.method_name == '__call__':
        kwargs = kwargs | {'train': True}
    return call(*args, **kwargs)


def sampler(run: Run) -> Callable[[Array | np.ndarray], Callable[[int], Float[Array, 'b k']]]:
    """From images [b, h, w, c], and then the number of a draw, to log class probabilities.

    The draws follow from the run's seed and step, so that they can be had again. Dropout of every
    kind acts, and stochastic depth. A backbone, which has none, sees the images once.

    Errors:
        UserError: The network has no dropout, so that every draw would be the same.
    """
    model = run.config.model
    in_trunk = model.name == 'strided_net' and (model.dropout or model.stochastic_depth)
    if not in_trunk and not (model.hidden and model.head_dropout):
        raise UserError(
            'the network of this run has no dropout, so Monte-Carlo dropout would draw the same '
            'answer each time; leave --mc out, or train with config.model.head_dropout above 0'
        )

    has_backbone = isinstance(run.model, Classifier)

    @jax.jit
    def prepared(variables, images) -> Any:
        x = run.task.prepare(images)
        if has_backbone:
            return run.model.apply(variables, x, train=False, method='features')
        return x

    @jax.jit
    def sample(variables, x, number):
        key = rng.key(run.config.seed, 'dropout', run.step + number)
        method = 'classify' if has_backbone else None
        with nn.intercept_methods(with_dropout):
            logits: Any = run.model.apply(
                variables, x, train=False, rngs={'dropout': key}, method=method
            )
        return losses.log_probabilities(logits)

    def of_images(images):
        x = prepared(run.variables, jnp.asarray(images))
        return lambda number: sample(run.variables, x, number)

    return of_images


def uncertainty(
    log_probs: Float[np.ndarray, 's b k'],
) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, ' b'], Float[np.ndarray, ' b']]:
    """What the draws of a network's answers say together.

    p̄ = mean_s p_s,   H = −Σ_k p̄ log p̄,   I = H − mean_s(−Σ_k p_s log p_s)

    H is how unsure the answer is for whatever reason, I how much of that the draws disagree on:
    of two images with the same H, more data of its kind would help the one with the larger I.

    Args:
        log_probs: Log class probabilities, one answer a draw.

    Returns:
        p̄, the predictive entropy H and the mutual information I of answer and weights, in nats.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation"; H and I as in Gal 2016,
    "Uncertainty in Deep Learning", section 3.3.1.
    """
    probabilities = np.exp(np.asarray(log_probs, np.float64))
    mean = probabilities.mean(axis=0)
    entropy = entr(mean).sum(axis=-1)
    within = entr(probabilities).sum(axis=-1).mean(axis=0)
    return mean, entropy, np.maximum(entropy - within, 0)
