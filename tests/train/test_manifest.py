"""The manifest: whether a run that goes on still is the run that began."""

import pytest

from cnn_jax.errors import UserError
from cnn_jax.train import manifest

DATA = {
    'source': 'folder:photos',
    'train': {'count': 10, 'fingerprint': 'a'},
    'eval': {'count': 5, 'fingerprint': 'b'},
    'preprocessing': {'kind': 'caffe', 'weights': 'c'},
}


@pytest.fixture
def begun(tmp_path):
    now = {'config_hash': 'x', 'machine': {'threads': 1}, 'data': DATA}
    manifest.begin(tmp_path, now)
    return tmp_path


def test_the_same_data_and_weights_go_on(begun):
    manifest.check_data(begun, DATA)


@pytest.mark.parametrize(
    ('name', 'change', 'sentence'),
    [
        ('train', {'count': 11, 'fingerprint': 'd'}, '10 images then, 11 now'),
        ('eval', {'count': 5, 'fingerprint': 'd'}, 'the eval images of folder:photos have changed'),
        ('preprocessing', {'kind': 'caffe', 'weights': 'd'}, 'pretrained weights .*c then, d now'),
        ('preprocessing', {'kind': 'torch', 'weights': 'c'}, 'caffe then, torch now'),
    ],
)
def test_others_are_refused(begun, name, change, sentence):
    with pytest.raises(UserError, match=sentence):
        manifest.check_data(begun, DATA | {name: change})
