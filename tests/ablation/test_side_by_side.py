"""Ablations side by side: which rows and columns there are, and what stands in them."""

import numpy as np
import pytest

from cnn_jax.ablation import figures
from cnn_jax.ablation.summary import summarize
from cnn_jax.errors import UserError

DIGITS = {'data.source': 'mnist_5k', 'data.train': 'train[:500]'}
GARMENTS = {'data.source': 'idx:/data/fashion-mnist', 'data.train': 'train'}
GAINS = {'none': 0.0, 'A': 0.05, 'B': -0.03}


@pytest.fixture
def write(write_ablation, tmp_path):
    """Writes an ablation on some data into a folder of its own."""

    def call(folder, data, gains=GAINS, **changes):
        configs = {'configs': dict.fromkeys(gains, data)}
        return write_ablation(tmp_path / folder, gains, **configs, **changes)

    return call


def drawn(axes):
    """The means in a plot from the top down: the markers that stand on whole rows."""
    points = [line.get_xydata() for line in axes.lines if line.get_marker() in 'oD']
    return [float(x) for ((x, _),) in sorted(points, key=lambda point: point[0][1])]


def test_a_block_for_each_experiment_and_a_column_for_each_data_set(write):
    folders = [
        write('a', DIGITS, name='noise'),
        write('b', DIGITS, name='penalties'),
        write('c', GARMENTS, {'none': 0.0, 'B': 0.02, 'C': 0.04}, name='noise'),
    ]
    figure = figures.draw_side_by_side(folders)
    noise, noise_on_garments, penalties, nothing = figure.axes
    assert [axes.get_title() for axes in figure.axes[:2]] == [
        'mnist_5k train[:500]',
        'fashion-mnist train',
    ]
    assert [axes.get_title('left') for axes in (noise, penalties)] == ['noise', 'penalties']
    assert [label.get_text() for label in noise.get_yticklabels()] == ['A', 'B', 'C']
    assert not drawn(nothing)
    for axes, folder in (
        (noise, folders[0]),
        (penalties, folders[1]),
        (noise_on_garments, folders[2]),
    ):
        arms = summarize(folder)['arms'].values()
        means = [arm['against_baseline']['mean'] for arm in arms if arm['verdict']]
        np.testing.assert_allclose(drawn(axes), 100 * np.array(means))


def test_two_in_one_place_are_refused(write):
    with pytest.raises(UserError, match='b is a second ablation regularization on mnist_5k'):
        figures.draw_side_by_side([write('a', DIGITS), write('b', DIGITS)])


def test_metrics_that_differ_are_refused(write):
    with pytest.raises(UserError, match=r'accuracy in .*a, loss in .*b; give ablations of one'):
        figures.draw_side_by_side([write('a', DIGITS), write('b', GARMENTS, metric='loss')])
