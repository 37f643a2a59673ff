import dataclasses

import numpy as np
import pytest

from benchmarks import features, flax_features, gate, onnx_features, ours_features
from benchmarks.problem import VGG16, Problem
from experiments import finetune_vgg16

COUNT = 2 * 2 * 2 * 512


@pytest.fixture(scope='module')
def problem():
    """Two images of 64×64 for random convolutions."""
    rng = np.random.default_rng(0)
    weights, channels = {}, 3
    for i, (width, count) in enumerate(VGG16, start=1):
        for j in range(1, count + 1):
            kernel = rng.standard_normal((3, 3, channels, width), np.float32)
            path = f'backbone/block{i}_conv{j}'
            weights[f'{path}/kernel'] = kernel * np.float32((2 / (9 * channels)) ** 0.5)
            weights[f'{path}/bias'] = rng.standard_normal(width, np.float32)
            channels = width
    images = rng.integers(0, 256, (1, 2, 64, 64, 3), np.uint8)
    config = dataclasses.asdict(finetune_vgg16.get_config())
    return Problem(config, {'kind': 'caffe'}, images, np.zeros((1, 2), np.int32), 2, weights)


@pytest.fixture(scope='module')
def of_flax(problem):
    return flax_features.start(problem).losses(COUNT)


@pytest.mark.parametrize('module', [ours_features, onnx_features])
def test_a_contender_computes_the_features_of_flax(problem, of_flax, module):
    found = module.start(problem).losses(COUNT)
    assert len(found) == COUNT
    assert features.relative_errors({'Flax': of_flax, 'other': found})['other'] < 1e-5


def test_relative_errors_by_hand(monkeypatch):
    monkeypatch.setattr(features, 'TOLERANCE', 1.0)
    found = features.relative_errors({'cnn_jax': [3.0, 4.5], 'Flax': [3.0, 4.0]})
    assert found == {'cnn_jax': pytest.approx(0.1), 'Flax': 0.0}  # a peer is the judge


@pytest.mark.parametrize('wrong', [[3.0, 4.01], [3.0, float('nan')]])
def test_other_features_are_refused(wrong):
    with pytest.raises(gate.Disagreement, match=r'the features of b are .* off those of a'):
        features.relative_errors({'a': [3.0, 4.0], 'b': wrong})
