"""VGG16 from Keras's HDF5 files: published weights, whole models, and `.weights.h5`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.pretrained.layout import CONVOLUTIONS, TOP
from cnn_jax.pretrained.stored import BACKBONE, Contents, Stored, add

_TENSORS = {4: 'kernel', 2: 'kernel', 1: 'bias'}  # by rank
_NUMBERED = re.compile(r'\bconv2d(?:_(\d{1,9}))?/vars$')


@contextmanager
def open_hdf5(path: Path) -> Iterator[Contents]:
    """The contents of a Keras file.

    A tensor's layer is the last group above it that is named after one. In Keras 3's
    `.weights.h5` convolutions are numbered in their order, `conv2d`, `conv2d_1`, …. (Their names
    are attributes, which libhdf5 cannot read safely from a damaged file.) Only hard links are
    followed, so that a file cannot bring in what lies outside of it.
    """
    import h5py

    with h5py.File(path, 'r') as file:
        tensors: dict[str, Stored] = {}

        def visit(name: str, item: object) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            layer = _layer(name.split('/')[:-1])
            ours = f'{layer}/{_TENSORS.get(len(item.shape), name)}' if layer else name
            if item.is_virtual or item.external:
                raise UserError(f'{path} keeps {name} in another file; save it in one')
            add(tensors, ours, Stored(item.shape, item.dtype.name, lambda: item[()]), path)

        root: h5py.Group = file
        # A whole model keeps its optimizer's state, under the same names, beside the weights.
        if isinstance(file.get('model_weights', getlink=True), h5py.HardLink):
            root = h5py.Group(file['model_weights'].id)
        root.visititems(visit)
        yield Contents(tensors, 'keras')


def _layer(groups: list[str]) -> str:
    for group in reversed(groups):
        if group in CONVOLUTIONS or group in TOP or BACKBONE.fullmatch(group):
            return group
    if not (numbered := _NUMBERED.search('/'.join(groups))):
        return ''
    number, layers = int(numbered[1] or 0), list(CONVOLUTIONS)
    return layers[number] if number < len(layers) else ''
