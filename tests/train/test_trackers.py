"""What trackers are told, that nothing depends on them, and W&B and MLflow where installed."""

import itertools
import os
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

import cnn_jax as cj
from cnn_jax.ablation import log
from cnn_jax.errors import UserError
from cnn_jax.train.record import read_lines
from cnn_jax.train.trackers import Tracker

CONFIG = cj.Config(
    data=cj.Data(source='digits', train='train[:200]', eval='test', batch=20),
    model=cj.Model(stem_width=0, widths=(4,), hidden=(8,)),
    train=cj.Train(epochs=2),
)


class Kept(Tracker):
    def __init__(self):
        self.numbers, self.settings, self.closed = {}, [], 0

    def scalars(self, step, values):
        self.numbers |= {(step, name): value for name, value in values.items()}

    def hyperparameters(self, config, final):
        self.settings.append((config, final))

    def close(self):
        self.closed += 1


class Broken(Kept):
    def scalars(self, step, values):
        raise ConnectionError('no server')


def recorded(folder):
    """The numbers of the work directory, as trackers are told them."""
    return {
        (line['step'], f'{name}/{line["split"]}'): value
        for line in read_lines(folder / 'metrics.jsonl')
        for name, value in line.items()
        if isinstance(value, float)
    }


def test_a_tracker_is_told_what_is_recorded_and_changes_nothing(tmp_path):
    kept, broken, lines = Kept(), Broken(), []
    plain = cj.fit(CONFIG, tmp_path / 'plain', live=False)
    run = cj.fit(CONFIG, tmp_path / 'run', trackers=(broken, kept), live=False, say=lines.append)
    assert kept.numbers == recorded(tmp_path / 'run')
    (begun, nothing), (config, final) = kept.settings
    assert (begun, nothing) == (config, {})
    assert config['optimizer.learning_rate'] == CONFIG.optimizer.learning_rate
    assert final.items() <= run.metrics.items()
    assert final
    assert kept.closed == 1
    assert any('Broken' in line and 'no server' in line for line in lines)
    for name in ('config.json', 'metrics.jsonl', 'steps.f32'):
        contents = [(tmp_path / each / name).read_bytes() for each in ('plain', 'run')]
        assert contents[0] == contents[1], name
    hashes = [each.manifest['config_hash'] for each in (plain, run)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize('name', ['wandb', 'mlflow', 'tensorbored'])
def test_a_tracker_that_is_not_there_is_refused_before_anything_begins(tmp_path, monkeypatch, name):
    monkeypatch.setattr('importlib.util.find_spec', lambda *_: None)
    with pytest.raises(UserError, match=name):
        cj.fit(CONFIG, tmp_path / 'run', trackers=(name,))
    assert not (tmp_path / 'run').exists()


def hparams(folder):
    """What the event files of a folder hold for TensorBoard's HParams, and the scalars."""
    settings, numbers = {}, {}
    for path in folder.glob('events*'):
        content, place = path.read_bytes(), 0
        while place < len(content):  # a length, its check sum, an event, its check sum
            (length,) = struct.unpack_from('<Q', content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                for key, each in data.session_start_info.hparams.items():
                    settings[key] = each.string_value or each.number_value
                if value.HasField('simple_value'):
                    numbers[value.tag] = value.simple_value
    return settings, numbers


def test_each_replicate_of_an_ablation_is_a_run_of_hparams_once(tmp_path):
    def ablate():
        return cj.ablate(
            {'rate': {'model.dropout': log(0.1, 0.5)}, 'tanh': {'model.activation': 'tanh'}},
            baseline=cj.replace(CONFIG, {'data.subset': 60, 'data.validation': 60}),
            trials=2,
            seeds=2,
            floor=False,
            workers=0,
            workdir=tmp_path / 'study',
            trackers=('tensorboard',),
        )

    result = ablate()
    store, found = result.store, {}
    folders = sorted((tmp_path / 'study' / 'tracked').iterdir())
    for folder in folders:
        settings, numbers = hparams(folder)
        found[folder.name] = settings, numbers
    expected = {
        run.path.stem: (run, store.result(run))
        for arm, number in itertools.product(store.plan.configs, range(2))
        for run in store.replicates(arm, number)
    }
    assert found.keys() == expected.keys()
    for stem, (run, kept) in expected.items():
        settings, numbers = found[stem]
        assert settings == {
            'arm': run.arm,
            'seed': run.seed,
            'model.dropout': run.config.model.dropout,
            'model.activation': run.config.model.activation,
        }
        assert numbers['accuracy'] == pytest.approx(kept['metrics']['test']['accuracy'])
    files = sorted(os.walk(tmp_path / 'study' / 'tracked'))
    ablate()
    assert sorted(os.walk(tmp_path / 'study' / 'tracked')) == files


def test_mlflow_has_the_numbers_of_a_run_and_of_its_resumption(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file://{tmp_path}/mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    for _ in range(2):  # the second call finds a finished run
        run = cj.fit(CONFIG, tmp_path / 'run', trackers=('mlflow',), live=False)
    (logged,) = mlflow.MlflowClient().search_runs(['0'])
    assert logged.data.params['data.source'] == 'digits'
    assert logged.data.metrics['final/accuracy'] == pytest.approx(run.metrics['accuracy'])
    last = max(recorded(tmp_path / 'run'))[0]
    assert logged.data.metrics['loss/eval'] == recorded(tmp_path / 'run')[last, 'loss/eval']


def test_wandb_has_the_numbers_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    cj.fit(CONFIG, tmp_path / 'run', trackers=('wandb',), live=False)
    (file,) = (tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb')
    content = file.read_bytes()
    for (_, name), value in recorded(tmp_path / 'run').items():
        assert name.encode() in content
        assert repr(value).encode() in content
