"""The manifest: whether a run that goes on still is the run that began."""

import pytest

from cnn_jax.errors import UserError
from cnn_jax.train import manifest

PREPARED = {'kind': 'standardize', 'weights': 'c', 'mean': [0.1], 'std': [0.2], 'channels': 3}
DATA = {
    'source': 'folder:photos',
    'train': {'count': 10, 'fingerprint': 'a'},
    'eval': {'count': 5, 'fingerprint': 'b'},
    'class_names': ['cat', 'dog'],
    'image_shape': [8, 8, 1],
    'preprocessing': PREPARED,
}


@pytest.fixture
def begun(tmp_path):
    manifest.begin(tmp_path, {'config_hash': 'x', 'machine': {'threads': 1}, 'data': DATA})
    return tmp_path


def test_the_same_data_and_weights_go_on(begun):
    manifest.check_data(begun, DATA)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'train': {'count': 11, 'fingerprint': 'd'}}, '10 images then, 11 now'),
        ({'eval': {'count': 5, 'fingerprint': 'd'}}, 'the eval images of folder:photos'),
        ({'class_names': ['dog', 'cat']}, 'class names'),
        ({'image_shape': [8, 8, 3]}, 'shape'),
        ({'preprocessing': PREPARED | {'weights': 'd'}}, 'c then, d now'),
        ({'preprocessing': PREPARED | {'kind': 'torch'}}, 'standardize then, torch now'),
        ({'preprocessing': PREPARED | {'mean': [0.11]}}, 'means of the channels'),
        ({'preprocessing': PREPARED | {'std': [0.19]}}, 'standard deviations'),
        ({'preprocessing': PREPARED | {'channels': 1}}, '3 then, 1 now'),
    ],
)
def test_others_are_refused(begun, change, sentence):
    with pytest.raises(UserError, match=sentence):
        manifest.check_data(begun, DATA | change)
