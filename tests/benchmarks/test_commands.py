import importlib
import sys

import pytest

from benchmarks import __main__ as everything
from benchmarks import cli, gate, start
from cnn_jax.errors import UserError

MODULES = [
    '__main__',
    *sorted({m.split('.')[1] for m, *_ in everything.WORKLOADS.values()}),
    'plot',
]


@pytest.mark.parametrize('module', MODULES)
def test_help(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [module, '--help'])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f'benchmarks.{module}').main()
    assert stop.value.code == 0
    assert 'python -m benchmarks' in capsys.readouterr().out


def test_a_workload_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    ran = []

    def run(module, *options):
        ran.append((module, options))
        return int(module == 'benchmarks.features')

    monkeypatch.setattr(everything, 'run', run)
    monkeypatch.setattr(sys, 'argv', ['all', '--only=features,start', '--rounds=1', '--peers=p'])
    assert everything.main() == 1
    assert [module for module, _ in ran] == [
        'benchmarks.features',
        'benchmarks.start',
        'benchmarks.plot',
    ]
    assert ran[1][1] == ('--peers=p', '--out=benchmarks/RESULTS.md', '--rounds=1')
    assert 'failed: features' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('error', 'code', 'message'),
    [
        (UserError('say it otherwise'), 2, 'error: say it otherwise\n'),
        (gate.Disagreement('not the same'), 'failed: not the same', ''),
    ],
)
def test_errors_are_one_sentence(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == message


def test_the_cells_of_a_start():
    seconds = {'a': [3.0, 5.0], 'b': [2.0, 2.0]}
    assert start.cells(seconds, 'a', 'b') == ('4.0 [3.5–4.5]', '2.00 [1.75–2.25]')
