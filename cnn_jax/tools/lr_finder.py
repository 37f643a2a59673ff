"""The learning-rate range test: a few steps at rates that grow from far too low to far too high.

It trains a state of its own from the run's first one. Randomness is a function of (seed, step), so
that a run after it is the run without it, bit for bit.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3; with the
exponential sweep and the smoothing of fastai's `lr_find`.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.files import write_text
from cnn_jax.tools.figures import new_figure, save
from cnn_jax.train.loop import Phase, steps
from cnn_jax.train.program import State, traced_values

SMOOTHING = 0.9  # share of the old that the moving average of the loss keeps
SETTLED = 10  # rates before the average is one of as many losses as later
WORSE = 4.0  # times the lowest smoothed loss: the sweep is over

Curve = Float64[np.ndarray, ' n']


def losses(
    config: cfg.Config,
    phase: Phase,
    state: State,
    rates: Iterable[float],
) -> Curve:
    """The training loss at each rate, until it is no longer finite or far above its lowest.

    Args:
        config, phase: A config without a schedule, and the first phase, made with it.
        state: The state before the first step; its memory is given away.
        rates: The rates to try.

    Returns:
        The mean loss of the batch before each step, in nats; perhaps shorter than `rates`.
    """
    values, tried = traced_values(config), []
    sweep = steps([dataclasses.replace(phase, end=2**31)], state, 0, values)
    for rate in rates:
        values['optimizer.learning_rate'] = float(rate)
        sums = next(sweep).sums
        tried.append(float(sums['loss']) / float(sums['count']))
        curve = smoothed(np.array(tried))
        least = curve.min()  # below 0 under a confidence penalty
        if not np.isfinite(tried[-1]) or curve[-1] > least + (WORSE - 1) * abs(least):
            break
    return np.array(tried)


def smoothed(losses: Curve) -> Curve:
    """The moving average of the losses, without its bias toward 0 at the start.

    a_t = 0.9·a_(t−1) + 0.1·ℓ_t,  a_t / (1 − 0.9^t)
    """
    average, curve = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        curve.append(average / (1 - SMOOTHING**count))
    return np.array(curve)


def suggestion(rates: Curve, losses: Curve) -> float:
    """A tenth of the rate at which the smoothed loss is lowest: it still falls fast there.

    Errors:
        UserError: The loss did not fall, or too few rates were tried to tell.
    """
    curve = smoothed(losses[np.isfinite(losses)])
    lowest = SETTLED + int(np.argmin(curve[SETTLED:])) if len(curve) > SETTLED else 0
    if lowest <= SETTLED:
        raise UserError(
            f'the loss did not fall between learning rates {rates[0]:g} and '
            f'{rates[len(losses) - 1]:g}; lower --lowest or raise --steps'
        )
    return float(rates[lowest]) / 10


def write_csv(rates: Curve, losses: Curve, path: Path) -> None:
    """The curve as a table: learning_rate, loss, smoothed_loss."""
    rows = zip(rates.tolist(), losses.tolist(), smoothed(losses).tolist())
    lines = ['learning_rate,loss,smoothed_loss', *(','.join(map(str, row)) for row in rows)]
    write_text(path, '\n'.join(lines) + '\n')


def draw(rates: Curve, losses: Curve, suggested: float, path: Path) -> None:
    """Loss against learning rate, and the suggestion, as a PNG."""
    curve = smoothed(losses)
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    axes.plot(rates[: len(losses)], losses, alpha=0.3, label='loss')
    axes.plot(rates[: len(losses)], curve, label='smoothed')
    axes.axvline(suggested, color='black', linestyle=':', label=f'suggestion: {suggested:.2g}')
    top = 1.1 * max(curve[0], np.nanmin(curve))
    axes.set(xscale='log', xlabel='learning rate', ylabel='training loss (nats)', ylim=(None, top))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
