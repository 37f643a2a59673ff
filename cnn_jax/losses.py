"""Task losses: what the prediction of an example costs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def confidence_penalty(
    log_probs: Float[Array, 'b k'], strength: float | Array
) -> Float[Array, ' b']:
    """What a confident prediction of each example costs, whatever its label.

    −β·H(p) = β·Σ_k p[k]·log p[k]

    It lies between −β·log K, for the uniform distribution, and 0.

    Args:
        log_probs: Log class probabilities.
        strength: β ≥ 0; may be traced.

    Returns:
        To be added to the loss of each example, in nats.

    Source: Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output
        Distributions", equation 2.
    """
    return strength * jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
