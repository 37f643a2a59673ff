"""The figures show what the project computes, and the page shows the figures."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnn_jax import config as cfg
from cnn_jax.nn.conv import conv2d
from tests.launch.importing import imported

figures = imported('figures')

ROOT = Path(__file__).resolve().parents[2]
NAMES = ['batch_norm', 'dropout', 'fine_tuning', 'padding', 'stride']


def test_all_are_drawn_small_enough_for_a_page(launch, tmp_path):
    launch('figures', f'--out={tmp_path}', check=0)
    drawn = sorted(tmp_path.glob('*.png'))
    assert [path.stem for path in drawn] == NAMES
    for path in drawn:
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            assert len(image.convert('L').getcolors()) > 1


@pytest.mark.parametrize('padding', figures.PADDINGS)
def test_a_convolution_sees_the_padded_image_that_is_drawn(padding):
    whole, inside, size = figures.padded(padding)
    image = whole[inside].reshape(4, 4)
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)

    def convolved(x, padding):
        x = jnp.asarray(x, jnp.float32)[None, ..., None]
        return np.asarray(conv2d(x, kernel, stride=2, padding=padding))[0, ..., 0]

    result = convolved(image, padding)
    assert result.shape == size
    np.testing.assert_array_equal(result, convolved(whole, 'VALID'))


def test_batch_norm_leaves_mean_0_and_deviation_1():
    before, after = figures.norm_activations(steps=5)
    assert before.min() == 0  # a ReLU's output
    assert np.ptp(before.mean(0)) > 0.05
    np.testing.assert_allclose(after.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(after.std(0), 1, atol=0.02)


def test_the_page_names_fields_that_exist_and_shows_every_figure():
    page = (ROOT / 'docs' / 'regularizers.md').read_text()
    known = cfg.fields_by_path(cfg.Config())
    groups = '|'.join({path.split('.')[0] for path in known if '.' in path})
    named = set(re.findall(rf'`((?:{groups})\.\w+)', page))
    assert named <= set(known)
    assert {path for path in known if path.startswith('augment.')} <= named
    assert sorted(set(re.findall(r'\]\((\w+)\.png\)', page))) == NAMES
    assert all((ROOT / 'docs' / f'{name}.png').is_file() for name in NAMES)
