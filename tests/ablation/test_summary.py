"""What is claimed of an arm, and what is not."""

import csv
import itertools
import json

import numpy as np
import pytest

from cnn_jax.ablation import plan, report
from cnn_jax.ablation import summary as words
from cnn_jax.ablation.results import read_results
from cnn_jax.ablation.summary import correct_mask, cost, spread, summarize
from cnn_jax.errors import UserError


def test_verdicts_are_plain_sentences(ablation):
    arms = summarize(ablation())['arms']
    assert arms['none']['verdict'] is None
    assert arms['together']['verdict']['kind'] == 'better'
    assert arms['together']['verdict']['sentence'] == (
        'together: +8.1 points, 95% CI 7.5 to 8.7, p < 0.001 corrected, n = 5: better than none.'
    )
    assert arms['L2']['verdict']['kind'] == 'inconclusive'
    assert arms['L2']['verdict']['sentence'].endswith(
        'inconclusive; these seeds would have found a difference of 1.4 points with 80% power.'
    )


def test_comparison_agrees_with_the_per_seed_values(ablation):
    summary = summarize(ablation())
    arm, baseline = summary['arms']['dropout'], summary['arms']['none']
    differences = [arm['per_seed'][s] - baseline['per_seed'][s] for s in '01234']
    compared = arm['against_baseline']
    assert compared['mean'] == pytest.approx(np.mean(differences))
    assert compared['sd'] == pytest.approx(np.std(differences, ddof=1))
    assert compared['p_sign_flip'] == 0.0625
    assert compared['p_t'] <= compared['p_corrected'] <= 4 * compared['p_t']
    assert compared['seeds_needed']['0.02'] <= compared['seeds_needed']['0.002']
    assert arm['gap']['mean'] == pytest.approx(0.99 - arm['eval']['accuracy']['mean'])
    assert compared['gap_change'] == pytest.approx(-compared['mean'])
    assert summary['decision'] == {
        'test': 'paired t over seeds, two-sided, Holm-corrected',
        'significance': 0.05,
        'comparisons': 4,
        'pairs': [5, 5],
        'smallest_sign_flip_p': 0.0625,
    }


def test_of_losses_less_is_better(ablation):
    summary = summarize(ablation(metric='loss'))
    arm = summary['arms']['together']
    assert arm['against_baseline']['mean'] < 0
    assert arm['verdict']['kind'] == 'better'
    assert 'nats' in arm['verdict']['sentence']
    assert arm['gap']['mean'] > 0


def test_worse_is_called_worse(ablation):
    verdict = summarize(ablation({'none': 0.0, 'too much': -0.2}))['arms']['too much']['verdict']
    assert verdict['kind'] == 'worse'
    assert verdict['sentence'].startswith('too much: −')


def test_two_wild_seeds_can_find_nothing(ablation):
    gains = dict.fromkeys(('none', 'x', 'y', 'z'), 0.0)
    arm = summarize(ablation(gains, seeds=2, spread=0.15))['arms']['x']
    assert arm['verdict']['sentence'].endswith(
        'these seeds are too few and too different to find any possible difference.'
    )


def test_one_seed_makes_no_claim(ablation):
    summary = summarize(ablation(seeds=1))
    for name in ('dropout', 'together'):
        assert summary['arms'][name]['verdict']['kind'] == 'no claim'
        assert 'no claim can be made' in summary['arms'][name]['verdict']['sentence']
        assert summary['arms'][name]['eval']['accuracy']['interval'] is None
    assert summary['decision']['comparisons'] == 0


def test_only_seeds_that_both_finished_are_paired(ablation, change_cell):
    folder = ablation()
    change_cell(folder, '1-2', status='failed', reason='the loss became NaN at step 7')
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


def test_a_result_that_is_no_number_is_a_failed_cell(ablation, change_cell):
    folder = ablation()
    metrics = json.loads((folder / 'cells' / '1-0.json').read_text())['metrics']
    metrics['eval']['accuracy'] = float('nan')
    change_cell(folder, '1-0', metrics=metrics)
    (failed,) = summarize(folder)['cells']['failed']
    assert failed['reason'] == 'the evaluation accuracy is nan, not a finite number'


def test_cells_of_another_plan_are_counted_and_left_out(ablation, change_cell):
    folder = ablation()
    expected = summarize(folder)['arms']['dropout']
    (folder / 'cells' / 'other.json').write_text((folder / 'cells' / '1-0.json').read_text())
    change_cell(folder, 'other', seed=77)
    assert summarize(folder)['arms']['dropout'] == expected
    assert summarize(folder)['cells']['unplanned'] == 1


def test_the_names_and_order_of_cell_files_change_nothing(ablation):
    folder = ablation()
    expected = summarize(folder)
    for path in sorted((folder / 'cells').iterdir()):
        path.rename(path.with_name(f'{hash(path.name)}.json'))
    assert summarize(folder) == expected


def test_times_are_not_part_of_the_summary(ablation, change_cell):
    folder = ablation()
    expected = summarize(folder)
    change_cell(folder, '1-0', seconds=100.0, compilations=9)
    assert summarize(folder) == expected
    spent = cost(read_results(folder))
    assert spent['arms']['dropout'] == {
        'seconds_a_run': 2.5,
        'seconds': 110.0,
        'compilations': 9,
    }


def test_equal_differences_are_decided_by_the_sign_flips(ablation, change_cell):
    folder = ablation({'none': 0.0, 'copy': 0.0})
    for seed in range(5):
        cell = json.loads((folder / 'cells' / f'0-{seed}.json').read_text())
        change_cell(folder, f'1-{seed}', **(cell | {'arm': 'copy'}))
    arm = summarize(folder)['arms']['copy']
    assert arm['against_baseline']['p_t'] is None
    assert arm['against_baseline']['p'] == 1
    assert arm['against_baseline']['disagreement'] == 0
    assert arm['verdict']['kind'] == 'inconclusive'
    assert 'all seeds differ by the same amount' in arm['verdict']['sentence']


def test_factorial_grid(ablation):
    factors = {'dropout': [0.0, 0.5], 'norm': ['none', 'batch']}
    levels = [dict(zip(factors, x)) for x in itertools.product(*factors.values())]
    gains = {str(level): 0.03 * level['dropout'] * 2 for level in levels}
    arms = {name: {'changes': {}, 'levels': level} for name, level in zip(gains, levels)}
    folder = ablation(gains, factors=factors, arms=arms)
    found = summarize(folder)['factorial']
    assert found['reference'] == {'dropout': 0.0, 'norm': 'none'}
    assert list(found['effects']) == ['dropout=0.5', 'norm=batch', 'dropout=0.5 × norm=batch']
    assert found['effects']['dropout=0.5']['mean'] == pytest.approx(0.03, abs=0.005)
    assert found['effects']['dropout=0.5']['significant']
    assert not found['effects']['norm=batch']['significant']
    for seed in range(4):
        (folder / 'cells' / f'3-{seed}.json').unlink()
    found = summarize(folder)['factorial']
    assert found['seeds'] == [4]
    assert found['effects'] is None


def test_a_factor_without_an_effect_has_none_beside_rounding(ablation, change_cell):
    """Three levels by two, of which the first factor changes nothing."""
    factors = {'a': ['a0', 'a1', 'a2'], 'b': ['b0', 'b1']}
    levels = {f'{a}, {b}': {'a': a, 'b': b} for a in factors['a'] for b in factors['b']}
    arms = {arm: {'changes': {}, 'levels': each} for arm, each in levels.items()}
    folder = ablation(dict.fromkeys(arms, 0.0), arms=arms, factors=factors)
    values = np.random.default_rng(0).random((5, 2))
    for place, each in enumerate(levels.values()):
        for seed in range(5):
            found = {'accuracy': values[seed, factors['b'].index(each['b'])], 'count': 400}
            change_cell(folder, f'{place}-{seed}', metrics={'train': found, 'eval': found})
    effects = summarize(folder)['factorial']['effects']
    nothing = [name for name, effect in effects.items() if effect['mean'] == 0]
    assert nothing == [name for name in effects if 'a=' in name]
    assert len(nothing) == len(effects) - 1


def test_two_results_of_one_place_are_refused(ablation):
    folder = ablation()
    (folder / 'cells' / 'again.json').write_text((folder / 'cells' / '0-0.json').read_text())
    with pytest.raises(UserError, match='several results of one arm and seed'):
        summarize(folder)


def test_correct_examples_are_unpacked():
    assert correct_mask({'correct': 'a080', 'metrics': {'eval': {'count': 9}}}).tolist() == [
        *(True, False, True, False, False, False, False, False),
        True,
    ]


def test_intervals_end_where_the_metric_does():
    low, high = spread(np.array([0.99, 1.0, 1.0, 0.98, 0.94]), 0, 1)['interval']
    assert high == 1
    assert low > 0.8
    assert spread(np.array([0.5, np.inf]))['mean'] is None
    assert spread(np.array([]))['mean'] is None


@pytest.mark.parametrize(
    ('p', 'text'),
    [(1e-9, '< 0.001'), (0.0123, '= 0.012'), (0.0625, '= 0.063'), (0.611, '= 0.61'), (1, '= 1.00')],
)
def test_p_values(p, text):
    assert words.p_value(p) == text


def test_numbers():
    assert plan.number(-0.04, 1, signed=True) == '0.0'
    assert plan.number(-0.06, 1, signed=True) == '−0.1'
    assert plan.number(None, 1) == '–'
    accuracy = plan.METRICS['accuracy']
    assert words.interval(0.003, 0.013, accuracy) == '0.3 to 1.3'
    assert words.interval(0.9712, 0.9716, accuracy) == '97.12 to 97.16'


def test_csv_holds_one_line_per_arm(ablation):
    summary = summarize(ablation())
    rows = list(csv.DictReader(report.to_csv(summary).splitlines()))
    assert [row['arm'] for row in rows] == list(summary['arms'])
    assert rows[0]['difference'] == ''
    assert float(rows[1]['difference']) == summary['arms']['dropout']['against_baseline']['mean']
    assert [row['verdict'] for row in rows][3:] == ['inconclusive', 'better']


def test_latex_escapes_names(ablation):
    name = r'50% of {a_b} & \c'
    text = report.to_latex(summarize(ablation({'none': 0.0, name: 0.01})))
    assert r'50\% of \{a\_b\} \& \textbackslash{}c & 5 &' in text
    assert text.count(r'\\') == 3
    for rule in (r'\toprule', r'\midrule', r'\bottomrule'):
        assert rule in text


def test_latex_takes_no_arm_for_an_option(ablation):
    text = report.to_latex(summarize(ablation({'none': 0.0, '[a]': 0.01, '*b': 0.02})))
    assert r'{}[a] &' in text
    assert r'{}*b &' in text


def test_mistakes_are_told(ablation, tmp_path):
    with pytest.raises(UserError, match=r'has no ablation\.json'):
        summarize(tmp_path / 'nowhere')
    folder = ablation(metric='f1')
    with pytest.raises(UserError, match="metric of the ablation is 'f1'; it can be accuracy"):
        summarize(folder)
    folder = ablation()
    (folder / 'cells' / '0-0.json').write_text('{"arm"')
    with pytest.raises(UserError, match=r'0-0\.json is damaged'):
        summarize(folder)
