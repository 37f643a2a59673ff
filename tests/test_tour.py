"""The notebook runs as it is, and its pictures show something."""

import json

import jax
import matplotlib.pyplot as plt
import pytest

from tests.environments import ROOT

NOTEBOOK = json.loads((ROOT / 'docs' / 'tour.ipynb').read_text())
CODE = [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']


@pytest.mark.slow
def test_every_cell_runs_and_the_pictures_show_something():
    plt.switch_backend('agg')
    scope = {}
    for number, cell in enumerate(CODE, start=1):
        exec(compile(''.join(cell['source']), f'tour.ipynb, code cell {number}', 'exec'), scope)
    figures = [plt.figure(number) for number in plt.get_fignums()]
    figures += [scope['run'].curves.plot(), scope['result'].plot()]
    assert len(figures) == 5
    assert all(axes.has_data() for figure in figures for axes in figure.axes)
    plt.close('all')
    assert scope['run'].metrics['accuracy'] > 0.9
    assert set(scope['result'].verdicts) == {'dropout', 'batch norm', 'L2'}
    moved = {part: any(jax.tree.leaves(tree)) for part, tree in scope['moved'].items()}
    assert moved == {'backbone': False, 'head': True}


def test_each_stored_output_is_one_of_a_whole_run_without_errors():
    assert all(cell['execution_count'] for cell in CODE)
    outputs = [output for cell in CODE for output in cell['outputs']]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 5
