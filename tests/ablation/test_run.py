"""`ablate` from Python, and the progress that it prints."""

from dataclasses import replace

import flax.linen as flax
import numpy as np
import optax
import pytest

from cnn_jax import nn
from cnn_jax.ablation import decisions
from cnn_jax.ablation.plan import METRICS, log, make_plan
from cnn_jax.ablation.results import open_store
from cnn_jax.ablation.run import Progress, ablate
from cnn_jax.config import Config, Data, Train
from cnn_jax.data.source import as_source
from cnn_jax.errors import UserError


class Net(flax.Module):
    """A model of the user's own."""

    rate: float
    classes: int

    @flax.compact
    def __call__(self, x, train: bool):
        x = flax.relu(flax.Conv(4, (3, 3), strides=2)(x))
        x = nn.Dropout(self.rate)(x.reshape(len(x), -1), train=train)
        return flax.Dense(self.classes)(x)


def images(seed, count):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count).astype(np.int32)
    noise = draw.integers(0, 90, (count, 8, 8, 1)) + 70 * labels[:, None, None, None]
    return noise.astype(np.uint8), labels


def test_arms_are_compared_on_the_users_own_model_data_and_optimizer(tmp_path, capsys):
    own = {
        'model': lambda config, classes: Net(config.model.dropout, classes),
        'optimizer': optax.adam(1e-2),
        'train': replace(as_source(images(0, 40)), skipped=(('a/b.heic', '.heic: not read'),)),
        'eval': images(1, 21),
    }
    config = Config(data=Data(batch=8), train=Train(epochs=2.0))
    unread = {'model.hidden': (3,)}
    arms = {'dropout': {'model.dropout': 0.5, **unread}, 'none': {'model.dropout': 0.0}}
    call = {'baseline': config, 'workdir': tmp_path / 'run', **own}

    result = ablate(arms, seeds=2, curves=True, **call)
    assert result.verdicts.keys() == {'dropout', 'none'}  # the config as it is comes first
    assert [row['arm'] for row in result.table] == [
        arm for arm in ('baseline', 'dropout', 'none') for _ in range(2)
    ]
    assert {row['n'] for row in result.table} == {2}
    assert result.verdicts['none'] in repr(result)
    assert result.plot().axes
    assert (tmp_path / 'run' / 'report.html').exists()
    printed = capsys.readouterr().out
    assert '[9/9]' in printed  # the baseline's once more, two of pixels
    assert f'left out: 1 .heic (listed in {tmp_path}/run/skipped.csv)' in printed
    assert 'without effect in dropout: config.model.hidden is (3,)' in printed

    more = ablate(arms, seeds=3, curves=True, **call)
    assert '9 runs were done before' in capsys.readouterr().out
    assert {row['n'] for row in more.table} == {3}
    assert (more.summary['seeds'], more.summary['looks']) == ([0, 1, 2], [2, 3])
    with pytest.raises(UserError, match='differs'):
        ablate(arms, seeds=2, **call | {'optimizer': optax.sgd(1e-2)})
    with pytest.raises(UserError, match='workers'):
        ablate(arms, seeds=2, workers=2, **call)


FACTS = {'command': 'x', 'manifest': {}}


@pytest.fixture
def store(tmp_path):
    """A store of two arms and two seeds."""
    arms = {'plain': {}, 'drop': {'model.dropout': 0.3}}
    plan = make_plan(arms, Config(), seeds=2, floor=False)
    budgets = {'plain': 'one epoch', 'drop': 'two epochs'}
    return open_store(tmp_path, plan, {'code': 'x'}, FACTS | {'budgets': budgets})


def finished(accuracy):
    measures = {'accuracy': accuracy, 'loss': 1.0}
    return {'status': 'done', 'wall_seconds': 2.0, 'metrics': {'test': measures}}


def test_progress_prints_each_run_once(store, capsys):
    runs = decisions.due(store)
    store.write(runs[0], finished(0.9))
    with Progress(store) as progress:
        assert 'DIFFERENT budgets' in capsys.readouterr().out
        store.write(runs[2], finished(0.92))
        progress.update()
        store.write(runs[1], {'status': 'failed', 'reason': 'why', 'classes': 10})
        progress.update()
        progress.update()
        store.write(runs[3], finished(0.95))
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(
        '[2/5] plain, seed 1: test accuracy 92.00% (mean of 2: 91.00 ± 1.41), negative'
    )
    assert second.startswith('[3/5] drop, seed 0: FAILED: why, ')
    assert third.startswith('[4/5] drop, seed 1: test accuracy 95.00% (mean of 2: ')


def test_progress_names_trials_and_what_they_chose(tmp_path, capsys):
    tune = {'optimizer.learning_rate': log(1e-4, 1e-2)}
    config = Config(data=Data(validation=9))
    plan = make_plan({'plain': {}}, config, seeds=2, floor=False, tune=tune, trials=2)
    store = open_store(tmp_path, plan, {'code': 'x'}, FACTS | {'budgets': {'plain': 'one epoch'}})
    with Progress(store) as progress:
        for run in decisions.missing(store):
            measures = {'loss': 1.0 - run.trial / 2, 'accuracy': 0.5 - run.trial / 4}
            store.write(run, finished(0.5) | {'metrics': {'validation': measures}})
        progress.update()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith('[1/13] plain, trial 0 (optimizer.learning_rate=0.001): validation')
    for line, measure, rate in zip(lines[-2:], ('accuracy', 'loss'), ('0.001', '0.000316')):
        title = METRICS[measure].title
        path = 'optimizer.learning_rate'
        assert line == f'plain: tuned for {title} to {path}={rate}, at the edge: {path}'
