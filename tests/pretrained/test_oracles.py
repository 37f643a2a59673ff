"""Features of real photographs against two independent implementations of the network."""

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from sklearn.datasets import load_sample_image

from cnn_jax.backbones import VGG16
from cnn_jax.pretrained.weights import insert


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def features(imagenet, images, cut='block5_pool') -> np.ndarray:
    model = VGG16(cut=cut)
    x = imagenet.preprocessing(images)
    return np.asarray(model.apply({'params': insert(imagenet.params, imagenet)}, x))


@pytest.fixture(scope='module')
def graph(onnx_file) -> onnxruntime.InferenceSession:
    """The ONNX graph up to block5_pool, for images of any size."""
    model = onnx.load(onnx_file)
    nodes = list(model.graph.node)
    last = next(i for i, node in enumerate(nodes) if 'block5_pool' in node.name)
    del model.graph.node[last + 1 :]
    del model.graph.output[:]
    channels_first = ['batch', 512, 'height', 'width']
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(
            nodes[last].output[0], onnx.TensorProto.FLOAT, channels_first
        )
    )
    for axis, name in ((1, 'rows'), (2, 'columns')):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # the head's tensors are left over, which it warns of
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize('photograph', ['china.jpg', 'flower.jpg'])
def test_onnx_runtime(imagenet, graph, photograph):
    """Whole photographs, 427×640, through both."""
    images = load_sample_image(photograph)[None]
    blue_first = images[..., ::-1] - np.float32([103.939, 116.779, 123.68])
    (theirs,) = graph.run(None, {'input': blue_first})
    ours = features(imagenet, images)
    assert ours.shape == (1, 13, 20, 512)
    assert relative_error(ours, theirs.transpose(0, 2, 3, 1)) <= 1e-5


def test_keras(imagenet):
    """Both photographs' middle 96×96 pixels, in one batch, at several layers."""
    cuts = 'block1_conv1', 'block2_pool', 'block5_pool'
    names = ('china.jpg', 'flower.jpg')
    images = np.stack([load_sample_image(name)[165:261, 272:368] for name in names])
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(96, 96, 3))
    for layer, tensors in imagenet.params.items():
        model.get_layer(layer).set_weights([tensors['kernel'], tensors['bias']])
    model = keras.Model(model.input, [model.get_layer(cut).output for cut in cuts])
    outputs = model(keras.applications.vgg16.preprocess_input(images.astype(np.float32)))
    for cut, theirs in zip(cuts, outputs, strict=True):
        assert relative_error(features(imagenet, images, cut), theirs) <= 1e-5, cut
