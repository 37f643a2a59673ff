"""Predictions as text and as JSON, with and without an uncertainty."""

from pathlib import Path

from cnn_jax.train.predict import Prediction

CLASSES = (('cat', 0.75), ('dog', 0.25))


def test_a_prediction_without_draws_has_no_uncertainty():
    row = Prediction(Path('a.png'), CLASSES)
    assert row.as_text(top=2) == 'a.png: cat 75.0%  dog 25.0%'
    assert row.as_json(top=1) == {
        'file': 'a.png',
        'class': 'cat',
        'probability': 0.75,
        'top': [{'class': 'cat', 'probability': 0.75}],
    }


def test_a_prediction_from_draws_says_how_unsure_it_is():
    unsure = {'entropy': 0.5623, 'mutual_information': 0.125}
    row = Prediction(Path('a.png'), CLASSES, uncertainty=unsure)
    assert row.as_text(top=1) == 'a.png: cat 75.0%  entropy 0.562  mutual information 0.125'
    assert row.as_json(top=1).items() >= unsure.items()


def test_a_file_that_was_not_read_says_why():
    row = Prediction(Path('a.png'), error='it is empty')
    assert row.as_text(top=1) == 'a.png: not read: it is empty'
    assert row.as_json(top=1) == {'file': 'a.png', 'error': 'it is empty'}
