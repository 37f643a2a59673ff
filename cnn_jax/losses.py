"""Task losses and penalties."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cnn_jax.params import Flat


def log_probabilities(logits: Float[Array, 'b o']) -> Float[Array, 'b k']:
    """Log class probabilities: log-softmax, or both sides of a sigmoid for a single output.

    o = 1: [log σ(−z), log σ(z)];   o > 1: z − log Σ exp z

    Args:
        logits: Outputs of the network, one row an example.

    Returns:
        float32; K = 2 classes for one output, else K = o.
    """
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jax.nn.log_sigmoid(jnp.concatenate([-logits, logits], axis=-1))
    return jax.nn.log_softmax(logits)


def cross_entropy(
    log_probs: Float[Array, 'b k'], labels: Int[Array, ' b'], smoothing: float | Array = 0.0
) -> Float[Array, ' b']:
    """Cross-entropy of each example against its smoothed label.

    ℓ = −(1 − ε)·log p[y] − (ε/K)·Σ_k log p[k]

    With K = 2 from one sigmoid this is the binary cross-entropy.

    Args:
        log_probs: Log class probabilities.
        labels: Class numbers in [0, K).
        smoothing: ε in [0, 1]; may be traced.

    Returns:
        One loss an example, in nats.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7.
    """
    true = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
    return -(1.0 - smoothing) * true - smoothing * log_probs.mean(axis=-1)


def l2_penalty(params: Flat, names: Iterable[str], strength: float | Array) -> Float[Array, '']:
    """Keras's L2 penalty, part of the loss.

    λ · Σ_{named} Σ w²

    Its gradient is 2λw. Under plain SGD it equals decoupled decay with `weight_decay` = 2λ; under
    Adam it does not, since the gradient is rescaled (Loshchilov & Hutter 2019).

    Args:
        params: Flat parameters.
        names: The penalized paths.
        strength: λ ≥ 0; may be traced.
    """
    squares = [jnp.sum(jnp.square(params[name].astype(jnp.float32))) for name in names]
    return strength * sum(squares, start=jnp.zeros((), jnp.float32))
