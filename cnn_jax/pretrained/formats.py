"""Readers for a network's parameters: Keras files, ONNX and safetensors, under every common naming.

A reader lists the tensors of a file with the shapes and dtypes that the file claims. Values are
read only after all of them have been checked, and nothing in a file is executed.
"""

import hashlib
import io
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cnn_jax.errors import UserError, printable
from cnn_jax.params import flatten, unflatten
from cnn_jax.pretrained import networks
from cnn_jax.pretrained.networks import VGG_LAYER, Network, canonical_name
from cnn_jax.pretrained.torch_files import LEGACY, open_torch

Params = Mapping[str, Mapping[str, np.ndarray]]  # {'block1_conv1': {'kernel': …, 'bias': …}, …}

_KERAS_CONVOLUTION = re.compile(r'block\d+_conv\d+')

_SAFETENSORS_DTYPES = {'F32': 'float32', 'F16': 'float16'}

# Of a `.keras` file: the one member that is read, and its largest sizes. Weights hardly pack.
KERAS_WEIGHTS, MAX_MEMBER, MAX_PACKING = 'model.weights.h5', 1 << 32, 20
_PACKINGS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED

# What a refused file may be: convolutions a width (Simonyan and Zisserman, Table 1), all 3×3.
_RELATIVES = {
    'VGG11': {64: 1, 128: 1, 256: 2, 512: 4},
    'VGG13': {64: 2, 128: 2, 256: 2, 512: 4},
    'VGG16': {64: 2, 128: 2, 256: 3, 512: 6},
    'VGG19': {64: 2, 128: 2, 256: 4, 512: 8},
}
# One tensor of each batch normalization, as torch, Keras and Keras 3's `.weights.h5` call it.
_BATCH_NORM = re.compile(r'running_mean$|moving_mean(:0)?$|\bbatch_normalization(_\d+)?/vars/0$')


def digest(params: Params) -> str:
    """Return the SHA-256 of the parameters' bytes: the same for equal weights in any file format.

    The bytes are each layer's kernel (HWIO), then its other tensors, in alphabetical order,
    float32, little-endian, row-major.
    """
    sha256 = hashlib.sha256()
    flat = flatten(params)
    for name in sorted(flat, key=lambda name: name.replace('/kernel', '/')):
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
    """The tensors of an open file; the network's have canonical names: `block1_conv1/kernel`."""

    tensors: list[tuple[str, LazyTensor]]
    layout: str  # the naming scheme: 'keras', 'torch', 'cnn_jax', or '' if it is none of them
    metadata: Mapping[str, str] = field(default_factory=dict)  # free text that the file carries


def read(path: Path, network: Network | None = None) -> tuple[Params, tuple[str, ...], Contents]:
    """Read a network's tensors from a file without executing anything in it.

    Args:
        path: Keras .h5 or .keras, ONNX, PyTorch's .pth or safetensors, the last two in
            torchvision's, timm's or this project's names, under any prefix.
        network: Its tensors; None: VGG16's convolutions.

    Returns:
        `(params, unused, contents)`: float32, row-major, read-only arrays; the names of the other
        tensors, such as a classifier's head; and the closed file's `Contents`.

    Errors:
        UserError: The file is damaged, or holds another network, which is named or described, or
            values that are not finite.
    """
    kind, network = _format(path), network or networks.vgg16()
    try:
        with _READERS[kind](path, network) as contents:
            params, unused = _collect(contents, path, network)
    except UserError:
        raise
    except Exception as error:  # four parsers, each with exceptions of its own
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
            head = file.read(len(LEGACY))
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}; check the path') from error
    if head.startswith(b'\x89HDF\r\n\x1a\n'):
        return 'HDF5'
    if head[4:9] == b'\0\0\0\0{':  # the length of the header, below 4 GiB, then its JSON
        return 'safetensors'
    if head.startswith(b'\x08'):  # field 1, the version, comes first
        return 'ONNX'
    members = _members(path) if head.startswith(b'PK') else []
    if KERAS_WEIGHTS in members:
        return '.keras'
    if head == LEGACY or any(name.endswith('/data.pkl') for name in members):
        return 'PyTorch'
    if head.startswith((b'PK', b'\x80')):
        raise UserError(
            f'{path} is a pickle, or an archive in which no {KERAS_WEIGHTS} can be found, and is '
            'not opened because it can run code; save the weights as safetensors, ONNX or .keras'
        )
    raise UserError(
        f'{path} is neither a Keras, ONNX, PyTorch nor safetensors file; give a file in one of '
        'these formats'
    )


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return []


def _collect(contents: Contents, path: Path, network: Network) -> tuple[Params, tuple[str, ...]]:
    """Check every tensor, then read the network's; returns them and the names of the others."""
    tensors = dict(contents.tensors)
    if len(tensors) < len(contents.tensors):
        ((twice, _),) = Counter(name for name, _ in contents.tensors).most_common(1)
        raise UserError(f'{path} holds {twice} twice; save {network.title} alone')
    expected, title = dict(network.shapes), network.title
    problems, other = _mismatches(tensors, expected, network.block), _relative(tensors)
    if other not in ('', title) and (problems or other.endswith('normalization')):
        raise UserError(f'{path} holds {other}; give a file of {title}')
    if problems:
        seen = '; '.join(problems) if len(problems) <= 3 else _summary(tensors)
        raise UserError(f'{path} does not hold {title}: {seen}; give a file of this network')
    for name, shape in network.optional.items():
        if name in tensors and tensors[name].shape == shape:
            expected[name] = shape
    arrays = {name: np.ascontiguousarray(tensors[name].read(), np.float32) for name in expected}
    for array in arrays.values():
        array.flags.writeable = False
    if invalid := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f'{path} holds values that are not finite in {", ".join(invalid)}; '
            'give a file whose training did not diverge'
        )
    return unflatten(arrays), tuple(name for name in tensors if name not in expected)


def _mismatches(
    tensors: Mapping[str, LazyTensor], expected: dict, block: re.Pattern[str]
) -> list[str]:
    problems = [f'{name} is missing' for name in expected if name not in tensors]
    problems += [
        f'{name} is not part of it'
        for name in tensors
        if name not in expected and (VGG_LAYER.match(name) or block.search(name))
    ]
    for name, tensor in [(name, tensors[name]) for name in expected if name in tensors]:
        shape = expected[name]
        if tensor.shape != shape:
            problems.append(f'{name} is {list(tensor.shape)} instead of {list(shape)}')
        if tensor.dtype not in ('float16', 'float32'):
            problems.append(f'{name} is {tensor.dtype} instead of float32')
    return problems


def _relative(tensors: Mapping[str, LazyTensor]) -> str:
    """The network of VGG's family that the tensors are, or ''."""
    shapes = [tensor.shape for name, tensor in tensors.items() if not name.startswith('optimizer/')]
    kernels = [shape for shape in shapes if len(shape) == 4]
    # HWIO or OIHW: what could not be named was not transposed
    widths = Counter(shape[3] if shape[:2] == (3, 3) else shape[0] for shape in kernels)
    named = next((name for name, counts in _RELATIVES.items() if counts == widths), '')
    if named and sum(bool(_BATCH_NORM.search(name)) for name in tensors) >= len(kernels):
        return f'{named} with batch normalization'
    return named


def _summary(tensors: Mapping[str, LazyTensor]) -> str:
    """The number of tensors and the first of them: `it holds 161 tensors (bn1.bias [64], …)`."""
    first = [f'{printable(name)[:60]} {[*t.shape]}' for name, t in list(tensors.items())[:3]]
    more = ', …' if len(tensors) > 3 else ''
    return f'it holds {len(tensors):,} tensors ({", ".join(first)}{more})'


# Keras's HDF5: published weights, whole models, `.weights.h5`, and the one inside a `.keras` file.


@contextmanager
def _open_hdf5(
    path: Path, network: Network, content: io.BytesIO | None = None
) -> Iterator[Contents]:
    """Open a Keras file, or the `content` of one.

    A tensor's layer is the last group above it that is named after one, or numbered, as in Keras
    3's `.weights.h5`. (Names in attributes libhdf5 cannot read safely from a damaged file.) Only
    hard links are followed, so that a file cannot bring in what lies outside of it.
    """
    import h5py

    with h5py.File(content or path, 'r') as file:
        found: dict[str, h5py.Dataset] = {}

        def visit(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                if item.is_virtual or item.external:
                    raise UserError(f'{path} keeps {name} in another file; save it in one')
                found[name] = item

        root: h5py.Group = file
        # A whole model keeps its optimizer's state, under the same names, beside the weights.
        if isinstance(file.get('model_weights', getlink=True), h5py.HardLink):
            root = h5py.Group(file['model_weights'].id)
        root.visititems(visit)
        names = network.of_keras({name: item.shape for name, item in found.items()})
        tensors = []
        for name, item in found.items():
            tensor = LazyTensor(item.shape, item.dtype.name, partial(item.__getitem__, ()))
            tensors.append((names.get(name, name), tensor))
        yield Contents(tensors, 'keras')


@contextmanager
def _open_keras(path: Path, network: Network) -> Iterator[Contents]:
    """Open the weights in a Keras 3 `.keras` file; nothing else in it, such as code, is read."""
    with zipfile.ZipFile(path) as archive:
        members = [each for each in archive.infolist() if each.filename == KERAS_WEIGHTS]
        (member,) = members[:1]
        packing = member.file_size / max(member.compress_size, 1)
        if len(members) > 1 or member.flag_bits & 1 or member.compress_type not in _PACKINGS:
            raise UserError(
                f'{path} holds {KERAS_WEIGHTS} twice, encrypted or packed in an unusual way, which '
                'Keras does not do; save the model again'
            )
        if member.file_size > MAX_MEMBER or packing > MAX_PACKING:
            raise UserError(
                f'{path} would unpack to {member.file_size:,} bytes, {packing:,.0f} times its '
                'size, which weights do not; save the model again'
            )
        content = io.BytesIO(archive.read(member))
    with _open_hdf5(path, network, content) as contents:
        yield contents


# ONNX graphs, read as data.


@contextmanager
def _open_onnx(path: Path, network: Network) -> Iterator[Contents]:
    """Open an ONNX graph; its convolutions count by their order, as exporters rename tensors."""
    import onnx

    if network.title != 'VGG16':
        raise UserError(
            f'{path} is an ONNX graph, of which VGG16 alone is read; give {network.title} as '
            'safetensors or .pth'
        )
    # Tensors in files beside the model are refused below, not loaded.
    graph = onnx.load(path, load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    if len(initializers) != len(graph.initializer):
        raise UserError(f'{path} gives two tensors the same name; export the model again')
    nodes = [node for node in graph.node if node.op_type == 'Conv']
    if len(nodes) != len(networks.CONVOLUTIONS):
        raise UserError(
            f'{path} has {len(nodes)} convolutions where VGG16 has {len(networks.CONVOLUTIONS)}; '
            'give a file of this network'
        )
    tensors, layouts = [], set()
    for layer, node in zip(networks.CONVOLUTIONS, nodes):
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


# safetensors and PyTorch's files: torchvision's and timm's names, or this project's own.


@contextmanager
def _open_safetensors(path: Path, network: Network) -> Iterator[Contents]:
    """Open a safetensors file, memory-mapped."""
    from safetensors import safe_open

    with safe_open(path, framework='numpy') as file:
        tensors = {}
        for name in list(file.keys()):
            view = file.get_slice(name)
            dtype = str(view.get_dtype())
            tensors[name] = LazyTensor(
                tuple(view.get_shape()),
                _SAFETENSORS_DTYPES.get(dtype, dtype),
                partial(file.get_tensor, name),
            )
        yield _named(tensors, network, file.metadata())


@contextmanager
def _open_torch(path: Path, network: Network) -> Iterator[Contents]:
    """Open a file that `torch.save` wrote."""
    with open_torch(path) as file:
        tensors = {
            name: LazyTensor(tensor.shape, np.dtype(tensor.storage.dtype).name, read)
            for name, (tensor, read) in file.items()
        }
        yield _named(tensors, network)


def _named(
    tensors: Mapping[str, LazyTensor], network: Network, metadata: Mapping[str, str] | None = None
) -> Contents:
    """The tensors of a file, the network's under its own names.

    They may stand under a module's (`backbone/block1_conv1/kernel`), and torch's under any prefix
    (`model.features.0.weight`), for VGG16 also that of `features` alone (`vgg.0.weight`).
    """
    translated, found = network.of_torch(list(tensors)), []
    known = {*network.shapes, *network.optional}
    for name, tensor in tensors.items():
        if translated.get(name):
            found.append(_from_torch(translated[name], tensor))
        elif name not in translated:
            own = '/'.join(name.split('/')[-2:])
            found.append((own if own in known else name, tensor))
    return Contents(found, 'torch' if translated else 'cnn_jax', metadata or {})


_READERS = {'HDF5': _open_hdf5, '.keras': _open_keras, 'ONNX': _open_onnx}
_READERS |= {'safetensors': _open_safetensors, 'PyTorch': _open_torch}


def _from_torch(name: str, tensor: LazyTensor) -> tuple[str, LazyTensor]:
    """A torch tensor of a canonical name; a kernel's outputs and inputs are last here."""
    rank = len(tensor.shape)
    if not name.endswith('/kernel') or rank not in (2, 4):
        return name, tensor
    axes = (*range(2, rank), 1, 0)
    shape = tuple(tensor.shape[axis] for axis in axes)
    return name, LazyTensor(shape, tensor.dtype, lambda: tensor.read().transpose(axes))
