"""Every format and naming gives the same weights, or a plain error."""

import hashlib
import math
import os

import h5py
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import digest, read
from cnn_jax.pretrained.networks import canonical_name, shapes
from cnn_jax.pretrained.weights import IMAGENET
from tests.pretrained.conftest import FEATURES, WRITERS


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


def test_every_torch_name_has_a_canonical_one():
    names = [f'features.{i}.{tensor}' for i in FEATURES for tensor in ('weight', 'bias')]
    assert [canonical_name(name) for name in names] == list(shapes())
    assert sum(map(math.prod, shapes().values())) == 14_714_688  # as in the paper
    assert [canonical_name(f'module.net.{name}') for name in names] == list(shapes())
    for other in ('features.1.weight', 'features.0.running_mean', 'fc1', ''):
        assert canonical_name(other) == other


@pytest.mark.parametrize('prefix', ['model.features', 'module.model.features', 'enc-1', 'vgg16'])
def test_torch_names_may_stand_under_any_prefix(tmp_path, small_params, write, prefix):
    tensors = load_file(write('torch.safetensors', small_params))
    renamed = {name.replace('features', prefix): array for name, array in tensors.items()}
    others = {'classifier.0.weight': np.zeros((2, 2), np.float32)}
    save_file(renamed | others, tmp_path / 'prefixed')
    params, unused, contents = read(tmp_path / 'prefixed')
    assert (digest(params), unused) == (digest(small_params), tuple(others))
    assert contents.layout == 'torch'


@pytest.mark.parametrize('kind', WRITERS)
def test_formats_hold_the_same_weights(write, small_params, kind):
    params, unused, _ = read(write(kind, small_params))
    assert digest(params) == digest(small_params)
    for array in flatten(params).values():
        flags = array.flags.c_contiguous, array.flags.writeable
        assert (array.dtype, *flags) == (np.float32, True, False)
    assert unused == (('head/logits/bias',) if kind == 'own.safetensors' else ())


@pytest.mark.parametrize('name', ['model.weights.h5', 'model.h5', 'model.keras'])
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
    (model.save_weights if name == 'model.weights.h5' else model.save)(tmp_path / name)
    params, unused, contents = read(tmp_path / name)
    assert digest(params) == digest(random_params)
    assert contents.layout == 'keras'
    assert len(unused) >= 2


@pytest.mark.parametrize(
    ('group', 'others'),
    [
        ('layers/conv2d{n}', {}),
        ('layers/functional/layers/conv2d{n}', {'layers/conv2d': (1, 1, 1, 3)}),
        ('block{block}/layers/conv2d{i}', {'side{block}': (1, 1, 2, 1)}),  # numbered anew
        ('layers/sequential_{block}/layers/conv2d{i}', {'layers/conv2d': (3, 3, 2, 2)}),
        ('conv{block}_{i}', {'decoder/conv{block}_{i}': (3, 3, 2, 2)}),  # attributes
    ],
)
def test_layers_that_keras_numbers(tmp_path, small_params, group, others):
    with h5py.File(tmp_path / 'numbered', 'w') as file:
        for n, (layer, tensors) in enumerate(small_params.items()):
            block, i = (int(part[-1]) for part in layer.split('_'))
            first = 'layers' in group  # of a kind: it has no number
            number = {'n': f'_{n}' if n else '', 'block': block, 'i': f'_{i - 1}' if i > 1 else ''}
            number |= {} if first else {'i': i}
            for k, tensor in enumerate(('kernel', 'bias')):
                file[f'{group.format(**number)}/vars/{k}'] = tensors[tensor]
            for name, shape in others.items():
                file.require_dataset(f'{name.format(**number)}/vars/0', shape, 'f4')
    assert digest(read(tmp_path / 'numbered')[0]) == digest(small_params)


def family(counts, norm, scheme):
    """The tensors of a network of VGG's family, all zeros, as torch or Keras 3 names them."""
    tensors, channels, i, n = {}, 3, 0, 0
    for width, count in zip((64, 128, 256, 512, 512), counts):
        for _ in range(count):
            if scheme == 'keras':
                number = f'_{n}' if n else ''
                tensors[f'layers/conv2d{number}/vars/0'] = (3, 3, channels, width)
                means = f'layers/batch_normalization{number}/vars/0'
            else:
                tensors[f'{scheme}.{i}.weight'] = (width, channels, 3, 3)
                means = f'{scheme}.{i + 1}.running_mean'
            tensors |= {means: (width,)} if norm else {}
            channels, i, n = width, i + 2 + norm, n + 1
        i += 1
    return {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}


@pytest.mark.parametrize('scheme', ['features', 'model.features', 'keras'])
@pytest.mark.parametrize(
    ('counts', 'norm', 'name'),
    [
        ((1, 1, 2, 2, 2), False, 'holds VGG11;'),
        ((1, 1, 2, 2, 2), True, 'holds VGG11 with batch normalization;'),
        ((2, 2, 2, 2, 2), False, 'holds VGG13;'),
        ((2, 2, 3, 3, 3), True, 'holds VGG16 with batch normalization;'),
        ((2, 2, 4, 4, 4), False, 'holds VGG19;'),
        ((2, 2, 4, 4, 4), True, 'holds VGG19 with batch normalization;'),
        ((2, 2, 1, 1, 1), False, r'it holds 7 tensors \(\S+ \[.*, …\); give'),
    ],
)
def test_a_relative_is_named_and_another_network_described(tmp_path, counts, norm, name, scheme):
    tensors = family(counts, norm, scheme)
    if scheme == 'keras':
        with h5py.File(tmp_path / 'file', 'w') as file:
            for path, array in tensors.items():
                file[path] = array
    else:
        save_file(tensors, tmp_path / 'file')
    with pytest.raises(UserError, match=name) as refused:
        read(tmp_path / 'file')
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_the_format_is_detected_from_the_content(write, small_params):
    path = write('weights.h5', small_params)
    renamed = path.rename(path.with_suffix('.onnx'))
    assert digest(read(renamed)[0]) == digest(small_params)


def test_half_precision_is_widened(tmp_path, small_params):
    half = {name: array.astype(np.float16) for name, array in flatten(small_params).items()}
    save_file(half, tmp_path / 'half.safetensors')
    params = flatten(read(tmp_path / 'half.safetensors')[0])
    assert all((params[name] == half[name]).all() for name in half)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'block2_conv1/bias': None}, 'block2_conv1/bias is missing'),
        ({'block3_conv4/bias': np.zeros(2)}, 'block3_conv4/bias is not part of it'),
        ({'block1_conv1/bias': np.zeros(3)}, r'block1_conv1/bias is \[3\] instead of \[2\]'),
        ({'block1_conv1/bias': np.zeros(2, int)}, 'bias is I64 instead of float32'),
        ({'block5_conv3/bias': np.full(2, np.nan)}, 'not finite in block5_conv3/bias'),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, small_params, change, sentence):
    tensors = flatten(small_params)
    for name, array in change.items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array.astype(np.float32) if array.dtype == float else array
    save_file(tensors, tmp_path / 'changed.safetensors')
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / 'changed.safetensors')


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'', 'neither a'),
        (b'\x80\x04\x95pickled', 'can run code'),
        (b'PK\x03\x04an archive', 'no model.weights.h5'),
        (b'\xff\xd8\xff a photograph', 'neither'),
        (b'\x89HDF\r\n\x1a\n', 'not a complete HDF5 file'),
        (b'\x08\x07 and no graph', 'not a complete ONNX file'),
        (b'\x02\0\0\0\0\0\0\0{}', 'it holds 0 tensors'),
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
def test_two_backbones_are_refused(tmp_path, small_params, write, other):
    tensors = {f'backbone/{name}': array for name, array in flatten(small_params).items()}
    save_file(tensors | {other: tensors['backbone/block1_conv1/kernel']}, tmp_path / 'two')
    hdf5 = write('weights.h5', small_params)
    with h5py.File(hdf5, 'a') as file:
        file[other] = small_params['block1_conv1']['kernel']
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


def test_hdf5_brings_in_no_other_file(tmp_path, write, small_params):
    outside = write('weights.h5', small_params)
    inside = tmp_path / 'linked.h5'
    with h5py.File(inside, 'w') as file:
        for layer in small_params:
            file[layer] = h5py.ExternalLink(outside, f'/{layer}')
        file['model_weights'] = h5py.ExternalLink(outside, '/')
        file['loop'] = h5py.SoftLink('/')
    with pytest.raises(UserError, match='it holds 0 tensors'):
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
