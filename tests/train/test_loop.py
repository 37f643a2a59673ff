"""The loop: one generator of steps; records, exact resumption, early stopping, failures."""

import ast
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax.ablation.plan import budget
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import write_json
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.loop import before_step, steps
from cnn_jax.train.manifest import claim_workdir
from cnn_jax.train.metrics import StepMetrics
from cnn_jax.train.program import state_maker, traced_values
from tests.environments import ROOT
from tests.train.conftest import begin, copied, equal, make_config, opened

SHORT = {'train__epochs': 2.0, 'train__eval_every': 0.5, 'train__checkpoint_every': 0.25}
TWO_PHASES = SHORT | {
    'train__epochs': 1.0,
    'train__frozen': ('block1_*',),
    'train__ema': 0.9,
    'unfreeze__epochs': 1.0,
    'unfreeze__learning_rate': 0.001,
}  # they end at steps 6 and 12


class Killed(Exception):
    """Stands for a process that ends without a word."""


def lines(folder):
    return [json.loads(text) for text in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def whole():
    """The phases of a run, its values, and copies of the states, batches and sums of its steps."""
    config = make_config(**TWO_PHASES)
    _, phases = opened(config)
    state, values = state_maker(phases[0].program)(config.seed), traced_values(config)
    taken = [(copied(state), None, None)]
    for step in steps(phases, state, 0, values):
        taken.append(copied((step.state, step.batch, step.sums)))
    return phases, values, taken


def copy(state):
    return jax.tree.map(jnp.array, state)  # which may be given away


@pytest.mark.parametrize('start', range(13))
def test_steps_from_any_start_are_those_from_zero(whole, start):
    phases, values, taken = whole
    numbers = []
    for step in steps(phases, copy(taken[start][0]), start, values):
        assert equal((step.state, step.batch, step.sums), taken[step.number])
        assert step.phase is phases[step.number > 6]
        numbers.append(step.number)
    assert numbers == list(range(start + 1, 13))


@pytest.mark.parametrize(('start', 'end'), [(0, 1), (0, 6), (5, 7), (6, 6), (6, 7), (12, 12)])
def test_they_end_where_they_are_told_to(whole, start, end):
    phases, values, taken = whole
    found = list(steps(phases, copy(taken[start][0]), start, values, end=end))
    assert [step.number for step in found] == list(range(start + 1, end + 1))
    phase, state, batch = before_step(phases, copy(taken[start][0]), start, end + 1, values)
    assert phase is phases[end >= 6]
    expected = taken[end][0]
    assert equal(state, phases[1].begin(expected) if end == 6 else expected)
    if end < 12:
        assert equal(batch, taken[end + 1][1])


def test_values_may_change_between_steps_and_batches_are_taken_by_the_caller(whole):
    phases, values, taken = whole
    values = dict(values)

    def feed(phase, batches):
        assert phase is phases[0]
        next(batches)  # another one
        return batches

    (other,) = steps(phases, copy(taken[0][0]), 0, values, end=1, feed=feed)
    assert equal(other.batch, taken[2][1])
    sweep = steps(phases, copy(taken[0][0]), 0, values)
    first = next(sweep)
    state = copied(first.state)
    values['optimizer.learning_rate'] = 0.0
    second = next(sweep)
    assert equal(state, taken[1][0])
    assert equal(second.state.params, state.params)


def test_no_other_loop_trains():
    """`train` and `before_step` are in the module of `steps`, whose own call is the only one."""
    trained, importing, calling = [], set(), set()
    for path in sorted((ROOT / 'cnn_jax').rglob('*.py')) + sorted((ROOT / 'launch').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == 'cnn_jax.train.loop':
                importing |= {path.stem for alias in node.names if alias.name == 'steps'}
            elif isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'train_step':
                trained.append(path.stem)
            elif isinstance(node, ast.FunctionDef) and path.stem == 'loop':
                inside = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
                calling |= {node.name for f in inside if getattr(f, 'id', '') == 'steps'}
    assert trained == ['loop']
    assert calling == {'train', 'before_step'}
    assert importing == {'training', 'verify', 'lr_finder'}


def test_each_function_is_compiled_once_and_each_example_counted_once(small, fit, tmp_path):
    outcome = fit(small(**SHORT | {'train__eval_every': 1.0}), count=53)
    assert outcome.compilations == [{'train': 1, 'eval': 1}]
    assert outcome.metrics['count'] == 53
    counts = [line['count'] for line in lines(tmp_path / 'run') if line['split'] == 'train']
    assert counts == [56, 48]  # of an epoch of 6.625 batches, and of the rest of 13 batches


def test_it_learns(small, fit):
    outcome = fit(small(train__epochs=15.0, model__dropout=0.0, model__head_dropout=0.0))
    assert outcome.metrics['accuracy'] > 0.9


@pytest.fixture
def kill_and_resume(fit_again, tmp_path, monkeypatch):
    """Kills a run after a step, starts it again, and returns its end and its record."""

    def make(config, number):
        folder, add = tmp_path / f'killed {number}', StepMetrics.add

        def add_then_die(self, step, sums):
            if step == number:
                raise Killed
            add(self, step, sums)

        with monkeypatch.context() as patch:
            patch.setattr(StepMetrics, 'add', add_then_die)
            with pytest.raises(Killed):
                fit_again(config, folder)
        return fit_again(config, folder), lines(folder)

    return make


ALL_OF_A_STATE = TWO_PHASES | {
    'train__ema': 0.0,
    'train__swa_from': 0.5,
    'train__precise_norm': 2,
    'loss__l2_sp': 0.1,
    'loss__l2_sp_on': ('*/kernel',),
    'optimizer__gradient_noise': 0.01,
    'optimizer__max_norm': 2.0,
    'optimizer__sam': 0.05,
    'model__drop_ramp': 1.0,
}


@pytest.mark.parametrize(
    ('changes', 'kills'),
    [
        (TWO_PHASES, (1, 5, 6, 7, 12)),
        pytest.param(ALL_OF_A_STATE, (2, 7, 11), marks=pytest.mark.slow),
    ],
    ids=['averaged', 'all that a state can hold'],
)
def test_killed_in_either_phase_it_resumes_to_the_same_bits(
    small, fit_again, kill_and_resume, tmp_path, changes, kills
):
    config = small(**changes)
    whole = fit_again(config)
    for number in kills:
        again, record = kill_and_resume(config, number)
        assert equal(whole.state, again.state), number
        assert record == lines(tmp_path / 'run'), number


def test_a_finished_run_is_not_trained_again_and_keeps_nothing_for_what_is_off(
    small, fit, tmp_path
):
    first, again = fit(small(**SHORT)), fit(small(**SHORT))
    assert equal(first.state, again.state)
    assert again.compilations[0]['train'] == 0
    assert again.metrics['loss'] == first.metrics['loss']
    kept = (tmp_path / 'run/checkpoints/step_12/state/_METADATA').read_text()
    for name, held in (('opt_state', True), ('init_params', False), ('eval_batch_stats', False)):
        assert (f'"{name}"' in kept) == held, name


@pytest.mark.parametrize(
    'changes',
    [
        {'optimizer__schedule': 'inverse_time', 'optimizer__decay_rate': 0.1, 'train__ema': 0.5},
        {'train__patience': 3.0, 'train__precise_norm': 1},
    ],
    ids=str,
)
def test_a_prolonged_run_has_the_bits_of_a_long_one(small, fit, tmp_path, changes):
    long, prolonged = (tmp_path / name for name in ('long', 'prolonged'))
    at_once = fit(small(train__epochs=4.0, **changes), long, count=48)
    for epochs in (2.0, 4.0):
        outcome = fit(small(train__epochs=epochs, **changes), prolonged, count=48)
    assert equal(at_once.state, outcome.state)
    assert at_once.metrics['loss'] == outcome.metrics['loss']
    for name in ('metrics.jsonl', 'steps.f32'):
        assert (long / name).read_bytes() == (prolonged / name).read_bytes(), name


@pytest.mark.parametrize(
    ('changes', 'hint'),
    [
        ({'optimizer.schedule': 'cosine', 'train.epochs': 3.0}, 'cosine'),
        ({'model.drop_ramp': 0.5, 'train.epochs': 3.0}, 'drop_ramp'),
        ({'train.epochs': 1.0}, r'2.0 → 1.0\); restore it, or choose another --workdir$'),
    ],
    ids=str,
)
def test_a_run_whose_steps_depend_on_its_length_keeps_it(small, tmp_path, changes, hint):
    config = cfg.replace(small(train__epochs=2.0), changes | {'train.epochs': 2.0})
    claim_workdir(tmp_path, config)
    facts = {'config_hash': cfg.content_hash(config), 'machine': {'threads': 1}}
    write_json(tmp_path / 'manifest.json', facts | {'data': {'train': {'fingerprint': ''}}})
    with pytest.raises(UserError, match=hint):
        claim_workdir(tmp_path, cfg.replace(config, changes))
    claim_workdir(tmp_path, config)


@pytest.mark.parametrize(('steps', 'decay'), [(1, 0.2), (18, 0.999), (20_000, 0.9999)])
def test_an_average_that_is_mostly_its_start_is_told_with_the_decay_that_would_do(steps, decay):
    own = {'train__precise_norm': 10}  # else a second note
    config = make_config(train__ema=decay, **own)
    [said] = cfg.averaging_notes(config, steps)
    assert f'{decay**steps:.0%} of the averaged weights' in said
    enough = float(re.findall(r'([\d.]+) leaves 10%', said)[0])
    assert not cfg.averaging_notes(make_config(train__ema=enough, **own), steps)
    assert enough**steps == pytest.approx(0.1, abs=0.01)
    assert not cfg.averaging_notes(make_config(), steps)
    assert said in budget(config, steps * config.data.batch / config.train.epochs)


@pytest.mark.parametrize('average', [{'train__ema': 0.5}, {'train__swa_from': 0.1}])
def test_averaged_weights_under_the_batch_statistics_of_others_are_told(average):
    batch, none = {'model__norm': 'batch'}, {'model__norm': 'none', 'model__head_norm': 'none'}
    [said] = cfg.averaging_notes(make_config(**average, **batch), 100)
    assert 'precise_norm' in said
    assert not cfg.averaging_notes(make_config(**average, **none), 100)
    assert not cfg.averaging_notes(make_config(**average, **batch, train__precise_norm=10), 100)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(small, fit):
    with pytest.raises(RunFailed, match=r'not finite at step \d+.*learning_rate'):
        fit(small(**SHORT, optimizer__name='sgd', optimizer__learning_rate=1e30))


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    config = make_config(train__best='loss')
    _, state, _ = begin(config)
    kept = Checkpoints(tmp_path / 'c', config)
    for step, loss in enumerate([0.5, float('nan'), 0.7, 0.6], start=1):
        scores = {'accuracy': 0.1, 'loss': loss}
        kept.save(state.replace(step=np.int32(step)), {'sums': None}, scores)
        assert kept.best() == 1


def test_a_run_ends_early_at_its_best_and_a_killed_one_at_the_same_step(
    small, fit_again, kill_and_resume, tmp_path
):
    config = small(
        train__epochs=12.0,
        train__patience=1.0,
        train__eval_every=0.5,
        train__checkpoint_every=0.25,
        train__best='loss',
        train__precise_norm=2,
        train__ema=0.5,
        optimizer__learning_rate=0.3,  # too high to go on getting better
    )
    whole = fit_again(config)
    record = lines(tmp_path / 'run')
    evaluated = [line for line in record if line['split'] == 'eval']
    best, last = min(evaluated, key=lambda line: line['loss']), evaluated[-1]
    assert not whole.stopped
    assert whole.compilations == [{'train': 1, 'eval': 1}]
    assert last['epoch'] < 12
    assert last['epoch'] - best['epoch'] == pytest.approx(1.0, abs=0.2)
    assert int(whole.state.step) == best['step']
    assert whole.metrics['loss'] == best['loss']
    assert Checkpoints(tmp_path / 'run/checkpoints', config).best() == best['step']
    for number in (best['step'] + 1, last['step']):
        again, its_record = kill_and_resume(config, number)
        assert equal(whole.state, again.state)
        assert its_record == record
    assert equal(whole.state, fit_again(config).state)  # which trains nothing
    assert lines(tmp_path / 'run') == record
