"""One door for every kind of weights file."""

import os
import stat
from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.pretrained.layout import Params
from cnn_jax.pretrained.read_hdf5 import open_hdf5
from cnn_jax.pretrained.read_onnx import open_onnx
from cnn_jax.pretrained.read_safetensors import open_safetensors
from cnn_jax.pretrained.stored import Contents, collect

_OPENERS = {'HDF5': open_hdf5, 'ONNX': open_onnx, 'safetensors': open_safetensors}


def read(path: Path, include_top: bool = False) -> tuple[Params, Contents, tuple[str, ...]]:
    """VGG16's parameters from a file; nothing in the file is executed.

    Args:
        path: Keras .h5, ONNX, or safetensors in torchvision's, timm's or this project's names;
            the kind is told from the content.
        include_top: Also the three fully connected layers.

    Returns:
        Parameters as `{'block1_conv1': {'kernel', 'bias'}, …}`, the file's layout and metadata,
        and the names of the tensors outside of VGG16 that were left alone.

    Errors:
        UserError: The file cannot be read, is damaged, or does not hold VGG16; all mismatches
            are listed.
    """
    kind = _kind(path)
    try:
        with _OPENERS[kind](path) as contents:
            params, ignored = collect(contents, path, include_top)
    except UserError:
        raise
    except Exception as error:  # parsers of three libraries, each with errors of its own
        reason = str(error).strip().split('\n')[0] or type(error).__name__
        raise UserError(
            f'{path} is not a complete {kind} file ({reason}); copy or download it again'
        ) from error
    return params, contents, ignored


def _kind(path: Path) -> str:
    """The file's kind, from its first bytes: names lie."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f'{path} is a folder, a pipe or a device; give a file')
        with open(path, 'rb') as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}; check the path') from error
    if head.startswith(b'\x89HDF\r\n\x1a\n'):
        return 'HDF5'
    if head[4:] == b'\0\0\0\0{':  # a header's length below 4 GiB, then its JSON
        return 'safetensors'
    if head.startswith(b'\x08'):  # field 1, the version, comes first
        return 'ONNX'
    if head.startswith((b'PK', b'\x80')):
        raise UserError(
            f'{path} is a pickle or an archive, which is not opened because it can run code; '
            'save the weights as safetensors, ONNX or Keras .h5'
        )
    raise UserError(
        f'{path} is neither Keras HDF5, ONNX nor safetensors; give a file of one of these kinds'
    )
