"""Nothing that is read can run code: the project opens no pickle and evaluates no text."""

import ast

import pytest

from tests.environments import ROOT

MODULES = {'pickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal', 'torch'}
CALLS = {'eval', 'exec', 'yaml.load', 'yaml.unsafe_load', 'torch.load', 'pd.read_pickle'}


def dangers(code: str) -> list[str]:
    """The imports and calls in `code` that can run what they read."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split('.')[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or '').split('.')[0] in MODULES else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            pickled = any(
                k.arg == 'allow_pickle' and ast.unparse(k.value) != 'False' for k in node.keywords
            )
            found += [called] if called in CALLS or pickled else []
    return found


@pytest.mark.parametrize('folder', ['cnn_jax', 'launch', 'experiments'])
def test_no_file_can_run_what_it_reads(folder):
    paths = sorted((ROOT / folder).rglob('*.py'))
    assert paths
    assert {p: found for p in paths if (found := dangers(p.read_text()))} == {}


@pytest.mark.parametrize(
    'code',
    [
        'import pickle',
        'def f():\n    from cloudpickle import load',
        'import numpy, joblib.externals',
        'exec(text)',
        'value = eval(text)',
        'np.load(path, allow_pickle=True)',
        'np.load(path, allow_pickle=flag)',
        'yaml.load(text)',
    ],
)
def test_the_law_knows_what_it_forbids(code):
    assert dangers(code)
    assert not dangers('np.load(path, allow_pickle=False); model.eval(); jax.eval_shape(f)')
