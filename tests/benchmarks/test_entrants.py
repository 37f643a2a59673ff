import sys

import pytest

from benchmarks import step
from benchmarks.entrants import Entrant, chosen, interpreter, keras_on, matching
from cnn_jax.errors import UserError


def install(home):
    python = home / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.touch()
    return python


def test_matching():
    names = ['cnn_jax', 'Flax', 'PyTorch', 'Keras on PyTorch']
    assert matching(names, ['PyTorch', 'cnn']) == ['cnn_jax', 'PyTorch', 'Keras on PyTorch']
    assert matching(names, []) == names
    with pytest.raises(UserError, match="no contender is called 'MXNet'; there are cnn_jax; Flax"):
        matching(names, ['Flax', 'MXNet'])


def test_who_compiles_stays_out_where_there_is_no_compiler(monkeypatch, tmp_path):
    install(tmp_path / 'pytorch')
    monkeypatch.setenv('CXX', 'no-such-compiler')
    found, left_out = chosen(step.PEERS, ['PyTorch,', 'Flax'], tmp_path)
    assert [*found] == ['Flax', 'PyTorch, channels_last']
    assert left_out == ['PyTorch, torch.compile']


def test_the_interpreter_of_a_peer(tmp_path):
    assert interpreter(tmp_path, '') == sys.executable
    with pytest.raises(UserError, match=r'run `bash benchmarks/setup_peers\.sh .*`'):
        chosen(step.PEERS, ['Flax', 'PyTorch'], tmp_path)
    python = install(tmp_path / 'pytorch')
    assert interpreter(tmp_path, 'pytorch') == str(python)


def test_keras_on_pytorch_shares_its_environment():
    assert keras_on('torch', 'm').home == 'pytorch'
    assert keras_on('jax', 'm').home == 'keras_jax'


def test_an_environment_reaches_the_process(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr('benchmarks.entrants.Worker', lambda *_, **options: given.update(options))
    entrant = Entrant('m', settings=True, environment={'A': '1', 'B': '1'})
    entrant.worker(tmp_path / 'p.npz', tmp_path, tmp_path / 'cache', {'B': '2'})
    assert given['settings']
    assert given['environment'].items() >= {'A': '1', 'B': '2'}.items()
    assert given['environment']['CNN_JAX_CACHE'] == str(tmp_path / 'cache')
