"""EfficientNet-Lite0 gives what the publishers' code gives, ResNet-50 what Keras gives."""

import re
from fnmatch import fnmatchcase

import jax
import keras
import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_sample_image

from cnn_jax import config as cfg
from cnn_jax.backbones import BACKBONES, EfficientNetLite0, ResNet50, ResNet50V1
from cnn_jax.config import BACKBONE, NORMED_BACKBONES
from cnn_jax.errors import UserError
from cnn_jax.features import Extractor
from cnn_jax.models import build
from cnn_jax.params import flatten, partition, unflatten
from cnn_jax.pretrained.formats import read
from cnn_jax.pretrained.networks import CLASSES, network
from cnn_jax.pretrained.weights import (
    CAFFE,
    LITE,
    TORCH,
    from_file,
    insert,
    load,
    load_cached,
    save_cached,
)
from cnn_jax.tools.published import class_names, published_run
from cnn_jax.train.fit import fit
from tests.pretrained.conftest import archive_pth, close_index

# By efficientnet-lite-pytorch 0.1.0 on PyTorch 2.13 (CPU), of the middle of two photographs: the
# products of its features [7, 7, 1280] with two random tensors, and seven of its logits.
REFERENCE = {
    'china.jpg': (
        *(-289.6023, 56.13786),
        *(1.344148, 0.7916314, -0.02202207, -0.984386, -1.090162, -0.5282363, -0.5717186),
    ),
    'flower.jpg': (
        *(-24.70338, -74.37408),
        *(-1.456019, -0.6425868, -1.380833, -1.940941, 0.6330166, 0.5908299, -0.02781681),
    ),
}
EVERY = slice(0, None, 150)


def middle(name: str, size: int = 224) -> np.ndarray:
    top, left = 213 - size // 2, 320 - size // 2
    return load_sample_image(name)[top : top + size, left : left + size]


def variables(pretrained, model=None, size: int = 224) -> dict:
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape((model or EfficientNetLite0()).init, jax.random.key(0), image)
    flat = {kind: flatten(tree) for kind, tree in shapes.items()}
    given = flatten(insert(unflatten(flat['params'] | flat['batch_stats']), pretrained))
    return {kind: unflatten({n: given[n] for n in names}) for kind, names in flat.items()}


def test_outputs_are_those_of_the_publishers_code(lite0):
    images = np.stack([middle(name) for name in REFERENCE])
    model = EfficientNetLite0()
    features = np.asarray(model.apply(variables(lite0), lite0.preprocessing(images)))
    top = lite0.params['predictions']
    logits = features.mean((1, 2)) @ top['kernel'] + top['bias']
    random = np.random.default_rng(0).standard_normal((2, 7 * 7 * 1280))
    for ours, scores, reference in zip(features, logits, REFERENCE.values(), strict=True):
        products, expected = np.array(reference[:2]), np.array(reference[2:])
        scale = np.linalg.norm(ours)  # of such a product, as of a difference in any direction
        np.testing.assert_allclose(random @ ours.ravel(), products, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(scores[EVERY], expected, rtol=0, atol=1e-5 * abs(scores).max())


def test_a_published_network_predicts_without_a_run(lite0, monkeypatch):
    """Without a network, too, when its weights are cached; classes have numbers then."""
    save_cached(lite0.params, 'here', 'efficientnet_lite0')
    close_index(monkeypatch)
    with pytest.warns(match='classes are called by their numbers'):
        run = published_run('efficientnet_lite0')
    assert (run.class_names[7], len(run.class_names)) == ('class 7', CLASSES)
    found = np.log(run.predict(np.stack([middle(name) for name in REFERENCE])))[:, EVERY]
    expected = np.array([reference[2:] for reference in REFERENCE.values()])
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-4)


def test_names_of_classes_are_fetched_once_and_checked(monkeypatch, cache_folder):
    names = class_names()
    assert (names[985], names[744], len({*names})) == ('daisy', 'missile (744)', CLASSES)
    close_index(monkeypatch)
    assert class_names() == names
    (path,) = cache_folder.iterdir()
    path.write_bytes(path.read_bytes().replace(b'daisy', b'error'))
    assert class_names()[985] == 'class 985'


def test_published_weights_are_the_same_from_every_file(tmp_path, lite0, lite0_file):
    """PyTorch's old format, its new one, and the cached copy; the last tells its preprocessing."""
    assert (lite0.preprocessing, lite0.unused) == (LITE, ())
    assert 'Apache-2.0' in lite0.licence
    save_cached(lite0.params, 'here', 'efficientnet_lite0')
    assert load_cached('efficientnet_lite0').digest == lite0.digest
    tensors = torch_names(lite0.params)
    archive_pth({f'module.{name}': array for name, array in tensors.items()}, tmp_path / 'w.pth')
    params, unused, contents = read(tmp_path / 'w.pth', network('efficientnet_lite0'))
    assert (unused, contents.layout) == ((), 'torch')
    assert {n: a.tobytes() for n, a in flatten(params).items()} == {
        n: a.tobytes() for n, a in flatten(lite0.params).items()
    }


def torch_names(params) -> dict[str, np.ndarray]:
    """The tensors as EfficientNet-PyTorch calls and lays them."""
    units = {'expand': '_bn0', 'depthwise': '_bn1', 'project': '_bn2'}
    others = {'stem_norm': '_bn0', 'stem_conv': '_conv_stem', 'predictions': '_fc'}
    others |= {'block17_conv': '_conv_head', 'block17_norm': '_bn1'}
    words = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
    found = {}
    for name, array in flatten(params).items():
        layer, tensor = name.split('/')
        if layer not in others:
            block, unit, kind = layer.split('_')
            inside = units[unit] if kind == 'norm' else f'_{unit}_conv'
            layer = f'_blocks.{int(block.removeprefix("block")) - 1}.{inside}'
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        array = np.ascontiguousarray(array.transpose(axes))
        found[f'{others.get(layer, layer)}.{words.get(tensor, tensor)}'] = array
    return found


def test_what_misses_is_named(tmp_path, lite0):
    tensors = torch_names(lite0.params)
    del tensors['_blocks.3._bn1.running_var']
    tensors['_fc.weight'] = tensors['_fc.weight'][:10]
    archive_pth(tensors, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='EfficientNet-Lite0: block4_depthwise_norm/var is missing'):
        read(tmp_path / 'w.pth', network('efficientnet_lite0'))


@pytest.mark.parametrize('extra', ['_blocks.0._se_reduce.weight', '_blocks.16._bn2.bias'])
def test_a_relative_with_more_in_its_blocks_is_refused(tmp_path, lite0, extra):
    tensors = torch_names(lite0.params) | {extra: np.ones(8, np.float32)}
    archive_pth(tensors, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'EfficientNet-Lite0: .* is not part of it'):
        read(tmp_path / 'w.pth', network('efficientnet_lite0'))


def test_names_of_the_config_are_those_of_the_backbones():
    assert BACKBONE['only_for'] == tuple(BACKBONES)
    normed = [name for name in BACKBONES if any('/mean' in n for n in network(name).shapes)]
    assert normed == list(NORMED_BACKBONES)


def test_parameters_are_as_many_as_published():
    sizes = {name: np.prod(shape) for name, shape in network('efficientnet_lite0').shapes.items()}
    learned = partition(unflatten(sizes), [n for n in sizes if not n.endswith(('mean', 'var'))])[0]
    assert sum(learned.values()) + 1281 * CLASSES == 4_652_008  # 4.7 million


@pytest.mark.parametrize(('cut', 'shape'), [('stem', (32, 24, 32)), ('block6', (4, 3, 80))])
def test_cut(cut, shape):
    image = jax.ShapeDtypeStruct((2, 63, 48, 3), np.float32)
    model = EfficientNetLite0(cut=cut)
    output, tree = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    assert output.shape == (2, *shape)
    assert (f'{cut}_conv' in tree['params']) or (f'{cut}_project_conv' in tree['params'])


def test_features_do_not_depend_on_the_place_in_a_batch(lite0):
    model = cfg.Model(name='efficientnet_lite0', cut='block6', hidden=(), pool='average')
    net = build(model, 2)
    inside = variables(lite0, EfficientNetLite0(cut='block6'), 96)
    backbone = {kind: {'backbone': tree} for kind, tree in inside.items()}
    extractor = Extractor(cfg.Config(model=model), 2, lite0.preprocessing, {}, backbone)
    compute, numbers = extractor.function(None), np.arange(5)
    images = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    rows = np.asarray(compute(extractor.weights, images, numbers))
    turned = np.asarray(compute(extractor.weights, images[::-1], numbers))
    assert rows.tobytes() == turned[::-1].tobytes()
    plain = net.apply(backbone, lite0.preprocessing(images), train=False, method='features')
    np.testing.assert_allclose(rows, plain, rtol=0, atol=1e-4)
    assert rows.shape[1:] == (6, 6, 80)


@pytest.mark.parametrize(
    ('frozen', 'cache'),
    [('backbone/*', 'always'), ('backbone/*', 'never'), ('backbone/[!b]*', 'auto'), ('', 'auto')],
)
def test_frozen_statistics_are_the_files_bit_for_bit(tmp_path, lite0, lite0_file, frozen, cache):
    """Whatever else is averaged, decayed or estimated; what is trained moves, statistics too."""
    cut = 'block1' if frozen != 'backbone/*' else 'block4'
    model = {'name': 'efficientnet_lite0', 'weights': str(lite0_file), 'cut': cut}
    config = cfg.Config(
        model=cfg.Model(**model, hidden=(4,), pool='average'),
        data=cfg.Data(batch=4),
        loss=cfg.Loss(l2=0.1, l2_on=('*/kernel',)),
        optimizer=cfg.Optimizer(name='adamw', weight_decay=0.1, accumulate=2),
        train=cfg.Train(epochs=2, frozen=(frozen,) if frozen else (), ema=0.9, precise_norm=2),
        features=cfg.Features(cache=cache),
    )
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, 32, 32, 3), np.uint8)
    split = images, np.arange(8) % 2
    state = fit(config, tmp_path / 'run', train=split, eval=split, say=lambda _: None).state
    for tree in (state.params, state.batch_stats, state.eval_batch_stats):
        for name, leaf in flatten(tree['backbone']).items():
            layer, tensor = name.split('/')
            same = np.asarray(leaf).tobytes() == lite0.params[layer][tensor].tobytes()
            assert same == fnmatchcase(f'backbone/{name}', frozen), name


# ResNet-50, both versions, against Keras with random weights.


@pytest.fixture(scope='module')
def keras_resnet():
    """Keras's ResNet-50 with random weights and statistics."""
    model = keras.applications.ResNet50(weights=None, include_top=True)
    draw = np.random.default_rng(0)
    for layer in model.layers:
        weights = layer.get_weights()
        if len(weights) == 4:  # batch normalization
            low = (0.5, -0.1, -0.1, 0.5)
            layer.set_weights([draw.uniform(a, 1, w.shape) for a, w in zip(low, weights)])
        elif weights:
            layer.set_weights([weights[0], draw.normal(0, 0.1, weights[1].shape)])
    return model


def same_features(ours, pretrained, theirs, side: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), np.uint8)
    x = np.asarray(pretrained.preprocessing(images))
    expected = np.asarray(theirs(x))
    found = np.asarray(ours().apply(variables(pretrained, ours(), side), x))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize('name', ['r.weights.h5', 'r.h5', 'r.keras', 'nested.weights.h5'])
@pytest.mark.filterwarnings('ignore')  # Keras calls its own format legacy
def test_resnet_of_keras(tmp_path, keras_resnet, name):
    model = keras_resnet
    if name.startswith('nested'):
        model = keras.Sequential(
            [keras.layers.Input((64, 64, 3)), headless(model), pool(), dense()]
        )
    (model.save_weights if name.endswith('weights.h5') else model.save)(tmp_path / name)
    found = from_file(tmp_path / name, 'resnet50_v1')
    assert ('predictions' in found.params) == (not name.startswith('nested'))
    assert found.preprocessing is CAFFE
    if name == 'r.weights.h5':
        same_features(ResNet50V1, found, headless(keras_resnet), 64)
    with pytest.raises(UserError, match='does not hold ResNet-50:'):
        from_file(tmp_path / name, 'resnet50')
    for layer, tensors in found.params.items():
        theirs = keras_resnet.get_layer(keras_name(layer)).get_weights()
        order = ('scale', 'bias', 'mean', 'var') if 'norm' in layer else ('kernel', 'bias')
        assert [tensors[t].tobytes() for t in order] == [w.tobytes() for w in theirs], layer


def pool():
    return keras.layers.GlobalAveragePooling2D()


def dense():
    return keras.layers.Dense(2)


def headless(model, side=None):
    """The network without its classifier, for images of any size."""
    whole = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(side, side, 3)
    )
    for layer in whole.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights() if layer.weights else [])
    return whole


def keras_name(layer: str) -> str:
    """Keras's `conv2_block1_0_conv` for `block1_shortcut_conv`."""
    if not layer.startswith('block'):
        kind = layer.partition('_')[2]
        return {'conv': 'conv1_conv', 'norm': 'conv1_bn'}.get(kind, layer)
    block, part = layer.removeprefix('block').split('_', 1)
    stage, index = place(int(block))
    part = {'shortcut_conv': 'conv0', 'shortcut_norm': 'norm0'}.get(part, part)
    return f'conv{stage + 2}_block{index + 1}_{part[-1]}_{part[:-1].replace("norm", "bn")}'


def place(block: int) -> tuple[int, int]:
    """Stage and index in it, both from 0, of a block from 1."""
    return [(stage, i) for stage, count in enumerate((3, 4, 6, 3)) for i in range(count)][block - 1]


def test_resnet_of_torch(tmp_path, keras_resnet):
    """Keras's with the strides where torchvision has them, and without biases.

    TensorFlow pads images of an odd size as PyTorch does.
    """

    def moved(layer):
        config = layer.get_config()
        if re.fullmatch(r'conv[345]_block1_[12]_conv', layer.name):
            config['strides'] = (1, 1) if layer.name.endswith('1_conv') else (2, 2)
        return type(layer).from_config(config)

    theirs = keras.models.clone_model(headless(keras_resnet, 33), clone_function=moved)
    tensors = {}
    for layer in network('resnet50').shapes:
        name, tensor = layer.split('/')
        whole = keras_resnet.get_layer(keras_name(name)).get_weights()
        if name.endswith('conv') or '_conv' in name:
            whole[1][:] = 0
        if tensor != 'kernel' and '_conv' in name:
            continue
        theirs.get_layer(keras_name(name)).set_weights(whole)
        order = ('scale', 'bias', 'mean', 'var') if 'norm' in name else ('kernel', 'bias')
        array = whole[order.index(tensor)]
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        tensors[torch_resnet_name(name, tensor)] = np.ascontiguousarray(array)
    tensors['fc.weight'], tensors['fc.bias'] = np.zeros((10, 2048), 'f4'), np.zeros(10, 'f4')
    save_file(tensors, tmp_path / 'timm.safetensors')
    archive_pth({f'module.{name}': a for name, a in tensors.items()}, tmp_path / 'vision.pth')
    for file in ('timm.safetensors', 'vision.pth'):
        found = from_file(tmp_path / file, 'resnet50')
        assert (found.preprocessing, len(found.unused)) == (TORCH, 2)
    same_features(ResNet50, found, theirs, 33)
    with pytest.raises(UserError, match='does not hold ResNet-50 v1'):
        from_file(tmp_path / 'vision.pth', 'resnet50_v1')
    with pytest.raises(UserError, match='no weights of ResNet-50 are published'):
        load(backbone='resnet50')


def torch_resnet_name(layer: str, tensor: str) -> str:
    words = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
    stem = {'stem_conv': 'conv1', 'stem_norm': 'bn1'}
    if layer not in stem:
        block, part = layer.removeprefix('block').split('_', 1)
        stage, index = place(int(block))
        part = {'shortcut_conv': 'downsample.0', 'shortcut_norm': 'downsample.1'}.get(part, part)
        stem[layer] = f'layer{stage + 1}.{index}.{part.replace("norm", "bn")}'
    return f'{stem[layer]}.{words.get(tensor, tensor)}'
