"""Averages of the weights over the steps, which are evaluated in their place."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cnn_jax import config as cfg
from cnn_jax.params import Flat


def averaged(average: Flat, weights: Flat, share: float | Float[Array, '']) -> Flat:
    """One step of an average: a ← (1 − s)·a + s·w.

    Args:
        average: a, so far.
        weights: w, after the step.
        share: s, as `share` gives it.
    """
    moved: Flat = optax.incremental_update(weights, average, share)  # pyright: ignore
    return moved


def share(
    on: cfg.Train, values: cfg.Train, step: Int[Array, ''], steps_per_epoch: float
) -> Float[Array, '']:
    """The share of the newest weights in their average.

    ema:       s = 1 − d, so a_t = d^t·w_0 + (1 − d)·Σ_i d^(t−i)·w_i
    swa_from:  s = 1/n for the n-th step after the first `swa_from` epochs, so a is their mean;
               until then s = 1, so a is w

    Args:
        on: Says which of the two it is.
        values: The same with traced values.
        step: Steps done before this one.
        steps_per_epoch: Need not be whole.

    Source: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging";
        Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
        who take one of the weights an epoch or a cycle; here every step's.
    """
    if on.ema:
        return jnp.asarray(1 - values.ema)
    first = jnp.round(values.swa_from * steps_per_epoch)
    return 1 / jnp.maximum(step + 1 - first, 1)
