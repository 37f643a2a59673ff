"""Experiment files: executed once, their mistakes told with the line."""

import pytest

from cnn_jax import components
from cnn_jax.config import Config
from cnn_jax.errors import UserError

HEAD = 'from cnn_jax.config import *\n'
GOOD = HEAD + 'def get_config(): return Config(seed=7)\n'


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment file and returns its path."""

    def write(text, name='experiment.py'):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('x = 1\ndef get_config(:', 'line 2: SyntaxError'),
        (b'\xff\x00', 'SyntaxError'),
        ('import nowhere_to_be_found', "line 1: ModuleNotFoundError: No module named 'nowhere"),
        ('import sys; sys.exit(0)', 'line 1: it ends the program'),
        ('raise ValueError', 'line 1: ValueError$'),
        ('from cnn_jax import Regularizer\nRegularizer("bad", len)', 'line 2: config.bad is not'),
        ('x = 1', r'has no function get_config\(\)'),
        ('get_config = 3', r'has no function get_config\(\)'),
        ('def get_config(): pass', 'returns a NoneType'),
        ('def get_config(): return {}', 'returns a dict'),
        ('def get_config(name): pass', 'TypeError.*name'),
        (HEAD + 'def get_config():\n  return Config(train=Train(epoch=3))', 'line 3.*mean epochs'),
        (HEAD + 'def get_config():\n  c = Config()\n  c.model.droput = 1', 'line 4.*mean dropout'),
        (HEAD + 'def get_config():\n  c = Config()\n  c.lr = 1', 'line 4: Config has no field lr$'),
    ],
)
def test_a_mistake_is_one_sentence_with_its_line(experiment, text, words):
    path = experiment(text)
    with pytest.raises(UserError, match=words) as raised:
        components.get_config(path)
    assert str(path) in str(raised.value)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('model = 3', 'model'),
        ('REGULARIZERS = 3', 'REGULARIZERS'),
        ('REGULARIZERS = [3]', 'REGULARIZERS'),
        (
            'from cnn_jax import Regularizer\nREGULARIZERS = [Regularizer("loss.l3", None)]',
            'config.loss.l3',
        ),
    ],
)
def test_what_a_file_brings_is_checked(experiment, text, word):
    with pytest.raises(UserError, match=word):
        components.from_experiment(experiment(GOOD + text))


def test_an_error_in_what_it_brings_names_its_line_and_ours_stay(experiment):
    module = components.load_experiment(experiment('import json\ndef f(x):\n  json.loads(x)'))
    for call, told in (
        (lambda: module.f('{'), r'experiment\.py, line 3: JSONDecodeError'),
        (lambda: experiment(), r'line \d+: TypeError.*argument'),
        (lambda: components.get_config('none.py'), r'line \d+: none\.py: there is no such file'),
    ):
        with pytest.raises(UserError, match=told), components.blamed_on('your own model'):
            call()
    with pytest.raises(KeyError), components.blamed_on(None):
        {}['x']


def test_what_is_no_python_file_is_said(experiment, tmp_path):
    with pytest.raises(UserError, match='no such file'):
        components.get_config(tmp_path / 'none.py')
    with pytest.raises(UserError, match='no such file'):
        components.get_config(tmp_path)
    with pytest.raises(UserError, match='must end in'):
        components.get_config(experiment(GOOD, 'experiment.txt'))
    assert components.get_config(experiment(GOOD, 'no\udcffutf8.py')).seed == 7


def test_a_file_is_executed_once_and_after_a_mistake_again(experiment, tmp_path):
    count = f'open({str(tmp_path / "count")!r}, "a").write("x")\n'
    path = experiment(count + '1 / 0')
    with pytest.raises(UserError, match='ZeroDivisionError'):
        components.get_config(path)
    path.write_text(count + GOOD)
    assert components.get_config(path) == Config(seed=7)
    assert components.from_experiment(path) == components.NO_COMPONENTS
    assert (tmp_path / 'count').read_text() == 'xx'
