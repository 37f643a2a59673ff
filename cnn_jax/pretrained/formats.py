"""Readers for VGG16's parameters: Keras HDF5, ONNX and safetensors, under every common naming.

A reader lists the tensors of a file with the shapes and dtypes that the file claims. Values are
read only after all of them have been checked, and nothing in a file is executed.
"""

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.params import flatten, unflatten

Params = Mapping[str, Mapping[str, np.ndarray]]  # {'block1_conv1': {'kernel': …, 'bias': …}, …}

# (block, filters, convolutions): configuration D of Simonyan and Zisserman, Table 1.
BLOCKS = (
    ('block1', 64, 2),
    ('block2', 128, 2),
    ('block3', 256, 3),
    ('block4', 512, 3),
    ('block5', 512, 3),
)


def _convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    channels = 3
    for block, filters, count in BLOCKS:
        for i in range(1, count + 1):
            yield f'{block}_conv{i}', (3, 3, channels, filters)
            channels = filters


# Kernel shapes in the order of the layers: HWIO, and (inputs, outputs) for the top.
CONVOLUTIONS = dict(_convolutions())
TOP = {'fc1': (7 * 7 * 512, 4096), 'fc2': (4096, 4096), 'predictions': (4096, 1000)}

# Layers with these names belong to a VGG backbone; one that VGG16 lacks is another network's.
_BACKBONE = re.compile(r'(block\d+_conv\d+|features\.\d+)\b')
_KERAS_CONVOLUTION = re.compile(r'block\d+_conv\d+')
_KERAS_3_LAYER = re.compile(r'\bconv2d(?:_(\d{1,9}))?/vars$')
_KERAS_TENSORS = {4: 'kernel', 2: 'kernel', 1: 'bias'}  # by rank

# In torchvision's `features` a ReLU follows each convolution, and a pool each block.
_TORCH_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_TORCH_LAYERS = {f'features.{i}': layer for i, layer in zip(_TORCH_FEATURES, CONVOLUTIONS)}
_TORCH_TENSORS = {'weight': 'kernel', 'bias': 'bias'}
_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16'}


def shapes(include_top: bool = False) -> dict[str, tuple[int, ...]]:
    """Return all shapes in canonical order: `{'block1_conv1/kernel': (3, 3, 3, 64), …}`."""
    layers = CONVOLUTIONS | (TOP if include_top else {})
    return {
        f'{layer}/{tensor}': kernel if tensor == 'kernel' else kernel[-1:]
        for layer, kernel in layers.items()
        for tensor in ('kernel', 'bias')
    }


def digest(params: Params) -> str:
    """Return the SHA-256 of the parameters' bytes: the same for equal weights in any file format.

    The bytes are each convolution's kernel (HWIO), then its bias, in the order of the layers,
    float32, little-endian, row-major.
    """
    sha256 = hashlib.sha256()
    flat = flatten(params)
    for name in shapes():
        if name in flat:
            sha256.update(np.ascontiguousarray(flat[name], '<f4').data)
    return sha256.hexdigest()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: shape and dtype as the file claims, values read on demand."""

    shape: tuple[int, ...]  # canonical: a kernel is HWIO
    dtype: str  # NumPy's name
    read: Callable[[], np.ndarray]  # returns an array of `shape`


@dataclass(frozen=True)
class Contents:
    """The tensors of an open file; those of VGG16 have canonical names: `block1_conv1/kernel`."""

    tensors: list[tuple[str, LazyTensor]]
    layout: str  # the naming scheme: 'keras', 'torch', 'cnn_jax', or '' if it is none of them
    metadata: Mapping[str, str] = field(default_factory=dict)  # free text that the file carries


def read(path: Path) -> tuple[Params, tuple[str, ...], Contents]:
    """Read VGG16's convolutions from a file without executing anything in it.

    Args:
        path: Keras .h5, ONNX, or safetensors in torchvision's, timm's or this project's names;
            the format is detected from the content.

    Returns:
        `(params, unused, contents)`: float32, row-major, read-only arrays; the names of the other
        tensors, such as a classifier's head; and the closed file's `Contents`.

    Errors:
        UserError: The file is damaged, or holds another network or values that are not finite;
            all mismatches are listed.
    """
    kind = _format(path)
    try:
        with _READERS[kind](path) as contents:
            params, unused = _collect(contents, path)
    except UserError:
        raise
    except Exception as error:  # three parsers, each with exceptions of its own
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise UserError(
            f'{path} is not a complete {kind} file ({reason}); copy or download it again'
        ) from error
    return params, unused, contents


def _format(path: Path) -> str:
    """Detect the file's format from its first bytes; file names lie."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f'{path} is a folder, a pipe or a device; give a file')
        with open(path, 'rb') as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}; check the path') from error
    if head.startswith(b'\x89HDF\r\n\x1a\n'):
        return 'HDF5'
    if head[4:] == b'\0\0\0\0{':  # the length of the header, below 4 GiB, then its JSON
        return 'safetensors'
    if head.startswith(b'\x08'):  # field 1, the version, comes first
        return 'ONNX'
    if head.startswith((b'PK', b'\x80')):
        raise UserError(
            f'{path} is a pickle or an archive, which is not opened because it can run code; '
            'save the weights as safetensors, ONNX or Keras .h5'
        )
    raise UserError(
        f'{path} is neither Keras HDF5, ONNX nor safetensors; give a file in one of these formats'
    )


def _collect(contents: Contents, path: Path) -> tuple[Params, tuple[str, ...]]:
    """Check every tensor, then read those of VGG16; returns them and the names of the others."""
    tensors = dict(contents.tensors)
    if len(tensors) < len(contents.tensors):
        ((twice, _),) = Counter(name for name, _ in contents.tensors).most_common(1)
        raise UserError(f'{path} holds {twice} twice; save VGG16 alone')
    expected = shapes()
    if problems := _mismatches(tensors, expected):
        raise UserError(
            f'{path} does not hold VGG16: {"; ".join(problems)}; give a file of this network'
        )
    arrays = {name: _float32(tensors[name].read()) for name in expected}
    if invalid := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f'{path} holds values that are not finite in {", ".join(invalid)}; '
            'give a file whose training did not diverge'
        )
    return unflatten(arrays), tuple(name for name in tensors if name not in expected)


def _mismatches(tensors: Mapping[str, LazyTensor], expected: dict) -> list[str]:
    problems = [f'{name} is missing' for name in expected if name not in tensors]
    problems += [
        f'{name} is not part of it'
        for name in tensors
        if name not in expected and _BACKBONE.match(name)
    ]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != shape:
            problems.append(f'{name} is {list(tensor.shape)} instead of {list(shape)}')
        if tensor.dtype not in ('float16', 'float32'):
            problems.append(f'{name} is {tensor.dtype} instead of float32')
    return problems


def _float32(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array, np.float32)
    array.flags.writeable = False
    return array


# Keras's HDF5: published weights, whole models, and `.weights.h5`.


@contextmanager
def _open_hdf5(path: Path) -> Iterator[Contents]:
    """Open a Keras file.

    A tensor's layer is the last group above it that is named after one. In Keras 3's
    `.weights.h5` convolutions are numbered in their order, `conv2d`, `conv2d_1`, …. (Their names
    are attributes, which libhdf5 cannot read safely from a damaged file.) Only hard links are
    followed, so that a file cannot bring in what lies outside of it.
    """
    import h5py

    with h5py.File(path, 'r') as file:
        tensors: list[tuple[str, LazyTensor]] = []

        def visit(name: str, item: object) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            if item.is_virtual or item.external:
                raise UserError(f'{path} keeps {name} in another file; save it in one')
            layer = _keras_layer(name.split('/')[:-1])
            canonical = f'{layer}/{_KERAS_TENSORS.get(len(item.shape), name)}' if layer else name
            tensors.append((canonical, LazyTensor(item.shape, item.dtype.name, lambda: item[()])))

        root: h5py.Group = file
        # A whole model keeps its optimizer's state, under the same names, beside the weights.
        if isinstance(file.get('model_weights', getlink=True), h5py.HardLink):
            root = h5py.Group(file['model_weights'].id)
        root.visititems(visit)
        yield Contents(tensors, 'keras')


def _keras_layer(groups: list[str]) -> str:
    for group in reversed(groups):
        if group in CONVOLUTIONS or _BACKBONE.fullmatch(group):
            return group
    if not (match := _KERAS_3_LAYER.search('/'.join(groups))):
        return ''
    number, layers = int(match[1] or 0), list(CONVOLUTIONS)
    return layers[number] if number < len(layers) else ''


# ONNX graphs, read as data.


@contextmanager
def _open_onnx(path: Path) -> Iterator[Contents]:
    """Open an ONNX graph; its convolutions count by their order, as exporters rename tensors."""
    import onnx

    # Tensors in files beside the model are refused below, not loaded.
    graph = onnx.load(path, load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    if len(initializers) != len(graph.initializer):
        raise UserError(f'{path} gives two tensors the same name; export the model again')
    nodes = [node for node in graph.node if node.op_type == 'Conv']
    if len(nodes) != len(CONVOLUTIONS):
        raise UserError(
            f'{path} has {len(nodes)} convolutions where VGG16 has {len(CONVOLUTIONS)}; '
            'give a file of this network'
        )
    tensors = []
    layouts = set()
    for layer, node in zip(CONVOLUTIONS, nodes):
        layouts.add(_onnx_layout(node.input[1], layer, path))
        for tensor, name in zip(('kernel', 'bias'), node.input[1:]):
            if name in initializers:
                stored = _onnx_tensor(initializers.pop(name), path)
                tensors.append(_from_torch(f'{layer}/{tensor}', stored))
    tensors += [(name, _onnx_tensor(tensor, path)) for name, tensor in initializers.items()]
    yield Contents(tensors, layouts.pop() if len(layouts) == 1 else '')


def _onnx_tensor(tensor, path: Path) -> LazyTensor:
    import onnx

    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f'{path} keeps {tensor.name} in another file; save the model in one')
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return LazyTensor(tuple(tensor.dims), dtype, partial(onnx.numpy_helper.to_array, tensor))


def _onnx_layout(name: str, layer: str, path: Path) -> str:
    """The naming scheme of a kernel, which must agree with its place: 'keras', 'torch' or ''."""
    match, canonical = _KERAS_CONVOLUTION.search(name), canonical_name(name)
    if not match and canonical == name:
        return ''
    named = match[0] if match else canonical.split('/')[0]
    if named != layer:
        raise UserError(f'{path} has {named} where VGG16 has {layer}; give a file of VGG16')
    return 'keras' if match else 'torch'


# safetensors: torchvision's and timm's names, or this project's own.


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Contents]:
    """Open a safetensors file, memory-mapped.

    This project's names may stand under a module's (`backbone/block1_conv1/kernel`).
    """
    from safetensors import safe_open

    with safe_open(path, framework='numpy') as file:
        names = list(file.keys())
        torch = any(name.startswith('features.') for name in names)
        tensors = []
        for name in names:
            view = file.get_slice(name)
            dtype = str(view.get_dtype())
            tensor = LazyTensor(
                tuple(view.get_shape()),
                _SAFETENSORS_DTYPES.get(dtype, dtype),
                partial(file.get_tensor, name),
            )
            if torch:
                tensors.append(_from_torch(canonical_name(name), tensor))
            else:
                own = '/'.join(name.split('/')[-2:])
                tensors.append((own if own in shapes() else name, tensor))
        yield Contents(tensors, 'torch' if torch else 'cnn_jax', file.metadata() or {})


_READERS = {'HDF5': _open_hdf5, 'ONNX': _open_onnx, 'safetensors': _open_safetensors}


# torchvision's and timm's names and axes.


def canonical_name(name: str) -> str:
    """Translate `features.0.weight` to `block1_conv1/kernel`; return other names as they are."""
    layer, _, tensor = name.rpartition('.')
    if layer in _TORCH_LAYERS and tensor in _TORCH_TENSORS:
        return f'{_TORCH_LAYERS[layer]}/{_TORCH_TENSORS[tensor]}'
    return name


def _from_torch(name: str, tensor: LazyTensor) -> tuple[str, LazyTensor]:
    """A torch tensor of a canonical name, a convolution's from OIHW in HWIO."""
    shape = tensor.shape
    if not (name.startswith('block') and name.endswith('/kernel') and len(shape) == 4):
        return name, tensor
    hwio = (shape[2], shape[3], shape[1], shape[0])
    return name, LazyTensor(hwio, tensor.dtype, lambda: tensor.read().transpose(2, 3, 1, 0))
