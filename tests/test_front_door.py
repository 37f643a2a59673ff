"""The Python front door: fit, load_run, ablate and freeze with a user's own parts."""

import json
import re

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import cnn_jax as cj
from cnn_jax import config as config_module
from cnn_jax.ablation import log
from cnn_jax.backbones import CONVOLUTIONS
from cnn_jax.components import Components
from cnn_jax.files import read_json, write_json
from cnn_jax.nn import BatchNorm, Conv, Dropout
from cnn_jax.params import flatten
from cnn_jax.tools.export import export
from cnn_jax.tools.predict import mc_dropout
from tests.environments import ROOT

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 90)
IMAGES = np.clip(RNG.normal(60 + 60 * LABELS[:, None, None, None], 40, (90, 8, 8, 1)), 0, 255)
TRAIN, EVAL = ((IMAGES[part].astype(np.uint8), LABELS[part]) for part in (slice(60), slice(60, 90)))
CONFIG = cj.Config(
    data=cj.Data(batch=20),
    loss=cj.Loss(l2=1e-3, l2_on=('*/kernel',)),
    train=cj.Train(epochs=2, frozen=('norm/*',)),
)
PARTS = {'train': TRAIN, 'eval': EVAL, 'optimizer': optax.adamw(1e-2, weight_decay=0.1)}


class Net(nn.Module):
    """Flax's and this package's layers in one net, which calls its mode as it likes."""

    rate: float = 0.25

    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.BatchNorm(use_running_average=not training, name='norm')(x)
        x = nn.relu(BatchNorm()(Conv(4, 3, 2)(x), train=training))
        return nn.Dense(3)(Dropout(self.rate)(x.mean((1, 2)), train=training))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('fit') / 'run'


@pytest.fixture(scope='module')
def run(folder):
    return cj.fit(CONFIG, folder, model=Net(), **PARTS, say=lambda line: None)


def test_fit_returns_what_it_measured(run):
    assert run.step == 6
    assert not run.stopped
    assert list(run.curves['eval']['step']) == [3, 6]
    assert run.curves['eval']['accuracy'][-1] == run.metrics['accuracy']
    assert run.curves.plot().axes
    assert f'{run.metrics["loss"]:.4f}' in repr(run)
    assert set(cj.__all__) <= set(dir(cj))


def test_predict_gives_the_probabilities_that_were_evaluated(run):
    probabilities = run.predict(EVAL[0])
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-6)
    assert np.mean(probabilities.argmax(axis=-1) == EVAL[1]) == pytest.approx(
        run.metrics['accuracy']
    )
    np.testing.assert_allclose(run.predict(EVAL[0][0]), probabilities[:1], rtol=1e-5)
    with pytest.raises(cj.UserError, match='uint8'):
        run.predict(EVAL[0].astype(np.float32))


def test_a_frozen_foreign_layer_is_held_still(run):
    np.testing.assert_array_equal(run.variables['batch_stats']['norm']['mean'], 0)
    np.testing.assert_array_equal(run.variables['params']['norm']['scale'], 1)
    frozen = [
        p for p, _ in jax.tree_util.tree_leaves_with_path(run.state.opt_state) if 'norm' in str(p)
    ]
    assert not [path for path in frozen if 'BatchNorm' not in str(path)]


def test_the_same_call_resumes(run, folder):
    lines = []
    again = cj.fit(CONFIG, folder, model=Net(), **PARTS, say=lines.append)
    assert again.metrics == run.metrics
    np.testing.assert_array_equal(again.predict(EVAL[0]), run.predict(EVAL[0]))


class Normed(nn.Module):
    """Flax's wrappers, whose variables have slashes in their names."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.WeightNorm(nn.Dense(8))(x.reshape(len(x), -1)))
        return nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)


def test_a_net_whose_variables_have_slashes_in_their_names_and_any_seed(tmp_path):
    config = cj.replace(CONFIG, {'train.frozen': (), 'loss.l2': 0.0, 'seed': 2**32 - 1})
    run = cj.fit(config, tmp_path, model=Normed(), **PARTS, say=lambda line: None)
    again = cj.load_run(tmp_path, model=Normed())
    np.testing.assert_array_equal(again.predict(EVAL[0]), run.predict(EVAL[0]))


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x, is_train=False):
        return nn.Dense(3)(nn.Dropout(0.5)(x.mean((1, 2)), deterministic=not is_train))


class Fixed(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=self.deterministic)(x.mean((1, 2)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=self.deterministic)(x))


def test_layers_whose_mode_is_fixed_are_evaluated_in_inference(tmp_path):
    config = cj.replace(CONFIG, {'train.frozen': ()})
    run = cj.fit(config, tmp_path, model=Fixed(), **PARTS, say=lambda line: None)
    expected = Fixed(deterministic=True).apply(run.variables, run.spec.prepare(EVAL[0]))
    np.testing.assert_allclose(run.predict(EVAL[0]), jax.nn.softmax(expected), rtol=1e-5)
    export(run, tmp_path / 'exported')


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.mean((1, 2))
        return nn.Dense(3)(x + jax.random.normal(self.make_rng('dropout'), x.shape))


class Listed(nn.Module):
    @nn.compact
    def __call__(self, x):
        first, second = self.param('pair', lambda key: [np.ones((1, 3)), np.ones(3)])
        return x.mean((1, 2)) @ first + second


@pytest.mark.parametrize(
    ('model', 'word'),
    [
        (Odd(), 'called with is_train'),
        (Noisy(), 'draws random numbers, or changes its batch statistics, in inference'),
        (Listed(), 'the parameter pair of the network is a list'),
    ],
)
def test_a_net_that_cannot_be_trained_or_evaluated_is_refused(tmp_path, model, word):
    with pytest.raises(cj.UserError, match=word):
        cj.fit(cj.replace(CONFIG, {'train.frozen': ()}), tmp_path, model=model, **PARTS)


class Rotated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2))) * 1j


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.mean((1, 2))) + self.param('n', lambda key: np.zeros(3, np.int32))


def raised(updates, state, params=None):
    return jax.tree.map(lambda leaf: leaf[..., None], updates), state


@pytest.mark.parametrize(
    ('parts', 'word'),
    [
        ({'model': Rotated()}, 'returns complex64; logits are real'),
        ({'model': Counting()}, r'parameter n .* is int32 \[3\]'),
        ({'optimizer': lambda c: optax.sgd(float(c.optimizer.learning_rate))}, 'line .*: Concret'),
        ({'optimizer': optax.GradientTransformation(lambda p: (), raised)}, 'its updates'),
        (
            {'regularizers': cj.Regularizer('loss.own', lambda s, c: c.log_probs)},
            'own regularizer of loss.own: its term is float32',
        ),
        ({'regularizers': [3]}, 'list of cnn_jax.Regularizer'),
        ({'train': (TRAIN[0], TRAIN[1] + 2**40)}, 'labels .* to 1099511627778'),
        ({'train': (TRAIN[0], [*TRAIN[1].tolist()[:-1], 10**9])}, 'to 1000000000'),
        ({'train': (np.ma.masked_array(TRAIN[0]), TRAIN[1])}, 'masked'),
        ({'train': ([[1], [1, 2]], TRAIN[1])}, 'no array'),
        ({'train': (*TRAIN, 3)}, 'class names'),
        ({'workdir': ''}, 'workdir is empty'),
        ({'workdir': '~nobody_x'}, 'no such home'),
        ({'workdir': '\udcff'}, 'not UTF-8'),
        ({'trackers': [3]}, 'not a tracker'),
        ({'model_parallel': 0}, 'model_parallel=0'),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(tmp_path, parts, word):
    config = cj.replace(CONFIG, {'train.frozen': (), 'loss.own': 0.1})
    with pytest.raises(cj.UserError, match=word):
        cj.fit(config, **{'workdir': tmp_path, 'model': Net(), **PARTS, **parts})


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        return nn.Dense(3, kernel_init=kernel)(x.mean((1, 2)))


def test_annotated_parameters_and_random_keys_in_an_optimizers_state_are_saved(tmp_path):
    noisy = optax.chain(optax.add_noise(0.1, 0.55, jax.random.key(0)), optax.sgd(0.1))
    parts = PARTS | {'model': Partitioned(), 'optimizer': noisy}
    config = cj.replace(CONFIG, {'train.frozen': ()})
    runs = [cj.fit(config, tmp_path / each, **parts, say=lambda line: None) for each in 'ab']
    again = cj.load_run(tmp_path / 'a', model=Partitioned(), optimizer=noisy)
    for run in (*runs, again):
        np.testing.assert_array_equal(run.predict(EVAL[0]), runs[0].predict(EVAL[0]))


def test_precise_statistics_of_an_own_net_are_those_of_the_images(tmp_path):
    """Whatever the momentum of its averages: Flax's is 0.99."""
    config = cj.replace(CONFIG, {'train.frozen': (), 'train.precise_norm': 3})
    run = cj.fit(config, tmp_path, model=Net(), **PARTS, say=lambda line: None)
    images, found = run.spec.prepare(TRAIN[0]), run.variables['batch_stats']['norm']
    np.testing.assert_allclose(found['mean'], images.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found['var'], images.var((0, 1, 2)), rtol=1e-5)


def test_other_code_or_data_is_another_run(run, folder):
    for parts in ({'model': Net(0.5)}, {'model': Net(), 'optimizer': optax.adamw(2e-2)}):
        with pytest.raises(cj.UserError, match='own'):
            cj.fit(CONFIG, folder, **PARTS | parts, say=lambda line: None)
    other = TRAIN[0], 2 - TRAIN[1]
    with pytest.raises(cj.UserError, match='changed'):
        cj.fit(CONFIG, folder, model=Net(), **PARTS | {'train': other}, say=lambda line: None)


def test_load_run_opens_it_again(run, folder):
    again = cj.load_run(folder, model=Net())
    assert again.metrics['loss'] == run.metrics['loss']
    np.testing.assert_array_equal(again.predict(EVAL[0]), run.predict(EVAL[0]))
    with pytest.raises(cj.UserError, match='model'):
        cj.load_run(folder)
    with pytest.raises(cj.UserError, match='code of the model'):
        cj.load_run(folder, model=Net(0.5))


def test_a_net_that_names_its_mode_otherwise_is_exported_and_drawn_from(run, tmp_path):
    export(run, tmp_path / 'exported')
    content = (tmp_path / 'exported' / 'model.stablehlo').read_bytes()
    weights = flatten(run.variables)
    exported = jax.export.deserialize(bytearray(content)).call(weights, EVAL[0])
    np.testing.assert_allclose(exported, run.predict(EVAL[0]), rtol=1e-5)
    draw = mc_dropout(run)(EVAL[0])
    assert np.abs(np.asarray(draw(0)) - np.asarray(draw(1))).max() > 1e-3


@pytest.mark.parametrize(
    'arguments',
    [
        {'components': Components(experiment='x.py')},
        {'tune': {'optimizer.learning_rate': log(1, 2)}},
    ],
)
def test_what_fit_would_not_use_is_refused(tmp_path, arguments):
    with pytest.raises(cj.UserError):
        cj.fit(CONFIG, tmp_path, model=Net(), **PARTS, **arguments)


def test_trials_choose_what_is_tuned_once(tmp_path):
    config = cj.replace(CONFIG, {'train.trials': 3, 'data.validation_share': 0.25})
    tune = {'optimizer.learning_rate': log(1e-4, 1e-1), 'loss.l2': log(1e-5, 1e-1)}
    parts, said = {'train': TRAIN, 'eval': EVAL, 'tune': tune}, []
    config.train.frozen = ()
    run = cj.fit(config, tmp_path / 'run', **parts, say=said.append)
    tried = read_json(tmp_path / 'run' / 'tuning.json')
    assert run.manifest['tuned'] == tried['points'][np.argmin(tried['losses'])]
    for path, value in run.manifest['tuned'].items():
        assert config_module.get(run.config, path) == value
    assert sum('held-out loss' in line for line in said) == 3

    # Trials are the run itself at other points, so the chosen one is what was measured.
    plain = cj.replace(run.config, {'train.trials': 0})
    again = cj.fit(plain, tmp_path / 'plain', train=TRAIN, eval=EVAL, say=said.append)
    assert again.metrics['loss'] == run.metrics['loss']
    assert again.metrics['loss'] == pytest.approx(min(tried['losses']), rel=1e-6)

    (tmp_path / 'run' / 'tuning.json').unlink()
    del said[:]
    assert cj.fit(config, tmp_path / 'run', **parts, say=said.append).metrics == run.metrics
    assert not any('held-out loss' in line for line in said)
    assert cj.load_run(tmp_path / 'run').config == run.config
    narrow = parts | {'tune': {'optimizer.learning_rate': log(1e-4, 1e-2)}}
    with pytest.raises(cj.UserError, match='was tuned over'):
        cj.fit(config, tmp_path / 'run', **narrow, say=said.append)

    # What was tried before an interruption is not tried again.
    (tmp_path / 'next').mkdir()
    write_json(tmp_path / 'next' / 'tuning.json', tried | {'losses': [0.0]})
    other = cj.fit(config, tmp_path / 'next', **parts, say=said.append)
    assert other.manifest['tuned'] == tried['points'][0]
    assert sum('held-out loss' in line for line in said) == 2

    # Unless it was tried of another run.
    (tmp_path / 'changed').mkdir()
    write_json(tmp_path / 'changed' / 'tuning.json', tried | {'losses': [0.0]})
    del said[:]
    cj.fit(
        cj.replace(config, {'optimizer.clip_norm': 1.0}),
        tmp_path / 'changed',
        **parts,
        say=said.append,
    )
    assert sum('held-out loss' in line for line in said) == 3


def test_a_network_that_is_wrong_with_confidence_says_so(tmp_path):
    config = cj.replace(CONFIG, {'optimizer.learning_rate': 30.0, 'train.frozen': ()})
    said = []
    parts = {'train': TRAIN, 'eval': (EVAL[0], (EVAL[1] + 1) % 3)}
    run = cj.fit(config, tmp_path / 'run', **parts, say=said.append)
    assert run.metrics['loss'] > np.log(3)
    assert any('above the 1.10' in line and 'learning_rate' in line for line in said)


def test_a_run_on_a_weights_file_holds_what_it_trains_and_the_digest_of_the_rest(tmp_path):
    drawn = np.random.default_rng(0)
    tensors = {
        f'{layer}/{name}': drawn.normal(size=shape if name == 'kernel' else shape[-1:]) / 9
        for layer, shape in CONVOLUTIONS.items()
        for name in ('kernel', 'bias')
    }
    path = tmp_path / 'own.safetensors'
    small = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(small, path, {'preprocessing': 'plain'})
    vgg = {'name': 'vgg16', 'cut': 'block1_pool', 'hidden': (4,), 'head_norm': 'none'}
    config = cj.Config(
        model=cj.Model(**vgg, weights=str(path)),
        data=cj.Data(batch=20, resize='stretch', size=32, channels=3),
        train=cj.Train(epochs=1, frozen=('backbone/*',)),
        unfreeze=cj.Unfreeze(epochs=1, frozen=('*block1_conv1/*',)),
    )
    folder, quiet = tmp_path / 'run', {'say': lambda line: None}
    run = cj.fit(config, folder, train=TRAIN, eval=EVAL, **quiet)
    images = np.repeat(EVAL[0].repeat(4, axis=1).repeat(4, axis=2), 3, axis=3)
    again = cj.load_run(folder)
    np.testing.assert_array_equal(run.predict(images), again.predict(images))
    kernel = again.variables['params']['backbone']['block1_conv1']['kernel']
    np.testing.assert_array_equal(kernel, small['block1_conv1/kernel'])
    seal = json.loads((folder / f'checkpoints/step_{run.step}/seal.json').read_text())
    first = ['backbone/block1_conv1/bias', 'backbone/block1_conv1/kernel']
    assert seal['content']['frozen']['paths'] == first  # block1_conv2 is trained in the end
    small['block1_conv1/bias'] *= 1.01
    save_file(small, path, {'preprocessing': 'plain'})
    with pytest.raises(cj.UserError, match='frozen weights'):
        cj.load_run(folder)
    path.unlink()
    with pytest.raises(cj.UserError, match=r'own\.safetensors'):
        cj.load_run(folder)


@pytest.mark.parametrize(
    ('parts', 'word'),
    [
        ({'train': TRAIN}, 'both'),
        ({'train': TRAIN, 'eval': (EVAL[0][..., 0], EVAL[1])}, 'height'),
        ({'model': nn.Dense(3), **PARTS}, 'logits'),
    ],
)
def test_bad_parts_are_user_errors(tmp_path, parts, word):
    with pytest.raises(cj.UserError, match=word):
        cj.fit(cj.Config(data=cj.Data(batch=20)), tmp_path, **parts, say=lambda line: None)


def test_replicates_of_an_ablation_go_through_the_folds(tmp_path):
    config = cj.replace(CONFIG, {'data.folds': 3, 'train.frozen': ()})
    arms = {'none': {}, 'L2': {'loss.l2': 0.1}}
    parts = {'train': TRAIN, 'eval': EVAL}
    result = cj.ablate(arms, config, seeds=3, **parts, workdir=tmp_path, floor=False)
    runs = [result.store.replicate('none', number, 'loss') for number in range(3)]
    assert [run.config.data.fold for run in runs] == [0, 1, 2]
    assert [result.store.result(run)['metrics']['test']['count'] for run in runs] == [20] * 3
    assert 'one of 3 folds' in result.summary['population']
    compared = result.summary['arms']['L2']['compared']['loss']
    error = np.std(compared['differences'], ddof=1) * np.sqrt(1 / 3 + 1 / 2)
    assert compared['error'] == pytest.approx(error)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = '\n'.join(blocks).replace('epochs=5', 'epochs=1').replace('seeds=3', 'seeds=2')
    images, more = (RNG.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8) for n in (128, 64))
    names = {
        'images': images,
        'labels': np.arange(128) % 10,
        'more': more,
        'their_labels': np.arange(64) % 10,
    }
    exec(compile(code, 'README.md', 'exec'), names)
    assert names['run'].predict(more).shape == (64, 10)
