"""A user's mistakes: exit code 2, one plain sentence, no traceback, nothing lost."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.environments import ROOT

TAKE_WORDS = {'predict', 'compare', 'processes'}
NO_LAUNCHERS = {'__init__', 'cli', 'cnn_jax', 'launch'}
LAUNCHERS = {path.stem for path in (ROOT / 'launch').glob('*.py')} - NO_LAUNCHERS
REQUIRED = {
    'config': '--config=experiments/small.py',
    'workdir': '--workdir=/tmp/none',
    'out': '--out=/tmp/none',
    'topology': '--topology=v5e:2x4',
}


@pytest.fixture
def mistake(launch, tmp_path):
    """Runs a launcher that must refuse; returns its sentence."""

    def call(name, *arguments):
        done = launch(name, *arguments, check=2)
        assert 'Traceback' not in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
        assert len(lines) == 1, done.stderr
        return lines[0]

    return call


@pytest.mark.parametrize(
    ('argument', 'sentence'),
    [
        ('--config.model.widhts=(4,)', 'did you mean config.model.widths?'),
        ('--config.model.dropout=2', 'config.model.dropout is 2.0; it must be from 0 to 1'),
        ('--config=experiments/none.py', 'there is no such file'),
        ('--wrokdir=x', 'wrokdir'),
        ('--config.data.source=folder:/nowhere', '/nowhere'),
        ('--config.data.train=trian', 'train'),
        ('--config.train.frozen=("blokc*",)', 'matches no parameter'),
        ('--config.model.padding=VALID --config.model.kernel=9', 'kernel that spans 9×9'),
    ],
)
def test_train_names_the_mistake(mistake, tiny, tmp_path, argument, sentence):
    assert sentence in mistake('train', *tiny, f'--workdir={tmp_path}/run', *argument.split())


@pytest.mark.parametrize('name', sorted(LAUNCHERS - TAKE_WORDS))
def test_a_word_that_a_launcher_does_not_read_is_refused(mistake, name):
    text = (ROOT / 'launch' / f'{name}.py').read_text()
    needed = [
        flag for key, flag in REQUIRED.items() if f'define_{key}' in text or f"'{key}'" in text
    ]
    assert 'write --nodebug=False' in mistake(name, *needed, '--nodebug', 'False')


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['--config.augment.flip', 'False'], 'write --config.augment.flip=False'),
        (['config.model.dropout=0.9'], 'write --config.model.dropout=0.9'),
        (['--', '--config.model.dropout=0.9'], 'leave out the --'),
        (['more'], "nothing reads 'more'; leave it out"),
    ],
)
def test_what_was_perhaps_meant_is_said(mistake, tiny, words, sentence):
    assert sentence in mistake('train', *tiny, '--workdir=/tmp/none', *words)


def test_an_ablations_replicate_is_verified_whole(mistake, study):
    assert 'leave out --steps' in mistake('verify', f'--workdir={study[0]}', '--steps=3')


def test_costs_that_cannot_be_written_are_not_compiled_for(mistake, tmp_path):
    flags = '--config=experiments/small.py', '--topology=h100:1', f'--json={tmp_path}/none/costs'
    assert 'none/costs: No such file' in mistake('compile_check', *flags)


@pytest.mark.parametrize('name', sorted(LAUNCHERS))
def test_a_launcher_started_as_a_file_says_how(name):
    command = [sys.executable, f'launch/{name}.py']
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'error: start it from the checkout as python -m launch.{name}\n'


@pytest.mark.parametrize(
    ('argument', 'sentence'),
    [
        ('--workdir=', '--workdir is empty'),
        ('--workdir=/tmp/\udcff', 'whose name is not UTF-8'),
        ('--workdir=~nobody_of_that_name/x', 'no such home'),
        ('--profile=yes', "--profile is 'yes'; it takes true or false"),
        ('--model_parallel=x', "--model_parallel is 'x'; it takes a positive integer"),
        ('--config.augment.flip=yes', 'must be True or False'),
        ('--config.model.hidden=None', 'must be a list of whole numbers'),
        ('--config.model.weights=~nobody_of_that_name/x.h5', 'no such home'),
        ('--config.model.widths=100000000000', 'it must be from 1 to 1,048,576'),
        ('--config.model.hidden=1000000,1000000', 'make the network smaller'),
        ('--config.augment.crop=9', 'config.augment.crop=9'),
        ('--config.features.views=4', 'or resnet50_v1 has it'),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(mistake, tiny, tmp_path, argument, sentence):
    assert sentence in mistake('train', *tiny, f'--workdir={tmp_path}/run', argument)


def test_a_setting_that_is_tuned_is_not_overridden_in_silence(mistake, tmp_path):
    flags = '--config=experiments/regularization.py', f'--workdir={tmp_path}/study'
    assert 'would change nothing' in mistake('ablate', *flags, '--config.optimizer.learning_rate=1')


def test_a_list_may_be_written_plainly(launch, tmp_path):
    flags = '--config=experiments/small.py', '--config.data.source=digits', '--steps=1'
    for classes in ('4,9', '(4,9)', "('4','9')"):
        out = tmp_path / f'{len(classes)}.png'
        launch('show_batch', *flags, f'--config.data.classes={classes}', f'--out={out}', check=0)


def test_a_workdir_of_another_config_shows_the_difference(mistake, tiny, tiny_run):
    folder, _ = tiny_run
    before = (folder / 'config.json').read_bytes()
    sentence = mistake('train', *tiny, f'--workdir={folder}', '--config.loss.l2=0.25')
    assert 'config.loss.l2: 0.0005 → 0.25' in sentence
    assert (folder / 'config.json').read_bytes() == before


def test_a_workdir_of_another_config_that_is_gone(mistake, tiny, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run[0], tmp_path / 'run')
    (folder / 'config.json').unlink()
    sentence = mistake('train', *tiny, f'--workdir={folder}', '--config.loss.l2=0.25')
    assert 'another config' in sentence
    assert 'No such file' in sentence


def test_a_mistake_does_not_take_the_workdir(mistake, launch, tiny, tmp_path):
    folder = f'--workdir={tmp_path}/run'
    mistake('train', *tiny, folder, '--config.data.source=folder:/nowhere')
    launch('train', *tiny, folder, check=0)


def test_launchers_name_what_they_need(mistake, tiny, tiny_run, tmp_path):
    run, nothing = f'--workdir={tiny_run[0]}', f'--workdir={tmp_path}/none'
    (tmp_path / 'empty').mkdir()
    for word, *command in (
        ('workdir', 'train', *tiny),
        ('/proc', 'train', *tiny, '--workdir=/proc/run'),
        ('workdir', 'evaluate'),
        ('config.json', 'evaluate', f'--workdir={tmp_path}'),
        ('config.json', 'predict', nothing, 'x.png'),
        ('no image is named', 'predict', run),
        ('holds no image', 'predict', run, tmp_path / 'empty'),
        ('test', 'evaluate', run, '--split=tset'),
        ('at most 16', 'show_batch', *tiny[:1], f'--out={tmp_path}/x.png', '--steps=17'),
    ):
        assert word in mistake(*command)


def test_images_and_classes_that_changed_since_the_run_are_noticed(launch, mistake, tiny, tmp_path):
    images, where = tmp_path / 'images', f'--workdir={tmp_path}/run'
    launch('sample', '--source=digits', '--count=120', f'--out={tmp_path}/all', check=0)
    for path in sorted((tmp_path / 'all').iterdir()):
        name = path.stem.split('_')[1]
        (images / name).mkdir(parents=True, exist_ok=True)
        path.rename(images / name / path.name)
    flags = (*tiny, f'--config.data.source=folder:{images}', '--config.data.batch=16', where)
    launch('train', *flags, check=0)
    (images / '9').rename(images / '10')  # sorts before 2
    told = mistake('evaluate', where)
    assert 'are 0, 1, 10, 2' in told
    assert 'trained on 0, 1, 2' in told
    (images / '10').rename(images / '9')
    next((images / '3').iterdir()).unlink()
    assert 'changed' in mistake('train', *flags)


def test_runs_and_ablations_do_not_share_a_folder(mistake, tiny, tiny_run, study_flags, tmp_path):
    folder, _ = tiny_run
    flags = (*study_flags, f'--workdir={folder}')
    assert 'holds a run of launch.train' in mistake('ablate', *flags)
    (tmp_path / 'ablation.json').touch()
    assert 'holds an ablation' in mistake('train', *tiny, f'--workdir={tmp_path}')
