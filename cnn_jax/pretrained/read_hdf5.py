"""VGG16 from Keras's HDF5 files: published weights, whole models, and `.weights.h5`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.pretrained.layout import CONVOLUTIONS, TOP
from cnn_jax.pretrained.stored import BACKBONE, Contents, Stored

_TENSORS = {4: 'kernel', 2: 'kernel', 1: 'bias'}  # by rank


@contextmanager
def open_hdf5(path: Path) -> Iterator[Contents]:
    """The contents of a Keras file.

    A tensor's layer is the last group above it that is named after one, or, in Keras 3's
    `.weights.h5`, the `name` that its group `vars` carries. Only hard links are followed, so that
    a file cannot bring in what lies outside of it.
    """
    import h5py

    with h5py.File(path, 'r') as file:
        tensors: dict[str, Stored] = {}

        def visit(name: str, item: object) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            layer = _layer(name, item)
            ours = f'{layer}/{_TENSORS.get(len(item.shape), name)}' if layer else name
            if ours in tensors:
                raise UserError(f'{path} holds {ours} twice; save the model without its optimizer')
            if item.is_virtual or item.external:
                raise UserError(f'{path} keeps {name} in another file; save it in one')
            tensors[ours] = Stored(item.shape, item.dtype.name, lambda: item[()])

        # A whole model keeps its optimizer's state, under the same names, beside the weights.
        root = h5py.Group(file['model_weights'].id) if _holds(file, 'model_weights') else file
        root.visititems(visit)
        yield Contents(tensors, 'keras')


def _holds(group, name: str) -> bool:
    import h5py

    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def _layer(name: str, item) -> str:
    groups = name.split('/')[:-1]
    if groups and groups[-1] == 'vars':
        groups = [_own_name(item.parent)]
    for group in reversed(groups):
        if group in CONVOLUTIONS or group in TOP or BACKBONE.fullmatch(group):
            return group
    return ''


def _own_name(group) -> str:
    """The attribute `name`, where it is one string: of a damaged file it can be a billion."""
    if 'name' not in group.attrs or group.attrs.get_id('name').shape != ():
        return ''
    return str(group.attrs['name'])
