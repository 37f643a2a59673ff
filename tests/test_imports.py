"""Imports run downward, cost little, and importing touches nothing."""

import ast
import json
import subprocess
import sys

import pytest

from tests.environments import ROOT

# From the bottom up: a module may import its own layer and those below. The longest name counts.
LAYERS = [
    {
        'errors',
        'fetch',
        'files',
        'store',
        'rng',
        'config',
        'fields',
        'validation',
        'components',
        'params',
        'mesh',
        'runtime',
    }
    | {'nn.native'},
    {'packing', 'backbones', 'nn', 'regularizers', 'freezing', 'data', 'pretrained', 'summary'},
    {'models', 'optim', 'tools.profile', 'tools.progress', 'tools.selfcheck'},
    {'features', 'train.metrics', 'train.program', 'train.manifest'},
    {'train', 'tools.figures'},
    {'tools.nonfinite'},
    {'train.loop'},
    {'train.setup'},
    {'ablation.plan', 'ablation.results', 'ablation.training', 'ablation.tuning'},
    {'train.fit', 'train.run'},
    {'tools'},
    {'ablation', 'cnn_jax'},
    {'launch'},
]


# What an experiment file may use.
PUBLIC = 'ablation', 'config', 'nn', 'fetch', 'files'


def sources(folder):
    return sorted((ROOT / folder).rglob('*.py'))


def imports(path):
    """The project's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f'{node.module}.{alias.name}' for alias in node.names]
            names = [name if is_module(name) else node.module for name in modules]
        else:
            continue
        yield from (n for n in names if n.split('.')[0] in ('cnn_jax', 'launch', 'experiments'))


def is_module(name):
    place = ROOT.joinpath(*name.split('.'))
    return place.is_dir() or place.with_suffix('.py').exists()


def level(name):
    """The number of a module's layer."""
    parts = name.removeprefix('cnn_jax.').split('.')
    for length in (2, 1):
        for number, layer in enumerate(LAYERS):
            if '.'.join(parts[:length]) in layer:
                return number
    raise AssertionError(f'{name} has no place in LAYERS')


@pytest.mark.parametrize(
    'path', sources('cnn_jax') + sources('launch'), ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_run_downward(path):
    own = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    if own == 'cnn_jax.__init__':  # the front door opens every room, when it is used
        return
    for name in imports(path):
        assert not name.startswith('experiments')
        assert level(name) <= level(own), f'{own} imports {name}'


@pytest.mark.parametrize('path', sources('experiments'), ids=lambda path: path.stem)
def test_experiments_import_what_is_public(path):
    others = {name for name in imports(path) if not name.startswith('experiments')}
    assert others <= {'cnn_jax', *(f'cnn_jax.{each}' for each in PUBLIC)}


def loaded_by(statement, first='pass'):
    """The modules loaded by a statement in a fresh interpreter, and whether its environment is
    what it was after `first`.
    """
    code = (
        'import json, os, sys\n'
        f'{first}\n'
        'before = dict(os.environ)\n'
        f'{statement}\n'
        'print(json.dumps([sorted(sys.modules), before == dict(os.environ)]))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy_and_changes_nothing():
    modules, same = loaded_by('import cnn_jax, cnn_jax.config, cnn_jax.runtime; cnn_jax.Config()')
    heavy = {'jax', 'flax', 'optax', 'grain', 'orbax', 'matplotlib', 'tensorflow_datasets', 'ray'}
    assert not heavy & {name.split('.')[0] for name in modules}
    assert same


def test_the_whole_package_starts_no_device_and_loads_no_optional_library():
    names = [
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in sources('cnn_jax')
        if path.name != '__init__.py'
    ]
    statement = f'import {", ".join(names)}\nimport jax._src.xla_bridge as bridge\n'
    # JAX sets variables of its own when it is imported.
    modules, same = loaded_by(statement + 'assert not bridge._backends', first='import jax')
    late = {'grain', 'orbax', 'matplotlib', 'tensorflow_datasets', 'ray', 'PIL', 'sklearn', 'h5py'}
    assert not late & {name.split('.')[0] for name in modules}
    assert same


def test_no_flag_is_defined_outside_the_launchers():
    for path in sources('cnn_jax') + sources('experiments'):
        assert 'absl' not in path.read_text(), path
