"""What is claimed of an arm, and what is not."""

import csv
import itertools

import numpy as np
import pytest

from cnn_jax.ablation import summary as s
from cnn_jax.ablation.plan import METRICS
from cnn_jax.ablation.report import Ablation
from cnn_jax.ablation.results import read_store
from cnn_jax.ablation.statistics import guess
from cnn_jax.errors import UserError
from cnn_jax.files import read_json, write_json
from cnn_jax.tools.page import number


def summarize(folder):
    return s.summary_of(read_store(folder))


def cells(folder, arm):
    """The files of the runs that an arm's accuracy is read off, by seed."""
    store = read_store(folder)
    numbers = range(store.plan.looks[-1])
    return [run.path for n in numbers if (run := store.replicate(arm, n, 'accuracy'))]


def change(path, **fields):
    write_json(path, read_json(path) | fields)


def test_verdicts_are_plain_sentences_over_all_primary_measures(ablation):
    arms = summarize(ablation({'none': 0.0, 'x': 0.08}))['arms']
    assert arms['none']['verdict'] is None
    assert arms['x']['verdict']['kind'] == 'better'
    sentence = arms['x']['verdict']['sentence']
    assert sentence.startswith('x: accuracy better, +')
    assert ' points (' in sentence
    assert '; negative log-likelihood better, −' in sentence
    assert sentence.endswith('; against none, 5 replicates.')


@pytest.mark.parametrize(('gain', 'kind'), [(-0.2, 'worse'), (0.1, 'better')])
def test_better_is_more_of_an_accuracy_and_less_of_a_loss(ablation, gain, kind):
    compared = summarize(ablation({'none': 0.0, 'x': gain}))['arms']['x']['compared']
    assert [each['verdict'] for each in compared.values()] == [kind, kind]
    assert np.sign(compared['accuracy']['mean']) == -np.sign(compared['loss']['mean'])
    assert compared['accuracy']['wins'] == compared['loss']['wins'] == (kind == 'better')


def test_a_comparison_agrees_with_the_values_of_each_seed(ablation):
    summary = summarize(ablation({'none': 0.0, 'x': 0.05, 'y': 0.0}, seeds=6))
    for arm, measure in itertools.product(('x', 'y'), summary['primaries']):
        of_arm, of_control = (
            np.array([*summary['arms'][name]['per_seed'][measure].values()])
            for name in (arm, 'none')
        )
        compared = summary['arms'][arm]['compared'][measure]
        assert compared['mean'] == pytest.approx(np.mean(of_arm - of_control))
        assert compared['low'] < compared['mean'] < compared['high']
        assert (compared['p'] < 0.05) == (not compared['low'] <= 0 <= compared['high'])
        assert compared['n'] == 6
    assert summary['comparisons'] == 4


def test_an_arm_is_compared_with_its_own_control(ablation):
    """As far above its control as that is above the baseline."""
    gains = {'none': 0.0, 'residual': 0.04, 'deeper': 0.08}
    arms = summarize(ablation(gains, against={'deeper': 'residual'}))['arms']
    assert arms['deeper']['control'] == 'residual'
    assert arms['deeper']['verdict']['sentence'].endswith('against residual, 5 replicates.')
    means = [arms[arm]['compared']['accuracy']['mean'] for arm in ('residual', 'deeper')]
    assert means == pytest.approx([0.04, 0.04], abs=0.01)


def test_a_failed_replicate_is_judged_as_a_guess_and_named(ablation):
    folder = ablation({'none': 0.0, 'x': 0.0}, seeds=5)
    before = summarize(folder)['arms']['x']['compared']['accuracy']
    change(cells(folder, 'x')[2], status='failed', reason='the loss became NaN at step 7')
    summary = summarize(folder)
    [failed] = summary['runs']['failed']
    assert (failed['arm'], failed['seed']) == ('x', 2)
    assert failed['reason'] == 'the loss became NaN at step 7'
    arm = summary['arms']['x']
    assert (arm['n'], arm['failed']) == (5, {'accuracy': 1, 'loss': 0})
    lost = (0.85 - guess(10)['accuracy']) / 5
    assert arm['compared']['accuracy']['mean'] == pytest.approx(before['mean'] - lost, abs=0.01)
    assert arm['verdict']['kind'] == 'undecided'


def test_arms_that_always_fail_are_not_equivalent(ablation):
    folder = ablation({'none': 0.0, 'x': 0.0, 'y': 0.0}, seeds=5)
    for cell in (*cells(folder, 'none'), *cells(folder, 'x')):
        change(cell, status='failed', reason='the loss became NaN at step 7')
    compared = {arm: each['compared'] for arm, each in summarize(folder)['arms'].items()}
    assert compared['x']['accuracy'] is None
    assert compared['y']['accuracy']['verdict'] == 'better'


def test_missing_replicates_make_no_claim_and_are_listed(ablation):
    folder = ablation({'none': 0.0, 'x': 0.1}, seeds=5)
    cells(folder, 'none')[4].unlink()
    summary = summarize(folder)
    assert [(run['arm'], run['seed']) for run in summary['runs']['missing']] == [('none', 4)]
    compared = summary['arms']['x']['compared']
    assert compared['accuracy'] is None
    assert compared['loss']['verdict'] == 'better'  # it is read off other runs


def test_other_results_and_times_change_nothing(ablation):
    folder = ablation()
    expected = summarize(folder)
    one = cells(folder, 'dropout')[0]
    (folder / 'cells' / 'other.json').write_bytes(one.read_bytes())
    change(one, seconds=100.0)
    summary = summarize(folder)
    assert summary['runs'].pop('other') == 1
    assert expected['runs'].pop('other') == 0
    assert summary == expected
    assert s.cost(read_store(folder))['arms']['dropout']['replicates'] > 100


def test_the_choice_of_each_arm_and_its_trials_are_there(ablation):
    folder = ablation()
    store, arms = read_store(folder), summarize(folder)['arms']
    for name, arm in arms.items():
        for measure, best in (('accuracy', max), ('loss', min)):
            tuned = arm['tuned']['by'][measure]
            assert tuned['point'] == store.points(name)[tuned['trial']]
            assert tuned['values'][tuned['trial']] == best(tuned['values'])


def test_a_factorial_grid(ablation):
    factors = {
        'dropout': {'off': {}, 'on': {'model.dropout': 0.3}},
        'L2': {'no': {}, 'yes': {'loss.l2': 1e-3}},
    }
    gains = {'off, no': 0.0, 'off, yes': 0.0, 'on, no': 0.05, 'on, yes': 0.05}
    folder = ablation(gains, factors=factors, seeds=8)
    grid = summarize(folder)['factorial']
    assert grid['reference'] == {'dropout': 'off', 'L2': 'no'}
    assert list(grid['effects']) == ['dropout=on', 'L2=yes', 'dropout=on × L2=yes']
    effect = grid['effects']['dropout=on']['accuracy']
    assert effect['mean'] == pytest.approx(0.05, abs=0.01)
    assert effect['verdict'] == 'better'
    assert grid['effects']['L2=yes']['accuracy']['verdict'] != 'better'


def test_intervals_end_where_the_measure_does():
    metric = METRICS['accuracy']
    low, high = s.spread(np.array([0.99, 1.0, 1.0, 0.98, 0.94]), metric)['interval']
    assert high == 1
    assert low > 0.8
    assert s.spread(np.array([0.5, np.inf]), metric)['mean'] is None
    assert s.spread(np.array([0.5]), metric)['interval'] is None
    assert s.spread(np.array([]), metric)['mean'] is None


def test_numbers_and_p_values():
    p_values = {1e-9: '< 0.001', 0.0123: '= 0.012', 0.0625: '= 0.063', 0.611: '= 0.61', 1: '= 1.00'}
    assert {p: s.p_value(p) for p in p_values} == p_values
    assert number(-0.04, 1, signed=True) == '0.0'
    assert number(-0.06, 1, signed=True) == '−0.1'
    assert number(None, 1) == '–'
    assert s.interval(0.003, 0.013, METRICS['accuracy']) == '0.3 to 1.3'
    assert s.interval(0.9712, 0.9716, METRICS['accuracy']) == '97.12 to 97.16'


def test_csv_holds_a_line_per_arm_and_measure(ablation):
    result = Ablation(ablation())
    result.write_report()
    rows = list(csv.DictReader((result.workdir / 'summary.csv').read_text().splitlines()))
    arms = result.summary['arms']
    assert [(row['arm'], row['measure']) for row in rows] == [
        (arm, measure) for arm in arms for measure in result.summary['primaries']
    ]
    assert rows[0]['difference'] == ''
    assert float(rows[2]['difference']) == arms['dropout']['compared']['accuracy']['mean']


def test_a_folder_without_an_ablation_is_named(tmp_path):
    with pytest.raises(UserError, match=r'no ablation\.json'):
        summarize(tmp_path / 'nowhere')
