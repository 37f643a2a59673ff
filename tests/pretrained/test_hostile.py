"""Weights files made to mislead, and damaged ones: one plain sentence, and nothing runs."""

import io
import json
import os
import pickle
import pickletools
import zipfile

import h5py
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.errors import UserError
from cnn_jax.params import flatten
from cnn_jax.pretrained.formats import read
from cnn_jax.pretrained.torch_files import open_torch
from cnn_jax.pretrained.weights import load
from tests.damage import Runs, damaged, object_array
from tests.pretrained.conftest import (
    TABLE,
    WRITERS,
    Raw,
    archive_pth,
    legacy_pth,
    onnx_tensors,
    pickled,
    table,
    tensor,
)


@pytest.mark.parametrize('kind', WRITERS)
@settings(derandomize=True, max_examples=100)
@given(data=st.data())
def test_a_damaged_file_is_a_user_error_or_still_holds_the_network(
    tmp_path, write, small_params, kind, data
):
    whole = write(kind, small_params).read_bytes()
    (tmp_path / 'damaged').write_bytes(data.draw(damaged(whole, start=9)))
    try:
        found = flatten(read(tmp_path / 'damaged')[0])
    except UserError:
        return
    expected = flatten(small_params)
    assert found.keys() == expected.keys()  # the formats have no checksum of the values
    for name, array in found.items():
        assert (array.shape, array.dtype) == (expected[name].shape, np.float32)
        assert np.isfinite(array).all()


# Headers that lie.


def safetensors(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + bytes(64)


def entry(shape, start, end):
    return {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, end]}


@pytest.mark.parametrize(
    'content',
    [
        (1 << 31).to_bytes(8, 'little') + b'{}',
        safetensors({'block1_conv1/bias': entry([1 << 62], 0, 1 << 62)}),
        safetensors({'block1_conv1/bias': entry([2], 0, 8), 'b': entry([2], 4, 12)}),
        safetensors({'block1_conv1/bias': entry([-2], 0, 8)}),
        safetensors(b'{"a":' * 100_000),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, content):
    (tmp_path / 'weights.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=r'not a complete safetensors file|neither a Keras'):
        read(tmp_path / 'weights.safetensors')


@pytest.mark.parametrize('dims', [[1 << 62, 1 << 62], [-2], [2, 1 << 40], [0]])
def test_an_onnx_tensor_whose_sizes_lie(write, small_params, dims):
    kernel, bias, *others = onnx_tensors(small_params)
    bias.dims[:] = dims
    with pytest.raises(UserError, match=r'block1_conv1/bias is \['):
        read(write('graph.onnx', small_params, tensors=[kernel, bias, *others]))
    bias.dims[:], bias.raw_data = [2], b''
    with pytest.raises(UserError, match='not a complete ONNX file'):
        read(write('graph.onnx', small_params, tensors=[kernel, bias, *others]))


@pytest.mark.parametrize('location', ['secret', '../secret', '/etc/passwd', '/dev/zero', ''])
def test_an_onnx_tensor_in_another_file_is_refused(tmp_path, write, small_params, location):
    (tmp_path / 'secret').write_bytes(bytes(8))
    kernel, bias, *others = onnx_tensors(small_params)
    bias.ClearField('raw_data')
    bias.data_location = onnx.TensorProto.EXTERNAL
    bias.external_data.add(key='location', value=location)
    with pytest.raises(UserError, match='keeps block1_conv1/bias in another file'):
        read(write('graph.onnx', small_params, tensors=[kernel, bias, *others]))


def test_an_hdf5_set_that_is_larger_than_any_memory(write, small_params):
    path = write('weights.h5', small_params)
    with h5py.File(path, 'a') as file:
        del file['block1_conv1/block1_conv1_b_1:0']
        file.create_dataset('block1_conv1/bias', (1 << 40,), 'f4', chunks=(1 << 10,))
    with pytest.raises(UserError, match=r'block1_conv1/bias is \[1099511627776\] instead of \[2\]'):
        read(path)


# Code.


def archive(content: bytes) -> bytes:
    """As torch.save and .npz and .keras files are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as members:
        members.writestr('archive/data.pkl', content)
    return file.getvalue()


FORMS = {
    **{f'pickle {n}': (lambda runs, n=n: pickle.dumps(runs, protocol=n)) for n in range(6)},
    'archive': lambda runs: archive(pickle.dumps(runs)),
    'object array': object_array,
    'archive of object arrays': lambda runs: archive(object_array(runs)),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_pickle_is_refused_unread(tmp_path, form):
    ran, path = tmp_path / 'ran', tmp_path / 'vgg16.h5'
    path.write_bytes(FORMS[form](Runs(ran)))
    with pytest.raises(
        UserError, match=r'can run code; save|neither a Keras|not a complete PyTorch'
    ):
        load(path)
    assert not ran.exists()


# PyTorch's files: every operation but those of a table of tensors is refused, and every lie.

FORMATS = {'legacy': legacy_pth, 'archive': archive_pth}
NUMBERS = {'x': np.arange(6, dtype=np.float32).reshape(2, 3)}


def code(operation: str, argument: bytes) -> bytes:
    """A table with one more operation of a name that `pickletools` knows."""
    opcode = next(each.code for each in pickletools.opcodes if each.name == operation)
    return b'\x80\x02}(' + opcode.encode('latin1') + argument + b'u.'


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize(
    'program',
    [
        *(b'\x80\x02c' + name + b'\n)R.' for name in (b'posix\nsystem', b'builtins\neval')),
        b'\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.',
        b'\x80\x02ctorch\nFloatStorage.__reduce__\n.',
        b'cposix\nsystem\n(Vtouch ran\ntR.',
        b'(Vtouch ran\niposix\nsystem\n.',
        b'(cposix\nsystem\nVtouch ran\no.',
        code('STACK_GLOBAL', b''),
        code('NEWOBJ', b''),
        code('NEWOBJ_EX', b''),
        code('EXT1', b'\x01'),
        code('PERSID', b'a\n'),
        code('FRAME', bytes(8)),
        code('LONG4', bytes(4)),
        code('BINBYTES', bytes(4)),
        code('DUP', b''),
    ],
)
def test_a_program_that_asks_for_more_is_refused(tmp_path, monkeypatch, form, program):
    monkeypatch.chdir(tmp_path)
    FORMATS[form](NUMBERS, tmp_path / 'w.pth', program)
    with pytest.raises(UserError, match='can run code; save the model'):
        read(tmp_path / 'w.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('form', FORMATS)
def test_parameters_are_tensors_and_other_numbers_are_named(tmp_path, form):
    """As `dict(model.named_parameters())` holds them."""
    name = b'ctorch._utils\n_rebuild_parameter\n'
    inside = Raw(name + pickled((tensor(NUMBERS['x'], 'x'), True, TABLE)) + b'R')
    FORMATS[form](NUMBERS, tmp_path / 'w.pth', table({'x': inside}))
    with open_torch(tmp_path / 'w.pth') as file:
        np.testing.assert_array_equal(file['x'][1](), NUMBERS['x'])
    brain = tensor(NUMBERS['x'], 'x', kind='BFloat16Storage')
    FORMATS[form](NUMBERS, tmp_path / 'w.pth', table({'x': brain}))
    with pytest.raises(UserError, match=r'torch\.BFloat16Storage.*float'):
        read(tmp_path / 'w.pth')


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize(
    'lie',
    [
        {'offset': 1},
        {'offset': -1},
        {'shape': (2, 4)},
        {'shape': (1 << 30, 1 << 30), 'strides': (0, 0)},
        {'shape': (2, -3)},
        {'shape': (7,), 'strides': (0,)},
        {'shape': (6,)},
        {'strides': (3, -1)},
        {'strides': (1 << 30, 1)},
        {'count': 7},
        {'count': -6},
        {'count': 1 << 30},
        {'kind': 'LongStorage'},
        {'key': 'absent'},
        {'key': '../data.pkl'},
    ],
)
def test_a_torch_tensor_that_lies(tmp_path, form, lie):
    lie = {'key': 'x'} | lie
    FORMATS[form](NUMBERS, tmp_path / 'w.pth', table({'x': tensor(NUMBERS['x'], **lie)}))
    with pytest.raises((ValueError, KeyError)), open_torch(tmp_path / 'w.pth') as file:
        file['x'][1]()


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize(
    'program',
    [
        b'\x80\x02}.}',  # what follows is no table's business
        b'\x80\x02' + b'N' * 1_000_001 + b'.',
        b'\x80\x02' + b')' + b'\x85' * 900_000 + b'.',
        b'\x80\x02N',
        b'\x80\x02u.',
        b'\x80\x02}q\x00(h\x00h\x00u.',
        b'\x80\x02j\xff\xff\xff\xff.',
        b'\x80\x02X\xff\xff\xff\x7fa.',
        b'\x80\x02X\x01\x00\x00\x00\xff.',
        b'\x80\x02\x8a\xff',
        b'\x80\x02NQ.',
        b'\x80\x02NNR.',
        b'\x80\x02' + TABLE + b'(NNu.',
    ],
)
def test_a_program_that_makes_no_sense(tmp_path, form, program):
    FORMATS[form](NUMBERS, tmp_path / 'w.pth', program)
    with pytest.raises(UserError, match=r'not a complete PyTorch|does not hold VGG16|no table'):
        read(tmp_path / 'w.pth')


def test_a_packed_archive_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / 'w.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('weights/data.pkl', table({}))
        archive.writestr('weights/data/x', bytes(1 << 20))
    with pytest.raises(UserError, match='compressed'):
        read(tmp_path / 'w.pth')


def test_what_a_keras_file_says_of_code_is_not_read(tmp_path, write, small_params):
    path, ran = write('weights.h5', small_params), tmp_path / 'ran'
    with h5py.File(path, 'a') as file:
        file.attrs['model_config'] = np.void(pickle.dumps(Runs(ran)))
        file['lambda/function'] = np.frombuffer(pickle.dumps(Runs(ran)), np.uint8)
    assert flatten(read(path)[0]).keys() == flatten(small_params).keys()
    assert not ran.exists()


@pytest.mark.parametrize(
    ('members', 'packing', 'sentence'),
    [
        ([('model.weights.h5', bytes(1 << 24))], zipfile.ZIP_DEFLATED, 'unpack to 16,777,216'),
        ([('model.weights.h5', b'x')] * 2, zipfile.ZIP_STORED, 'twice'),
        ([('model.weights.h5', b'x' * 99)], zipfile.ZIP_LZMA, 'packed in an unusual way'),
        ([('../model.weights.h5', b'x')], zipfile.ZIP_STORED, 'no model.weights.h5'),
        ([('model.weights.h5', b'\x80\x04pickled')], zipfile.ZIP_STORED, 'not a complete .keras'),
    ],
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_an_odd_keras_archive_is_refused(tmp_path, members, packing, sentence):
    with zipfile.ZipFile(tmp_path / 'model.keras', 'w', packing) as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / 'model.keras')
    assert os.listdir(tmp_path) == ['model.keras']
