"""Power against published sample sizes and simulation."""

import numpy as np
import pytest

from cnn_jax.ablation import statistics
from cnn_jax.ablation import statistics as power


@pytest.mark.parametrize(('effect', 'seeds'), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_gpower(effect, seeds):
    assert power.seeds_needed(effect) == power.seeds_needed(-effect) == seeds


def test_seeds_needed_has_ends():
    assert power.seeds_needed(1e6) == 2
    assert power.seeds_needed(0) is None


@pytest.mark.parametrize('n', [2, 3, 5, 20])
@pytest.mark.parametrize('significance', [0.05, 0.0125])
def test_detectable_effect_is_found_in_four_of_five_simulations(n, significance):
    effect = power.detectable_effect(n, significance)
    _, p = statistics.paired_t(np.random.default_rng(0).normal(effect, 1, (50_000, n)))
    assert np.mean(p < significance) == pytest.approx(0.8, abs=0.01)


def test_no_effect_is_found_as_often_as_the_level_says():
    assert power.power(0, 5, 0.05) == pytest.approx(0.05)
