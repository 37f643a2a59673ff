"""The answers that are kept still hold: their experiments are the same, and so are their runs."""

import json
from pathlib import Path

import pytest

from tests import answers

KEPT = sorted(answers.FOLDER.glob('*.json'))


@pytest.mark.slow
@pytest.mark.parametrize('path', KEPT, ids=[path.stem for path in KEPT])
def test_two_runs_of_every_answer_come_out_again(path):
    """In bits on the same kind of processor, elsewhere within what training makes of rounding."""
    answer = json.loads(path.read_text())
    kind, _, folder = answer.get('source', '').partition(':')
    if kind == 'idx' and not Path(folder).exists():
        pytest.skip(f'{folder} is missing')
    for cell, again in zip(answer['cells'], answers.run_again(path), strict=True):
        assert again['config_hash'] == cell['config_hash'], 'the experiment has changed since'
        if again['convolutions'] == answer['convolutions']:
            assert again['digest'] == cell['digest']
        assert again['test']['accuracy'] == pytest.approx(cell['test']['accuracy'], abs=0.03)
        assert again['test']['loss'] == pytest.approx(cell['test']['loss'], abs=0.15)


def test_the_page_is_that_of_the_answers():
    assert KEPT
    assert (answers.ROOT / 'docs' / 'answers.md').read_text() == answers.page()
