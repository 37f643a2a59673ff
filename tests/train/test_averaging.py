"""Averages of the weights: the closed form of each, and what is evaluated."""

import jax
import numpy as np
import pytest

from cnn_jax import params
from cnn_jax.errors import UserError

COUNT = 6


def trained(run, batch, config):
    """The weights before the first step and after each, and the last state."""
    steps, state, values = run(config)
    train = jax.jit(steps.train)
    weights = [params.flatten(state.params)]
    for number in range(COUNT):
        state, _ = train(state, batch(number), values)
        weights.append(params.flatten(state.params))
    return weights, state


def test_ema_has_its_closed_form(small, run, batch):
    weights, state = trained(run, batch, small(train__ema=0.8))
    for path, found in state.ema.items():
        w = [np.float64(each[path]) for each in weights]
        news = sum(0.8 ** (COUNT - i) * w[i] for i in range(1, COUNT + 1))
        np.testing.assert_allclose(found, 0.8**COUNT * w[0] + 0.2 * news, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('first', [1, 3, 5])
def test_swa_is_the_mean_of_the_weights_after_the_first_epochs(small, run, batch, first):
    # Ten steps an epoch.
    weights, state = trained(run, batch, small(train__swa_from=first / 10))
    for path, found in state.ema.items():
        expected = np.mean([np.float64(each[path]) for each in weights[first + 1 :]], axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_before_its_first_step_swa_is_the_weights(small, run, batch):
    weights, state = trained(run, batch, small(train__swa_from=2.0))
    for path, found in state.ema.items():
        np.testing.assert_array_equal(found, weights[-1][path])


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'train__ema': 0.9, 'train__swa_from': 1.0}, 'both average the weights'),
        ({'train__swa_from': 10.0, 'train__epochs': 10.0}, 'nothing would be averaged'),
    ],
)
def test_averages_that_make_no_sense_are_refused(small, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        small(**changes)
