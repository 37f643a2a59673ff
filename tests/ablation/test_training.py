"""Runs of an ablation: each is the run that `fit` trains alone, whatever is trained beside it."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.ablation import decisions, summary, training, workers
from cnn_jax.ablation.plan import log, make_plan
from cnn_jax.ablation.results import open_store
from cnn_jax.ablation.training import compile_structure, train_runs
from cnn_jax.components import NO_COMPONENTS, from_objects
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import read_json
from cnn_jax.train import setup
from cnn_jax.train.fit import fit
from cnn_jax.train.loop import compilations, steps
from cnn_jax.train.setup import open_data

COUNTS = {'train': 20, 'pool': 40, 'validation': 10, 'test': 21, 'classes': 3}
FACTS = {'command': '', 'manifest': {}, 'budgets': {}, 'counts': COUNTS}
SPLITS = {'data.subset': 20, 'data.validation': 10}
RATE = {'optimizer.learning_rate': log(1e-3, 1e-1)}
SMALL = {
    'model.stem_width': 0,
    'model.widths': (4,),
    'model.hidden': (8,),
    'data.batch': 8,
    'train.epochs': 2.0,
    'optimizer.learning_rate': 0.01,
}
FINE_TUNED = {
    'model.name': 'vgg16',
    'model.stem_width': 16,
    'model.widths': (32, 64, 128),
    'model.cut': 'block2_pool',
    'model.head_norm': 'none',
    'train.frozen': ('backbone/*',),
    'unfreeze.epochs': 1.0,
    'unfreeze.frozen': ('backbone/block1*',),
    'unfreeze.learning_rate': 1e-3,
}
IMPATIENT = {
    'train.epochs': 9.0,
    'train.patience': 2.0,
    'train.best': 'loss',
    'train.precise_norm': 2,
    'optimizer.learning_rate': 0.1,
}
CASES = {
    'a subset, and held-out images': IMPATIENT
    | {'data.subset': 24, 'data.validation': 10, 'loss.class_weights': 'balanced'},
    'a fold, and a share held out': IMPATIENT
    | {'data.folds': 4, 'data.fold': 1, 'data.validation_share': 0.2},
    'drawn equally often': {
        'data.balance': True,
        'loss.class_weights': '1,2,0.5',
        'loss.focal': 2.0,
        'augment.mixup': 0.2,
    },
    'strided': {'augment.crop': 1, 'loss.l2': 1e-3},
    'averaged, and over before its end': IMPATIENT | {'train.swa_from': 1.0},
    'fine-tuned': FINE_TUNED,
    'head on scaled features': FINE_TUNED
    | {'unfreeze.epochs': 0.0, 'features.cache': 'always', 'data.balance': True}
    | {'model.scale_features': True, 'train.precise_norm': 2},
    'head on kept views': FINE_TUNED
    | {'unfreeze.epochs': 0.0, 'features.views': 2, 'augment.flip': True},
}
ARMS = {
    'none': {'model.norm': 'none', 'model.head_norm': 'none', 'model.dropout': 0.0},
    'dropout': {'model.norm': 'none', 'model.head_norm': 'none', 'model.dropout': 0.3},
    'batch norm': {'model.dropout': 0.0},
}


def images(seed, count, size=8):
    """Random images of three classes."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (count, size, size, 1), np.uint8)
    return pixels, draw.integers(0, 3, count).astype(np.int32)


def make_config(**changes):
    return cfg.replace(cfg.Config(), SMALL | changes)


def opened(config, size=8):
    """A marked config, its data of 40 and 21 images, and the components that bring them."""
    components = from_objects(train=images(0, 40, size), eval=images(1, 21, size))
    config = cfg.validate(components.mark(config))
    return config, open_data(config, components=components, test=True), components


@pytest.mark.parametrize('case', CASES)
def test_a_run_is_what_fit_trains(case, tmp_path, monkeypatch):
    monkeypatch.setenv('CNN_JAX_CACHE', str(tmp_path / 'cache'))
    held = 'data.subset', 'data.validation', 'data.validation_share', 'data.folds'
    images_ = {path: each for path, each in CASES[case].items() if path in held}
    _, data, components = opened(make_config(**images_), size=32)  # by another arm
    config = components.mark(make_config(seed=3, **CASES[case]))
    compiled = compile_structure(config, data, components=components)
    [run] = train_runs([config], compiled, data)

    alone = fit(config, tmp_path / 'run', train=images(0, 40, 32), eval=images(1, 21, 32))
    folds, holds_out = config.data.folds, config.data.validation or config.data.validation_share
    split = 'validation' if holds_out else 'test'
    for name in ('loss', 'accuracy', 'calibration_error'):
        # Of the same network; sums of images are compiled another way.
        assert run['metrics'][split][name] == pytest.approx(alone.metrics[name], rel=1e-6), name
    assert run['metrics']['test']['count'] == (40 // folds if folds else 21)
    [trial] = train_runs([config], compiled, data, trial=True, curves=False)
    assert {*trial['metrics']} == {'validation'} if holds_out else {'test'}
    assert run['steps'] == run['curves'][-1]['step']
    assert (run['steps'] < compiled.spec.phase_ends[-1]) == bool(config.train.patience)
    assert run['metrics']['train']['count'] == (24 if folds else config.data.subset or 40)
    points = [point['epoch'] for point in run['curves'] if point['split'] == 'eval']
    assert points == [float(epoch) for epoch in range(1, len(points) + 1)]


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """A finished ablation of three arms, tuned, and two replicates."""
    config, data, components = opened(make_config(**SPLITS, **{'model.head_dropout': 0.0}))
    plan = make_plan(ARMS, config, seeds=2, tune=RATE, trials=2, primaries=('loss',))
    store = open_store(tmp_path_factory.mktemp('study'), plan, {'code': 'x'}, FACTS)
    return store, data, components, workers.run_missing(store, data, components=components)


def test_every_run_is_done_and_counted(study):
    """Two trials of four replicates, and two replicates, of each arm; the controls."""
    store, _, _, totals = study
    assert [store.result(run)['status'] for run in decisions.due(store)] == ['done'] * (24 + 6 + 3)
    assert totals == 33
    assert summary.summary_of(store)['repeated']


def test_a_trial_never_sees_a_test_image_nor_what_is_held_out(study):
    store, data, _, _ = study
    for run in decisions.due(store):
        train = setup.deal(run.config, data).train
        seen = {image.tobytes() for image in train.read(np.arange(train.n))}
        held = {image.tobytes() for image in data.evaluate.read(np.arange(10))}
        tested = {image.tobytes() for image in data.test.read(np.arange(21))}
        assert len(seen) == 20
        assert not seen & (held | tested)
        if run.kind == 'trial':
            assert {*store.result(run)['metrics']} == {'validation'}


def replicates(store):
    return [run for run in decisions.due(store) if run.kind == 'replicate']


def test_a_run_alone_gives_the_bits_it_gave_in_company(study):
    store, data, components, _ = study
    for run in replicates(store)[3:]:
        compiled = compile_structure(run.config, data, components=components)
        [alone] = train_runs([run.config], compiled, data, curves=False)
        for name in ('metrics', 'curves', 'correct', 'losses', 'checks', 'parameters'):
            assert json.loads(json.dumps(alone[name])) == store.result(run)[name], (run.arm, name)


def test_a_check_measures_the_share_of_activations_that_dropout_drops(study):
    store, *_ = study
    for run in replicates(store):
        rate = 0.3 if run.arm == 'dropout' else 0.0
        assert store.result(run)['checks']['dropped'] == pytest.approx(rate, abs=rate / 3), run.arm


def test_only_missing_runs_are_trained_and_to_the_same_result(study):
    finished, data, components, _ = study
    store = dataclasses.replace(finished)  # which remembers nothing

    def reproducible(run):
        skipped = ('seconds', 'wall_seconds')
        return {name: part for name, part in read_json(run.path).items() if name not in skipped}

    run = replicates(finished)[4]
    before = reproducible(run)
    run.path.unlink()
    assert workers.run_missing(store, data, components=components) == 1
    assert reproducible(run) == before
    again = workers.run_missing(store, data, go_on=lambda: pytest.fail('a run was repeated'))
    assert again == 0


def test_what_is_kept_of_each_image_adds_up_to_the_measures(study):
    for run in replicates(study[0]):
        result = study[0].result(run)
        for measure, error in (('accuracy', 1e-6), ('loss', 1e-3)):  # float16
            kept = decisions.per_image(result, measure)
            assert kept.shape == (21,)
            assert kept.mean() == pytest.approx(result['metrics']['test'][measure], rel=error)


def test_runs_together_judge_every_image_of_folds_that_differ_by_one():
    config, data, components = opened(make_config(**{'data.folds': 3, 'data.batch': 2}))
    configs = [cfg.replace(config, {'data.fold': number}) for number in range(3)]
    compiled = compile_structure(config, data, 3, components)
    runs = train_runs(configs, compiled, data, curves=False)
    counts = [[run['metrics'][split]['count'] for split in ('train', 'test')] for run in runs]
    assert counts == [[27, 13], [27, 13], [26, 14]]


def test_a_run_that_has_ended_is_not_failed_by_what_comes_after():
    config, data, components = opened(make_config(**SPLITS, **{'train.patience': 1.0}))
    runs = training._Runs(
        [config], compile_structure(config, data, components=components), data, True
    )
    runs._over[0] = 3
    sums = {'count': 8, 'loss': 1.0, 'bin_correct': np.ones(1), 'objective': np.nan}
    runs._report(5, sums | {'gradient_norm': 1.0}, [])
    assert not runs.failures


def test_images_to_choose_by_are_not_those_to_test_on():
    config, data, _ = opened(make_config(**SPLITS))
    plan = make_plan(ARMS, config, tune=RATE, trials=2)
    with pytest.raises(UserError, match='are the test images'):
        workers._check_arms(plan, dataclasses.replace(data, validation=data.test), NO_COMPONENTS)


@pytest.mark.parametrize(
    ('error', 'told', 'word'),
    [
        (OSError('no space left'), OSError, 'no space left'),
        (RuntimeError('RESOURCE_EXHAUSTED: out of'), UserError, 'does not fit into the memory'),
        (TypeError('bad operand'), RunFailed, 'arm .* raised TypeError: bad operand'),
    ],
)
def test_what_says_nothing_of_an_arm_is_no_result_of_it(study, monkeypatch, error, told, word):
    finished, data, components, _ = study
    store = dataclasses.replace(finished)
    run = replicates(finished)[1]
    kept = run.path.read_bytes()
    run.path.unlink()

    def full(*_, **__):
        raise error

    monkeypatch.setattr(training, 'train_runs', full)
    with pytest.raises(told, match=word):
        workers.run_missing(store, data, components=components)
    assert not run.path.exists()
    run.path.write_bytes(kept)


def test_a_seed_gives_every_arm_the_same_start(study):
    store, data, components, _ = study
    starts = {}
    for arm in ARMS:
        compiled = compile_structure(store.plan.config(arm, 1), data, components=components)
        starts[arm] = params.flatten(compiled.init(1).params)
    for arm in ('dropout', 'batch norm'):
        assert starts['none'].keys() <= starts[arm].keys()
        for path, leaf in starts['none'].items():
            np.testing.assert_array_equal(leaf, starts[arm][path], err_msg=path)


def seeds(count, **changes):
    return [make_config(seed=s, **{'model.dropout': 0.1 * s, **changes}) for s in range(count)]


def assert_together_agrees(together, configs):
    """Runs that are trained together agree with each alone to rounding, in one compilation."""
    _, data, components = opened(configs[0])
    configs = [components.mark(config) for config in configs]
    one, many = (compile_structure(configs[0], data, n, components) for n in (1, together))
    for config, run in zip(configs, train_runs(configs, many, data), strict=True):
        [alone] = train_runs([config], one, data)
        assert run['correct'] == alone['correct']
        assert run['checks'] == pytest.approx(alone['checks'], rel=1e-4)
        for expected, point in zip(alone['curves'], run['curves'], strict=True):
            assert point.pop('split') == expected.pop('split')
            assert point == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert [compilations(phase.train_step) for phase in many.phases] == [1]


@pytest.mark.parametrize(
    ('together', 'configs'),
    [
        (5, seeds(4, **{'loss.l2': 1e-3})),  # one is repeated to fill the program
        (3, seeds(3, **IMPATIENT | {'train.epochs': 5.0, 'train.patience': 1.0})),
        (3, seeds(3, **CASES['drawn equally often'])),
    ],
)
def test_together_they_agree_with_alone_to_rounding(together, configs):
    assert_together_agrees(together, configs)


def test_devices_share_the_runs():
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=4'
    environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__], check=True, env=environment)


def test_nothing_of_a_step_is_kept_but_what_is_reported(monkeypatch):
    """As many arrays live on the device at the end of a long epoch as at its beginning."""
    config, data, components = opened(make_config(**{'train.epochs': 8.0}))
    compiled = compile_structure(config, data, components=components)
    alive = []

    def counted(*arguments):
        for each in steps(*arguments):
            alive.append(len(jax.live_arrays()))
            yield each

    monkeypatch.setattr(training, 'steps', counted)
    train_runs([cfg.replace(config, {'train.eval_every': 8.0})], compiled, data)
    assert len(alive) == 40
    assert max(alive[10:]) <= max(alive[:10])


@pytest.mark.parametrize('together', [1, 3])
def test_a_diverging_run_fails_alone_with_its_reason(together):
    rates = (0.01, 1e30, 0.01)
    configs = [make_config(seed=i, **{'optimizer.learning_rate': r}) for i, r in enumerate(rates)]
    _, data, components = opened(configs[0])
    configs = [components.mark(config) for config in configs]
    compiled = compile_structure(configs[0], data, together, components)
    groups = [configs] if together == 3 else [[config] for config in configs]
    results = [result for group in groups for result in train_runs(group, compiled, data)]
    assert [result['status'] for result in results] == ['done', 'failed', 'done']
    assert 'not finite' in results[1]['reason']


def test_where_memory_is_short_fewer_are_trained_together(monkeypatch, tmp_path):
    widths = []

    def train(configs, compiled, data, **options):
        widths.append(len(configs))
        if len(configs) > 2:
            raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')
        return train_runs(configs, compiled, data, **options)

    monkeypatch.setattr(training, 'train_runs', train)
    config, data, components = opened(make_config())
    plan = make_plan({'none': {}, 'some': {'model.dropout': 0.1}}, config, seeds=5, floor=False)
    store = open_store(tmp_path, plan, {'code': 'x'}, FACTS)
    totals = workers.run_missing(store, data, together=6, components=components)
    assert widths == [5, 2, 2, 1, 2, 2, 1, 1]  # 10 replicates in two rounds, then the control
    assert totals == 11
    assert [store.result(run)['status'] for run in decisions.due(store)] == ['done'] * 11


if __name__ == '__main__':  # by test_devices_share_the_runs
    assert len(jax.devices()) == 4
    assert_together_agrees(6, [*seeds(4), *seeds(2)])  # on one device two are repeated
