"""What is claimed of an arm, and what is not."""

import csv
import itertools
import json

import numpy as np
import pytest

from cnn_jax.ablation import summary as s
from cnn_jax.ablation.plan import METRICS, number
from cnn_jax.ablation.report import to_csv
from cnn_jax.ablation.results import read_results
from cnn_jax.errors import UserError


def summarize(folder):
    return s.summary_of(read_results(folder))


def test_verdicts_are_plain_sentences(ablation):
    arms = summarize(ablation())['arms']
    assert arms['none']['verdict'] is None
    assert arms['together']['verdict'] == {
        'kind': 'better',
        'sentence': 'together: +8.1 percentage points, 95% CI 7.5 to 8.7, p < 0.001 corrected, '
        'n = 5: better than none.',
    }
    assert arms['L2']['verdict']['kind'] == 'inconclusive'
    assert arms['L2']['verdict']['sentence'].endswith('n = 5: not significant.')


@pytest.mark.parametrize(
    ('gain', 'metric', 'kind'),
    [(-0.2, 'accuracy', 'worse'), (0.1, 'accuracy', 'better'), (0.1, 'loss', 'better')],
)
def test_better_is_more_of_an_accuracy_and_less_of_a_loss(ablation, gain, metric, kind):
    arm = summarize(ablation({'none': 0.0, 'x': gain}, metric=metric))['arms']['x']
    assert arm['verdict']['kind'] == kind
    assert METRICS[metric].unit in arm['verdict']['sentence']
    assert arm['gap']['mean'] > 0


def test_comparison_agrees_with_the_per_seed_values(ablation):
    summary = summarize(ablation())
    arm, baseline = summary['arms']['dropout'], summary['arms']['none']
    differences = [arm['per_seed'][seed] - baseline['per_seed'][seed] for seed in '01234']
    compared = arm['against_baseline']
    assert compared['mean'] == pytest.approx(np.mean(differences))
    assert compared['sd'] == pytest.approx(np.std(differences, ddof=1))
    assert compared['p_t'] <= compared['p_corrected'] <= 4 * compared['p_t']
    assert arm['gap']['mean'] == pytest.approx(0.99 - arm['eval']['accuracy']['mean'])
    assert compared['gap_change'] == pytest.approx(-compared['mean'])
    decision = summary['decision']
    assert (decision['comparisons'], decision['pairs']) == (4, [5, 5])


@pytest.mark.parametrize(
    ('seeds', 'spread', 'kind', 'limit'),
    [(1, 0.01, 'no claim', 'no claim can be made'), (2, 0.15, 'inconclusive', 'not significant')],
)
def test_few_seeds_say_what_they_cannot_tell(ablation, seeds, spread, kind, limit):
    gains = dict.fromkeys(('none', 'x', 'y', 'z'), 0.0)
    summary = summarize(ablation(gains, seeds=seeds, spread=spread))
    assert summary['arms']['x']['verdict']['kind'] == kind
    assert limit in summary['arms']['x']['verdict']['sentence']
    assert (summary['arms']['x']['eval']['accuracy']['interval'] is None) == (seeds == 1)


def test_only_seeds_that_both_finished_are_paired(ablation, change_result):
    folder = ablation()
    change_result(folder, '1-2', status='failed', reason='the loss became NaN at step 7')
    (folder / 'cells' / '0-4.json').unlink()
    summary = summarize(folder)
    assert summary['arms']['dropout']['against_baseline']['seeds'] == [0, 1, 3]
    assert summary['arms']['together']['against_baseline']['seeds'] == [0, 1, 2, 3]
    assert 'n = 3 of 5' in summary['arms']['dropout']['verdict']['sentence']
    assert summary['cells']['done'] == 23
    assert summary['cells']['failed'] == [
        {'arm': 'dropout', 'seed': 2, 'reason': 'the loss became NaN at step 7'}
    ]
    assert summary['cells']['missing'] == [{'arm': 'none', 'seed': 4}]


def test_a_result_that_is_no_number_is_a_failed_run(ablation, change_result):
    folder = ablation()
    metrics = json.loads((folder / 'cells' / '1-0.json').read_text())['metrics']
    metrics['eval']['accuracy'] = float('nan')
    change_result(folder, '1-0', metrics=metrics)
    (failed,) = summarize(folder)['cells']['failed']
    assert 'not a finite number' in failed['reason']


def test_unplanned_results_file_names_and_times_change_nothing(ablation, change_result):
    folder = ablation()
    expected = summarize(folder)
    (folder / 'cells' / 'other.json').write_text((folder / 'cells' / '1-0.json').read_text())
    change_result(folder, 'other', seed=77)
    change_result(folder, '1-0', seconds=100.0)
    for path in sorted((folder / 'cells').iterdir()):
        path.rename(path.with_name(f'{hash(path.name)}.json'))
    summary = summarize(folder)
    assert summary['cells'].pop('unplanned') == 1
    assert expected['cells'].pop('unplanned') == 0
    assert summary == expected
    spent = s.cost(read_results(folder))['arms']['dropout']
    assert spent == {'seconds_a_run': 2.5, 'seconds': 110.0}


def test_equal_differences_are_decided_by_their_signs(ablation, change_result):
    folder = ablation({'none': 0.0, 'copy': 0.0})
    for seed in range(5):
        result = json.loads((folder / 'cells' / f'0-{seed}.json').read_text())
        change_result(folder, f'1-{seed}', **(result | {'arm': 'copy'}))
    arm = summarize(folder)['arms']['copy']
    assert arm['against_baseline']['p_t'] is None
    assert arm['against_baseline']['p'] == 1
    assert arm['against_baseline']['disagreement'] == 0
    assert 'differ by the same amount' in arm['verdict']['sentence']


def test_factorial_grid(ablation):
    factors = {'dropout': [0.0, 0.5], 'norm': ['none', 'batch']}
    levels = [dict(zip(factors, x)) for x in itertools.product(*factors.values())]
    gains = {str(level): 0.03 * level['dropout'] * 2 for level in levels}
    arms = {name: {'changes': {}, 'levels': level} for name, level in zip(gains, levels)}
    folder = ablation(gains, factors=factors, arms=arms)
    grid = summarize(folder)['factorial']
    assert grid['reference'] == {'dropout': 0.0, 'norm': 'none'}
    assert list(grid['effects']) == ['dropout=0.5', 'norm=batch', 'dropout=0.5 × norm=batch']
    assert grid['effects']['dropout=0.5']['mean'] == pytest.approx(0.03, abs=0.005)
    assert grid['effects']['dropout=0.5']['significant']
    assert not grid['effects']['norm=batch']['significant']
    for seed in range(4):
        (folder / 'cells' / f'3-{seed}.json').unlink()
    grid = summarize(folder)['factorial']
    assert (grid['seeds'], grid['effects']) == ([4], None)


def test_a_factor_without_an_effect_has_none_but_for_rounding(ablation, change_result):
    """Three levels by two, of which the first factor changes nothing."""
    factors = {'a': ['a0', 'a1', 'a2'], 'b': ['b0', 'b1']}
    levels = {f'{a}, {b}': {'a': a, 'b': b} for a in factors['a'] for b in factors['b']}
    arms = {arm: {'changes': {}, 'levels': each} for arm, each in levels.items()}
    folder = ablation(dict.fromkeys(arms, 0.0), arms=arms, factors=factors)
    values = np.random.default_rng(0).random((5, 2))
    for i, each in enumerate(levels.values()):
        for seed in range(5):
            metrics = {'accuracy': values[seed, factors['b'].index(each['b'])], 'count': 400}
            change_result(folder, f'{i}-{seed}', metrics={'train': metrics, 'eval': metrics})
    effects = summarize(folder)['factorial']['effects']
    zero = [name for name, effect in effects.items() if effect['mean'] == 0]
    assert zero == [name for name in effects if 'a=' in name]
    assert len(zero) == len(effects) - 1


def test_intervals_end_where_the_metric_does():
    low, high = s.spread(np.array([0.99, 1.0, 1.0, 0.98, 0.94]), 0, 1)['interval']
    assert high == 1
    assert low > 0.8
    assert s.spread(np.array([0.5, np.inf]))['mean'] is None
    assert s.spread(np.array([]))['mean'] is None


def test_numbers_and_p_values():
    p_values = {1e-9: '< 0.001', 0.0123: '= 0.012', 0.0625: '= 0.063', 0.611: '= 0.61', 1: '= 1.00'}
    assert {p: s.p_value(p) for p in p_values} == p_values
    assert number(-0.04, 1, signed=True) == '0.0'
    assert number(-0.06, 1, signed=True) == '−0.1'
    assert number(None, 1) == '–'
    assert s.interval(0.003, 0.013, METRICS['accuracy']) == '0.3 to 1.3'
    assert s.interval(0.9712, 0.9716, METRICS['accuracy']) == '97.12 to 97.16'


def test_csv_holds_one_line_per_arm(ablation):
    summary = summarize(ablation())
    rows = list(csv.DictReader(to_csv(summary).splitlines()))
    assert [row['arm'] for row in rows] == list(summary['arms'])
    assert rows[0]['difference'] == ''
    assert float(rows[1]['difference']) == summary['arms']['dropout']['against_baseline']['mean']
    assert [row['verdict'] for row in rows][3:] == ['inconclusive', 'better']


def test_mistakes_are_named(ablation, tmp_path):
    with pytest.raises(UserError, match=r'no ablation\.json'):
        summarize(tmp_path / 'nowhere')
    folder = ablation()
    (folder / 'cells' / 'again.json').write_text((folder / 'cells' / '0-0.json').read_text())
    with pytest.raises(UserError, match='several results'):
        summarize(folder)
