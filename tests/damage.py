"""What happens to files: bytes replaced, inserted, lost; code in them; kills between operations."""

import contextlib
import io
import os
import shutil
import sys

import numpy as np
from hypothesis import strategies as st

LIES = [b'\xff' * 4, b'\xff' * 8, b'\x7f' + b'\xff' * 7, b'\0' * 8]  # sizes that headers tell


@st.composite
def damaged(draw, content: bytes, start: int = 0) -> bytes:
    """`content` after one to three accidents, the bytes before `start` left as they are."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(start, max(start, len(changed))))
        lost = draw(st.sampled_from([0, 1, 4, 8, len(changed)]))
        changed[at : at + lost] = draw(st.sampled_from(LIES) | st.binary(max_size=8))
    return bytes(changed)


OPERATIONS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.chmod')
_watchers = []
sys.addaudithook(lambda event, arguments: [watch(event, arguments) for watch in _watchers] and None)


@contextlib.contextmanager
def copied_before_each_operation(folder, copies):
    """Copy a folder before each operation on a file in it: what a kill at that moment leaves."""
    copies.mkdir()

    def copy(event, arguments):
        path = arguments[0] if event in OPERATIONS else None
        if isinstance(path, str | os.PathLike) and str(folder) in os.fspath(path):
            _watchers.clear()
            shutil.copytree(folder, copies / str(len(os.listdir(copies))))
            _watchers.append(copy)

    _watchers.append(copy)
    try:
        yield
    finally:
        _watchers.clear()


class Runs:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def object_array(content) -> bytes:
    """A `.npy` file of one Python object, which is pickled."""
    file = io.BytesIO()
    np.save(file, np.array([content], object), allow_pickle=True)
    return file.getvalue()
