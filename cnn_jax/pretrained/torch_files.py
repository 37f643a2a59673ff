"""A reader of PyTorch's weights files that runs nothing in them.

`torch.save` writes a pickle, a program for a stack machine that may call any function. Here a
machine of our own reads it: it knows the operations of which a table of tensors is made, the names
below stand for values of ours, and everything else in a file is a `UserError`.
"""

import math
import mmap
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from cnn_jax.errors import UserError, printable

LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # PyTorch's magic number, itself pickled
STORAGES = {'torch FloatStorage': '<f4', 'torch HalfStorage': '<f2', 'torch LongStorage': '<i8'}
TABLE = 'collections OrderedDict'
TENSORS = 'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_tensor'  # of PyTorch 0.3
PARAMETER = 'torch._utils _rebuild_parameter'  # a tensor, and whether it is trained
MOST_OPERATIONS = 1_000_000  # that a file may take; ResNet-50's takes 11 thousand
_PUSHES = {'BINUNICODE', 'BININT', 'BININT1', 'BININT2', 'LONG1'}  # their argument
_MARK = object()
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': (), 'MARK': _MARK}


@dataclass(frozen=True)
class Name:
    """One of the functions and types above, as a file names it; nothing is imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    """The bytes of one tensor or more."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A part of a storage, in numbers: its first element, sizes and strides."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        sizes = (self.offset, *self.shape, *self.strides)
        if any(type(n) is not int or n < 0 for n in sizes) or len(self.shape) != len(self.strides):
            raise ValueError('a tensor of impossible size')
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        # Strides of 0 would make a tensor of any size from one number.
        if math.prod(self.shape) > self.storage.count or (
            0 not in self.shape and last >= self.storage.count
        ):
            raise ValueError('a tensor that is larger than its storage')

    def array(self, numbers: np.ndarray) -> np.ndarray:
        """A copy of the tensor, from the numbers of its storage."""
        if numbers.size != self.storage.count:
            raise ValueError(f'the storage {self.storage.key} has another size')
        strides = [n * numbers.itemsize for n in self.strides]
        part = numbers[self.offset :]
        return np.lib.stride_tricks.as_strided(part, self.shape, strides, writeable=False).copy()


@contextmanager
def open_torch(path: Path) -> Iterator[dict[str, tuple[Tensor, Callable[[], np.ndarray]]]]:
    """Open a file that `torch.save(model.state_dict(), path)` wrote, in either of its formats.

    Returns:
        For each name the tensor, and the function that reads it while the file is open.

    Errors:
        UserError: The file holds anything but a table of tensors.
        ValueError, and others: It is damaged.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, 'rb'))
        content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if content[: len(LEGACY)] == LEGACY:
            table, numbers = _legacy(content, path)
        else:
            archive = stack.enter_context(zipfile.ZipFile(file))
            table, numbers = _archive(archive, len(content), path)
        named = table.items() if isinstance(table, dict) else ()
        if not (tensors := {name: each for name, each in named if isinstance(each, Tensor)}):
            raise UserError(f'{path} holds no table of tensors; save the model.state_dict() alone')

        def reader(tensor: Tensor) -> Callable[[], np.ndarray]:
            return lambda: tensor.array(numbers(tensor.storage))

        yield {name: (tensor, reader(tensor)) for name, tensor in tensors.items()}


def _legacy(content: mmap.mmap, path: Path) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """PyTorch's format before 1.6: five pickles, then each storage, its length before it."""
    _, protocol, system, table, keys = (_load(content, path) for _ in range(5))
    if protocol != 1001 or not system['little_endian'] or not isinstance(keys, list):
        raise ValueError('another protocol')
    starts, at = {}, content.tell()
    storages = {each.storage.key: each.storage for each in table.values() if type(each) is Tensor}
    for key in keys:
        count = int.from_bytes(content[at : at + 8], 'little')
        if key not in storages or count != storages[key].count:
            raise ValueError(f'the storage {key} has another size')
        starts[key] = at + 8
        at += 8 + count * np.dtype(storages[key].dtype).itemsize
    if at > len(content):
        raise ValueError('it ends too early')

    def numbers(storage: Storage) -> np.ndarray:
        start, dtype = starts[storage.key], np.dtype(storage.dtype)
        return np.frombuffer(content[start : start + storage.count * dtype.itemsize], dtype)

    return table, numbers


def _archive(
    archive: zipfile.ZipFile, size: int, path: Path
) -> tuple[Any, Callable[[Storage], np.ndarray]]:
    """PyTorch's format since 1.6: a ZIP archive, nothing in it compressed."""
    (program,) = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    folder = program.removesuffix('/data.pkl')
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ValueError(f'{info.filename} is compressed')
    order = f'{folder}/byteorder'
    if order in archive.namelist() and archive.read(order) != b'little':
        raise ValueError('another byte order')

    def numbers(storage: Storage) -> np.ndarray:
        return np.frombuffer(archive.read(f'{folder}/data/{storage.key}'), storage.dtype)

    return _load(archive.read(program), path), numbers


def _load(program: Any, path: Path) -> Any:
    """What a pickle describes, made of numbers, texts, tuples, lists, tables and `Tensor`s."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        start = next(i for i in reversed(range(len(stack))) if stack[i] is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for number, (operation, argument, _) in enumerate(pickletools.genops(program)):
        name, argument = operation.name, cast(Any, argument)
        if number > MOST_OPERATIONS:
            raise ValueError('a table of so many tensors')
        if name in _PUSHES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ('EMPTY_DICT', 'EMPTY_LIST'):
            stack.append({} if name == 'EMPTY_DICT' else [])
        elif name == 'GLOBAL':
            if re.fullmatch(r'torch \w+Storage', argument) and argument not in STORAGES:
                raise UserError(
                    f'{path} has a {argument.replace(" ", ".")}, which is not read; save '
                    'model.float().state_dict()'
                )
            if argument not in (TABLE, PARAMETER, *TENSORS, *STORAGES):
                raise _refused(path, argument.replace(' ', '.'))
            stack.append(Name(argument))
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'TUPLE':
            stack.append(tuple(marked()))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ('SETITEM', 'SETITEMS'):
            items = marked() if name == 'SETITEMS' else [stack.pop(-2), stack.pop()]
            table = stack[-1]
            if type(table) is not dict or not all(isinstance(key, str) for key in items[::2]):
                raise ValueError('a table of other things')
            table.update(zip(items[::2], items[1::2], strict=True))
        elif name == 'APPENDS':
            items = marked()
            stack[-1].extend(items)
        elif name == 'BINPERSID':
            stack.append(_storage(stack.pop()))
        elif name == 'REDUCE':
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == 'BUILD':
            stack.pop()  # attributes of a table, such as the versions of its modules
        elif name == 'STOP':
            return stack.pop()
        elif name != 'PROTO':
            raise _refused(path, f'the operation {name}')
    raise ValueError('it has no end')


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f'{path} asks for {printable(what)}, which no table of tensors needs and which can run '
        'code; save the model.state_dict() alone, or as safetensors'
    )


def _storage(facts: Any) -> Storage:
    word, kind, key, _, count = facts[:5]
    if word != 'storage' or not isinstance(kind, Name) or type(key) is not str:
        raise ValueError('another kind of storage')
    if type(count) is not int or count < 0:
        raise ValueError('a storage of impossible size')
    return Storage(key, STORAGES[kind.name], count)


def _call(function: Any, arguments: Any) -> Any:
    """The value of a named function: an empty table, or a tensor."""
    if function == Name(TABLE) and arguments == ():
        return {}
    if function == Name(PARAMETER) and arguments and isinstance(arguments[0], Tensor):
        return arguments[0]
    if function not in map(Name, TENSORS) or not isinstance(arguments[0], Storage):
        raise ValueError('a call of another thing')
    storage, offset, shape, strides, *_ = arguments
    return Tensor(storage, offset, shape, strides)
