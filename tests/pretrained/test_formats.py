"""Every format and naming gives the same weights, or a plain error."""

import hashlib
import json
import math
import os

import h5py
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import canonical_name, dense_kernel, digest, read, shapes
from cnn_jax.pretrained.weights import IMAGENET

KINDS = ['weights.h5', 'torch.safetensors', 'own.safetensors']
TORCHVISION = ('classifier.0', 'classifier.3', 'classifier.6')
TIMM = ('pre_logits.fc1', 'pre_logits.fc2', 'head.fc')


def test_digest_is_of_the_bytes_in_order():
    kernel = np.arange(2 * 3, dtype=np.float32).reshape(1, 1, 2, 3)
    bias = np.float32([7, 8, 9])
    params = {
        'block1_conv2': {'bias': bias, 'kernel': kernel},
        'block1_conv1': {'bias': bias * 2, 'kernel': np.asfortranarray(kernel)},
    }
    by_hand = hashlib.sha256(
        np.float32([0, 1, 2, 3, 4, 5, 14, 16, 18, 0, 1, 2, 3, 4, 5, 7, 8, 9]).tobytes()
    )
    assert digest(params) == by_hand.hexdigest()


def test_digest_sees_one_bit(imagenet):
    assert imagenet.digest == digest(imagenet.params) == IMAGENET.digest
    bias = imagenet.params['block3_conv2']['bias'].copy()
    bias.view(np.uint32)[5] ^= 1
    changed = imagenet.params | {'block3_conv2': imagenet.params['block3_conv2'] | {'bias': bias}}
    assert digest(changed) != IMAGENET.digest


@pytest.mark.parametrize('top', [TORCHVISION, TIMM], ids=['torchvision', 'timm'])
def test_every_torch_name_has_a_canonical_one(top):
    layers = [f'features.{i}' for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    names = [f'{layer}.{tensor}' for layer in (*layers, *top) for tensor in ('weight', 'bias')]
    assert [canonical_name(name) for name in names] == list(shapes(include_top=True))
    assert sum(map(math.prod, shapes(include_top=True).values())) == 138_357_544  # as in the paper
    for other in ('features.1.weight', 'features.0.running_mean', 'fc1', ''):
        assert canonical_name(other) == other


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))
def test_dense_kernel_sees_the_same_pixels(channels, height, width, outputs):
    """W · flatten(CHW image) = flatten(HWC image) · K."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 9, (outputs, channels * height * width))
    image = rng.integers(-9, 9, (height, width, channels))
    theirs = weight @ image.transpose(2, 0, 1).ravel()
    for shape in (weight.shape, (outputs, channels, height, width)):
        kernel = dense_kernel(weight.reshape(shape), height * width)
        np.testing.assert_array_equal(image.ravel() @ kernel, theirs)


@pytest.mark.parametrize(
    'shapes_of_the_top',
    [
        [(4096, 25088), (4096, 4096), (1000, 4096)],
        [(4096, 512, 7, 7), (4096, 4096, 1, 1), (1000, 4096)],
    ],
    ids=['torchvision', 'timm'],
)
def test_the_top_of_torch_is_recognized_by_its_shapes(tmp_path, shapes_of_the_top):
    """Headers alone: the values of 500 MB would be read only after all shapes have been checked."""
    layers = TORCHVISION if len(shapes_of_the_top[0]) == 2 else TIMM
    header, end = {}, 0
    for layer, shape in zip(layers, shapes_of_the_top, strict=True):
        for name, sizes in ((f'{layer}.weight', shape), (f'{layer}.bias', shape[:1])):
            start, end = end, end + 4 * math.prod(sizes)
            entry = {'dtype': 'F32', 'shape': sizes, 'data_offsets': [start, end]}
            header[name] = entry
    header['features.0.bias'] = {'dtype': 'F32', 'shape': [64], 'data_offsets': [end, end + 256]}
    text = json.dumps(header).encode()
    path = tmp_path / 'top.safetensors'
    path.write_bytes(len(text).to_bytes(8, 'little') + text)
    os.truncate(path, 8 + len(text) + end + 256)  # sparse
    with pytest.raises(UserError, match='block1_conv1/kernel is missing') as error:
        read(path, include_top=True)
    assert all(layer not in str(error.value) for layer in ('fc1', 'fc2', 'predictions'))


@pytest.mark.parametrize('kind', KINDS)
def test_formats_hold_the_same_weights(write, random_params, kind):
    params, unused, _ = read(write(kind, random_params))
    assert digest(params) == digest(random_params)
    assert unused == (('head/logits/bias',) if kind == 'own.safetensors' else ())


@pytest.mark.parametrize('name', ['model.weights.h5', 'model.h5'])
@pytest.mark.filterwarnings('ignore')  # Keras calls its own format legacy
def test_fine_tuned_keras_model(tmp_path, random_params, name):
    """The backbone inside a compiled model with a head and an optimizer, as users save it."""
    import keras

    backbone = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    for layer, tensors in random_params.items():
        backbone.get_layer(layer).set_weights([tensors['kernel'], tensors['bias']])
    layers = [keras.layers.Input((32, 32, 3)), backbone, keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(optimizer=keras.optimizers.SGD(momentum=0.9), loss='mse')
    model.optimizer.build(model.trainable_variables)
    (model.save if name == 'model.h5' else model.save_weights)(tmp_path / name)
    params, unused, contents = read(tmp_path / name)
    assert digest(params) == digest(random_params)
    assert contents.layout == 'keras'
    assert len(unused) >= 2


def test_the_format_is_detected_from_the_content(write, random_params):
    path = write('weights.h5', random_params)
    renamed = path.rename(path.with_suffix('.onnx'))
    assert digest(read(renamed)[0]) == digest(random_params)


def test_arrays_are_float32_row_major_and_read_only(write, random_params):
    for array in flatten(read(write('torch.safetensors', random_params))[0]).values():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert not array.flags.writeable


def test_half_precision_is_widened(tmp_path, random_params):
    half = {name: array.astype(np.float16) for name, array in flatten(random_params).items()}
    save_file(half, tmp_path / 'half.safetensors')
    params = flatten(read(tmp_path / 'half.safetensors')[0])
    assert all((params[name] == half[name]).all() for name in half)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'block2_conv1/bias': None}, 'block2_conv1/bias is missing'),
        ({'block3_conv4/bias': np.zeros(256)}, 'block3_conv4/bias is not part of it'),
        ({'block1_conv1/bias': np.zeros(63)}, r'block1_conv1/bias is \[63\] instead of \[64\]'),
        ({'block1_conv1/bias': np.zeros(64, int)}, 'bias is I64 instead of float32'),
        ({'block5_conv3/bias': np.full(512, np.nan)}, 'not finite in block5_conv3/bias'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, random_params, change, sentence):
    tensors = flatten(random_params)
    for name, array in change.items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array.astype(np.float32) if array.dtype == float else array
    save_file(tensors, tmp_path / 'changed.safetensors')
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / 'changed.safetensors')


def test_all_mismatches_are_listed(tmp_path):
    save_file({'block1_conv1/kernel': np.zeros((1, 1), np.float32)}, tmp_path / 'one.safetensors')
    with pytest.raises(UserError) as error:
        read(tmp_path / 'one.safetensors')
    assert str(error.value).count('is missing') == 25
    assert 'block1_conv1/kernel is [1, 1] instead of [3, 3, 3, 64]' in str(error.value)


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'', 'neither'),
        (b'\x80\x04\x95pickled', 'can run code'),
        (b'PK\x03\x04an archive', 'can run code'),
        (b'\xff\xd8\xff a photograph', 'neither'),
        (b'\x89HDF\r\n\x1a\n', 'not a complete HDF5 file'),
        (b'\x08\x07 and no graph', 'not a complete ONNX file'),
        (b'\x02\0\0\0\0\0\0\0{}', 'block1_conv1/kernel is missing'),
        (b'\xff\xff\xff\x7f\0\0\0\0{}', 'not a complete safetensors file'),
    ],
)
def test_not_a_weights_file(tmp_path, content, sentence):
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / 'file')


def test_no_file(tmp_path):
    with pytest.raises(UserError, match='No such file'):
        read(tmp_path / 'absent.h5')
    os.mkfifo(tmp_path / 'pipe.h5')
    for path in (tmp_path, tmp_path / 'pipe.h5'):
        with pytest.raises(UserError, match='is a folder, a pipe or a device'):
            read(path)


@pytest.mark.parametrize('other', ['ema/block1_conv1/kernel', 'model/block1_conv1/kernel'])
def test_two_backbones_are_refused(tmp_path, random_params, write, other):
    tensors = {f'backbone/{name}': array for name, array in flatten(random_params).items()}
    save_file(tensors | {other: tensors['backbone/block1_conv1/kernel']}, tmp_path / 'two')
    hdf5 = write('weights.h5', random_params)
    with h5py.File(hdf5, 'a') as file:
        file[other] = random_params['block1_conv1']['kernel']
    for path in (tmp_path / 'two', hdf5):
        with pytest.raises(UserError, match='block1_conv1/kernel twice'):
            read(path)


def test_a_tensor_beside_the_graph_replaces_none_in_it(tmp_path, onnx_file):
    model = onnx.load(onnx_file)
    zeros = np.zeros((3, 3, 3, 64), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, 'block1_conv1/kernel'))
    onnx.save(model, tmp_path / 'two.onnx')
    with pytest.raises(UserError, match='block1_conv1/kernel twice'):
        read(tmp_path / 'two.onnx')
    model.graph.initializer[-1].name = model.graph.initializer[0].name
    onnx.save(model, tmp_path / 'two.onnx')
    with pytest.raises(UserError, match='two tensors the same name'):
        read(tmp_path / 'two.onnx')


def test_hdf5_brings_in_no_other_file(tmp_path, write, random_params):
    outside = write('weights.h5', random_params)
    inside = tmp_path / 'linked.h5'
    with h5py.File(inside, 'w') as file:
        for layer in random_params:
            file[layer] = h5py.ExternalLink(outside, f'/{layer}')
        file['model_weights'] = h5py.ExternalLink(outside, '/')
        file['loop'] = h5py.SoftLink('/')
    with pytest.raises(UserError, match='block1_conv1/kernel is missing'):
        read(inside)
    (tmp_path / 'raw').write_bytes(bytes(64 * 4))
    with h5py.File(inside, 'w') as file:
        file.create_dataset('block1_conv1/b', (64,), 'f4', external=[(tmp_path / 'raw', 0, 256)])
    with pytest.raises(UserError, match='in another file'):
        read(inside)


def test_onnx_layers_out_of_order_are_refused(tmp_path, onnx_file):
    model = onnx.load(onnx_file)
    first, second = [node for node in model.graph.node if node.op_type == 'Conv'][:2]
    first.input[1], second.input[1] = second.input[1], first.input[1]
    onnx.save(model, tmp_path / 'swapped.onnx')
    with pytest.raises(UserError, match='block1_conv2 where VGG16 has block1_conv1'):
        read(tmp_path / 'swapped.onnx')
    del model.graph.node[:]
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(UserError, match='0 convolutions where VGG16 has 13'):
        read(tmp_path / 'other.onnx')


@pytest.mark.parametrize('share', [0.001, 0.5, 0.999999])
@pytest.mark.parametrize('kind', [*KINDS, 'onnx'])
def test_truncated(tmp_path, write, random_params, onnx_file, kind, share):
    whole = onnx_file if kind == 'onnx' else write(kind, random_params)
    content = whole.read_bytes()
    (tmp_path / 'part').write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match='not a complete'):
        read(tmp_path / 'part')
