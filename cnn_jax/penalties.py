"""Penalties on the weights: what is added to the loss that a step minimizes.

Each acts on the parameters that its `loss.…_on` patterns match and that are trained.
"""

from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cnn_jax.params import Flat


def l2(params: Flat, names: Iterable[str], strength: float | Array) -> Float[Array, '']:
    """Keras's L2 penalty.

    λ · Σ_{named} Σ w²

    Its gradient is 2λw. Under plain SGD it equals decoupled decay with `weight_decay` = 2λ; under
    Adam it does not, since the gradient is rescaled (Loshchilov & Hutter 2019).

    Args:
        params: Flat parameters.
        names: The penalized paths.
        strength: λ ≥ 0; may be traced.
    """
    return strength * _total(jnp.sum(jnp.square(_wide(params[name]))) for name in names)


def l1(params: Flat, names: Iterable[str], strength: float | Array) -> Float[Array, '']:
    """Lasso; with `l2` the elastic net.

    λ · Σ_{named} Σ |w|

    Its gradient is λ·sign(w), 0 at w = 0.

    Args:
        params, names, strength: As for `l2`.

    Source: Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso"; Zou & Hastie 2005,
        "Regularization and Variable Selection via the Elastic Net".
    """

    def magnitude(leaf: Array) -> Array:
        # Not `jnp.abs`, whose gradient at 0 is 1.
        return jnp.sum(leaf * lax.stop_gradient(jnp.sign(leaf)))

    return strength * _total(magnitude(_wide(params[name])) for name in names)


def orthogonality(params: Flat, names: Iterable[str], strength: float | Array) -> Float[Array, '']:
    """Soft orthogonality: the filters of a layer as unit vectors at right angles to each other.

    λ · Σ_{named} ‖WᵀW − I‖²_F,  W the kernel as a matrix [inputs, outputs]

    With more outputs than inputs WᵀW cannot be I; WWᵀ − I is taken, whose squared norm differs
    from that of WᵀW − I by the constant outputs − inputs: the gradient, 4λ·W(WᵀW − I), is the same.

    Args:
        params, names, strength: As for `l2`. Parameters with one axis, such as biases, cost 0.

    Source: Bansal, Chen & Wang 2018, "Can We Gain More from Orthogonality Regularizations in
        Training Deep CNNs?", equation 1.
    """

    def distance(kernel: Array) -> Array:
        matrix = _wide(kernel).reshape(-1, kernel.shape[-1])
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        return jnp.sum(jnp.square(tall.T @ tall - jnp.eye(tall.shape[1])))

    return strength * _total(distance(params[name]) for name in names if params[name].ndim > 1)


def l2_sp(
    params: Flat, names: Iterable[str], strength: float | Array, start: Flat
) -> Float[Array, '']:
    """L2 toward the starting point, for fine-tuning: what was learned before is kept.

    λ · Σ_{named} Σ (w − w⁰)²

    The paper's second term, plain L2 of the new head, is `l2` with its own patterns.

    Args:
        params, names, strength: As for `l2`.
        start: w⁰, the weights of the named paths when their training began.

    Source: Li, Grandvalet & Davoine 2018, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", equation 2; its α/2 is λ.
    """
    return l2({name: params[name] - start[name] for name in names}, names, strength)


def _wide(leaf: Array) -> Array:
    return leaf.astype(jnp.float32)


def _total(terms: Iterable[Array]) -> Array:
    return sum(terms, start=jnp.zeros((), jnp.float32))
