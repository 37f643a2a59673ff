"""Evaluations against scikit-learn, hand and eye: numbers, predictions, the page in a browser."""

import csv
import dataclasses
import html
import io
import json
import math
import re
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cnn_jax as cj
from cnn_jax.components import from_experiment, get_config
from cnn_jax.errors import FORMULA, csv_cell, printable
from cnn_jax.tools import evaluate as module
from cnn_jax.tools.evaluate import HITS, MATRIX, MISTAKES, Evaluation
from tests.browser import ILLEGIBLE
from tests.environments import ROOT

IMAGES = 61
HOSTILE = (
    '<script>alert(1)</script>',
    '=cmd|calc',
    'red \x1b[31m \u202e turned',
    'a,"b"\n$x_1$ &amp; ' + 'c' * 60,
)
SHOWN = """
return [...document.querySelectorAll('.gallery img')].filter(e =>
    e.naturalWidth > 0 && e.getBoundingClientRect().width > 60).length;
"""


class Flat(nn.Module):
    """A network without a layer whose output is an image."""

    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def made_up(n, classes, seed=0, names=(), file='example {}'):
    """Images whose brightness hints at the class, as a `Source`; class 1 has none in the test."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % classes
    if seed and classes > 2:
        labels[labels == 1] = 0
    light = 40 + 150 * labels[:, None, None, None] / classes
    images = np.clip(draw.normal(light, 40, (n, 8, 8, 1)), 0, 255).astype(np.uint8)
    return cj.Source(
        name='made up',
        class_names=tuple(names or map(str, range(classes))),
        labels=labels,
        sizes=np.full((n, 2), 8, np.int32),
        channels=1,
        read=lambda i: images[i],
        describe=lambda i: file.format(i),
        fingerprint=f'{n} {classes} {seed}',
    )


CASES = {  # classes, names, files, changes to the config, model
    'sigmoid': (2, (), '/photos/test/{}.png', {'model.outputs': 1}, None),
    'hostile': (4, HOSTILE, '=1+1 <b>{}</b>\n\x1b.png', {}, None),
    'thousand': (1000, (), 'example {}', {}, None),
    'flat': (10, (), 'example {}', {}, Flat(10)),
}


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    """The evaluation of a case, with the data that it is of."""
    made = {}

    def make(case):
        if case not in made:
            classes, names, file, changes, model = CASES[case]
            train = made_up(max(80, classes), classes, 0, names, file)
            test = made_up(IMAGES, classes, 1, names, file)
            config = cj.Config(
                model=cj.Model(stem_width=0, widths=(4,), hidden=(8,)),
                data=cj.Data(batch=20),
                train=cj.Train(epochs=1),
            )
            parts = {'model': model, 'train': train, 'eval': test, 'say': lambda line: None}
            folder = tmp_path_factory.mktemp(case) / 'run'
            run = cj.fit(cj.replace(config, changes), folder, **parts)
            made[case] = cj.evaluate(run, data=test, train=train), test
        return made[case]

    return make


def wilson(right, n, z=1.959964):
    """The roots of (p − p̂)² = z²·p·(1 − p)/n."""
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return [middle - half, middle + half]


@pytest.mark.parametrize('case', CASES)
@pytest.mark.filterwarnings('ignore:y_pred contains classes', 'ignore:The y_prob values')
def test_numbers_equal_scikit_learns(evaluated, case):
    found, test = evaluated(case)
    truth, probabilities, m = test.labels, found.probabilities, found.metrics
    predicted, labels = probabilities.argmax(axis=1), range(len(test.class_names))
    right = int((truth == predicted).sum())
    expected = {
        'accuracy': right / IMAGES,
        'accuracy_interval': wilson(right, IMAGES),
        'balanced_accuracy': sklearn.metrics.balanced_accuracy_score(truth, predicted),
        'macro_f1': sklearn.metrics.f1_score(truth, predicted, average='macro'),
        'loss': sklearn.metrics.log_loss(truth, probabilities.astype(float), labels=labels),
        'guessing_loss': math.log(len(labels)),
    }
    assert {name: m[name] for name in expected} == {
        name: pytest.approx(value, rel=1e-5) for name, value in expected.items()
    }
    columns = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=np.nan
    )
    for name, column in zip(('precision', 'recall', 'f1', 'count'), columns):
        np.testing.assert_allclose([row[name] for row in m['classes']], column, err_msg=name)
    for k, row in enumerate(m['classes']):
        one = truth == k
        area = sklearn.metrics.roc_auc_score(one, probabilities[:, k]) if one.any() else math.nan
        assert row['auc'] == pytest.approx(area, nan_ok=True)


@pytest.mark.parametrize('case', CASES)
def test_confusions_are_the_matrix_and_bins_the_calibration_error(evaluated, case):
    found, test = evaluated(case)
    m, names = found.metrics, list(test.class_names)
    matrix = sklearn.metrics.confusion_matrix(
        test.labels, found.predicted, labels=range(len(names))
    )
    np.testing.assert_array_equal(m['confusion'], matrix)
    rows, rest = m['largest_confusions'], matrix - np.diag(np.diag(matrix))
    for row in rows:
        i, j = names.index(row['truth']), names.index(row['prediction'])
        assert (row['count'], row['of']) == (matrix[i, j], matrix[i].sum())
        rest[i, j] = 0
    assert [row['count'] for row in rows] == sorted((r['count'] for r in rows), reverse=True)
    assert rest.max(initial=0) <= min((row['count'] for row in rows), default=0)
    shown, small = module.merged(m['confusion'], names)
    assert len(shown) == len(small) <= MATRIX + 1
    assert small.sum() == IMAGES
    gaps = [row['count'] * abs(row['accuracy'] - row['confidence']) for row in m['reliability']]
    assert sum(gaps) / IMAGES == pytest.approx(m['calibration_error'])
    assert sum(row['count'] for row in m['reliability']) == IMAGES


@pytest.mark.parametrize('case', CASES)
def test_predictions_are_every_probability_and_no_cell_acts(evaluated, case, tmp_path):
    """In the split's order; no cell is a formula, or does something to a terminal."""
    found, test = evaluated(case)
    *_, path = found.write_report(tmp_path)
    text = path.read_text()
    assert re.findall('[\x00-\x09\x0b-\x1f\u202e]', text) == []
    head, *rows = csv.reader(io.StringIO(text))
    columns = [f'p({printable(name)})' for name in test.class_names]
    assert head == ['file', 'truth', 'prediction', *columns]
    np.testing.assert_array_equal(np.array([r[3:] for r in rows], 'f4'), found.probabilities)
    images = np.stack([test.read(i) for i in range(IMAGES)])
    np.testing.assert_allclose(found.run.predict(images), found.probabilities, rtol=1e-4, atol=1e-6)
    names = test.class_names
    for i, (row, cells) in enumerate(zip(found.table, rows, strict=True)):
        file, truth, prediction, *_ = row.values()
        assert (file, truth) == (test.describe(i), names[test.labels[i]])
        assert prediction == names[found.probabilities[i].argmax()]
        assert cells[:3] == [csv_cell(text) for text in (file, truth, prediction)]
        assert not [cell for cell in cells if cell.startswith(FORMULA)]


@given(
    arrays(np.float32, (30, 3), elements=st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0])),
    arrays(np.int32, 30, elements=st.integers(0, 2)),
)
def test_the_first_k_mistakes_are_the_k_most_confident_ones(probabilities, labels):
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    found = Evaluation(*[Any] * 2, [''] * 30, labels, predicted, probabilities, *[Any] * 4)
    for listed, kind, sign in (
        (found.mistakes, predicted != labels, 1),
        (found.hits, predicted == labels, -1),
    ):
        assert sorted(listed) == np.flatnonzero(kind).tolist()
        for k in range(1, len(listed)):
            first, rest = sign * confidence[listed[:k]], sign * confidence[listed[k:]]
            assert first.min() >= rest.max()


def figures_of(page, kind):
    """The names below the images of a gallery, and its images."""
    part = page.partition(f'<section id="{kind}">')[2].partition('</section>')[0]
    return re.findall(r'<small>(.*?)</small>', part, re.DOTALL), re.findall(
        r'<img src="(data:[^"]*)"', part
    )


@pytest.mark.parametrize('case', CASES)
def test_the_page_shows_the_mistakes_and_needs_no_network(evaluated, case, tmp_path):
    found, test = evaluated(case)
    page, numbers, _ = found.write_report(tmp_path)
    text = page.read_text()
    assert re.findall('[\x00-\x09\x0b-\x1f\u202e]', text) == []
    assert '<script' not in text
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]*)', text)
    assert [link for link in links if not link.startswith(('#', 'data:'))] == []
    for kind, positions in (
        ('mistakes', found.mistakes[:MISTAKES]),
        ('hits', found.hits[:HITS]),
    ):
        names, images = figures_of(text, kind)
        files = [test.describe(i).removeprefix('/photos/test/') for i in positions]
        assert [*map(html.unescape, names)] == [printable(file, keep='\n') for file in files]
        assert len(images) == len(positions) * (1 if case == 'flat' else 2)
    assert ('Grad-CAM' in text) == (case != 'flat')
    content = json.loads(numbers.read_text(), parse_constant=pytest.fail)
    assert [row['class'] for row in content['classes']] == list(test.class_names)
    assert len(content['confusion']) == len(content['class_accuracy']) == len(test.class_names)
    assert text.count('<td class="hit') <= MATRIX + 1
    assert (found.metrics['loss'] > found.metrics['guessing_loss']) == (
        'wrong with confidence' in text
    )


@pytest.mark.parametrize('width', [390, 1100])
@pytest.mark.parametrize('case', ['hostile', 'thousand'])
def test_the_page_is_readable(browser, evaluated, tmp_path, case, width):
    found, _ = evaluated(case)
    size = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    browser.get(found.write_report(tmp_path)[0].as_uri())
    assert browser.get_log('browser') == []
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    assert browser.execute_script(ILLEGIBLE) == []
    images = 2 * (len(found.mistakes[:MISTAKES]) + len(found.hits[:HITS]))
    assert browser.execute_script(SHOWN) == images


def test_the_summary_is_short_and_its_names_are_harmless(evaluated):
    for case in CASES:
        lines = repr(evaluated(case)[0]).split('\n')
        assert len(lines) <= 11
        assert not [line for line in lines if '\x1b' in line or '\u202e' in line]


@pytest.mark.parametrize('stream', ['never', 'always'])
def test_duplicates_are_found_by_their_pixels(evaluated, monkeypatch, stream):
    """Whatever they are called and labelled; of a large set, in as much of it as is decoded."""
    found, test = evaluated('flat')
    run = dataclasses.replace(
        found.run, config=cj.replace(found.run.config, {'data.stream': stream})
    )
    other = made_up(61, 10, seed=2, file='training {}')
    pairs = {40: 7, 3: 8}  # position in the training set, and in the test
    train = dataclasses.replace(
        other, read=lambda i: test.read(pairs[i]) if i in pairs else other.read(i)
    )
    result = cj.evaluate(run, data=test, train=train)
    names = [(row['file'], row['training_file']) for row in result.metrics['duplicates']]
    assert names == [('example 7', 'training 40'), ('example 8', 'training 3')]
    assert result.metrics['duplicates'][0]['truth'] == '7'
    assert result.metrics['duplicates'][0]['training_truth'] == '0'
    assert result.sought == '2 in the 61 training images'
    assert result.notes[-1].endswith('of a training image: 2 of 61')
    monkeypatch.setattr(module, 'MOST_DECODED', 20)
    result = cj.evaluate(run, data=test, train=train)
    assert len(result.metrics['duplicates']) == (1 if stream == 'always' else 2)
    assert ('the first 20 of' in result.sought) == (stream == 'always')
    assert 'own data' in cj.evaluate(run, data=test).sought


def test_one_image_and_arrays_without_names_are_evaluated(evaluated, tmp_path):
    run = evaluated('flat')[0].run
    image = np.zeros((1, 8, 8, 1), np.uint8)
    result = cj.evaluate(run, data=(image, [3]))
    result.write_report(tmp_path)
    assert len(result.table) == 1
    assert result.metrics['accuracy'] in (0, 1)


def test_each_split_and_checkpoint_has_a_folder_of_its_own(evaluated):
    found, _ = evaluated('flat')
    splits = 'test', 'train', 'all', 'train[:50%]', 'train[50%:]', 'train[:50]', 'train[5:10%]'
    runs = [dataclasses.replace(found.run, step=step) for step in (4, 8)]
    changed = [{'split': split, 'run': run} for split in splits for run in runs]
    folders = {dataclasses.replace(found, **changes).folder for changes in changed}
    assert len(folders) == 2 * len(splits)
    assert all(re.fullmatch(r'[\w.-]+', folder.name) for folder in folders)
    assert {folder.parent for folder in folders} == {found.run.folder / 'evaluation'}


def test_a_run_on_images_that_its_experiment_brings_is_evaluated_on_them(tmp_path):
    brought = from_experiment(ROOT / 'experiments' / 'own_resnet.py')
    config = cj.replace(get_config(brought.experiment), {'train.epochs': 1.0})
    trained = cj.fit(config, tmp_path / 'run', components=brought, say=lambda line: None)
    result = cj.evaluate(cj.load_run(tmp_path / 'run'))
    assert result.metrics['count'] == 1000
    assert result.metrics['accuracy'] == pytest.approx(trained.metrics['accuracy'])
    assert '200 training images' in result.sought
    run = cj.load_run(tmp_path / 'run')
    assert cj.evaluate(run, split=f'{config.data.train}[:90]').metrics['count'] == 90
    with pytest.raises(cj.UserError, match="no part 'nonsense', only "):
        cj.evaluate(run, split='nonsense')


def test_a_run_of_a_fold_is_evaluated_on_it_and_on_what_is_asked_for(tmp_path):
    images = made_up(80, 2)
    config = cj.Config(
        model=cj.Model(stem_width=0, widths=(4,), hidden=(8,)),
        data=cj.Data(batch=20, folds=4, fold=1),
        train=cj.Train(epochs=1),
    )
    parts = {'train': images, 'eval': images, 'say': lambda line: None}
    run = cj.fit(config, tmp_path / 'run', **parts)
    own = cj.evaluate(run)
    assert own.metrics['count'] == 20
    assert own.metrics['loss'] == pytest.approx(run.metrics['loss'], rel=1e-5)
    assert 'fold 1 of 4' in own.split
    assert '60 training images' in own.sought
    more = cj.evaluate(run, data=made_up(31, 2, seed=1))
    assert (more.metrics['count'], more.split) == (31, config.data.eval)
