"""The launchers end to end: what they write, print and return, and that a run goes on exactly."""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal

import pytest


def metrics_hash(folder):
    return hashlib.sha256((folder / 'metrics.jsonl').read_bytes()).hexdigest()


def test_a_run_leaves_a_complete_record(tiny_run):
    folder, _ = tiny_run
    names = {path.name for path in folder.iterdir()}
    assert {'config.json', 'manifest.json', 'metrics.jsonl', 'curves.png', 'checkpoints'} <= names
    assert any(name.startswith('events.out.tfevents') for name in names)
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['split'] for line in lines] == ['train', 'eval'] * 2
    assert lines[-1]['epoch'] == pytest.approx(2, abs=0.05)
    assert lines[-1]['count'] == 364
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert manifest['data']['train']['count'] == 1433
    assert len(manifest['data']['train']['fingerprint']) == 64
    assert manifest['machine']['threads'] >= 1
    assert {'jax', 'flax', 'optax'} <= set(manifest['packages'])
    assert (folder / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_it_says_what_is_trained_on_what(tiny_run):
    _, printed = tiny_run
    for words in ('1,433 training', 'jaxlib', 'block1_conv1/kernel', 'trained', 'l2', 'done:'):
        assert words in printed, words
    assert 'compilations of each step in each phase: 1' in printed


def test_profiled_it_leaves_a_trace_and_ends_with_its_speed(launch, tiny, tiny_run, tmp_path):
    done = launch('train', *tiny, '--profile', f'--workdir={tmp_path}', check=0)
    assert list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))
    assert 'profile of steps 3 to 7' in done.stdout
    assert re.search(r'^  block1_conv2 +backward +[\d.]+ +[\d.]+%$', done.stdout, re.MULTILINE)
    assert metrics_hash(tmp_path) == metrics_hash(tiny_run[0])
    last = done.stdout.splitlines()[-1]
    facts = json.loads((tmp_path / 'speed.json').read_text())
    assert f'speed: {facts["images_per_second"]:,.0f} images/s' in last
    assert 0 < facts['fraction_of_peak'] < 1
    assert 0 <= facts['waiting_share'] <= 1
    for words in ('GFLOP/s', '% of the', 'compiling', 'peak memory'):
        assert words in last, words


def test_evaluate_repeats_the_last_line_of_the_record(launch, tiny_run):
    folder, _ = tiny_run
    done = launch('evaluate', f'--workdir={folder}', check=0)
    last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
    at = folder / f'evaluation/test-step_{last["step"]}'
    content = json.loads((at / 'evaluation.json').read_text())
    assert content['loss'] == last['loss']
    assert content['accuracy'] == last['accuracy']
    assert f'{last["accuracy"]:.4f}' in done.stdout
    assert sum(map(sum, content['confusion'])) == 364
    assert f'{at}/evaluation.html' in done.stdout
    before = {path: path.read_bytes() for path in at.iterdir()}
    launch('evaluate', f'--workdir={folder}', '--split=train[:50]', check=0)
    assert {path: path.read_bytes() for path in at.iterdir()} == before
    assert len([*folder.glob('evaluation/*/predictions.csv')]) == 2


def test_export_writes_what_evaluate_measured_into_a_new_folder(launch, tiny_run, tmp_path):
    folder, out = tiny_run[0], tmp_path / 'out'
    launch('export', f'--workdir={folder}', f'--out={out}', check=0)
    last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
    evaluation = json.loads((out / 'classes.json').read_text())['evaluation']
    assert (evaluation['count'], evaluation['accuracy']) == (364, last['accuracy'])
    assert not any(path.read_bytes().startswith(b'\x80') for path in out.iterdir())  # a pickle
    launch('export', f'--workdir={folder}', f'--out={out}', check=2)


def test_sample_writes_images_of_the_classes_asked_for(launch, tmp_path):
    flags = ('--source=digits', '--classes=4,9', '--count=4', f'--out={tmp_path}')
    launch('sample', *flags, check=0)
    names = [path.stem.split('_')[1] for path in tmp_path.glob('*.png')]
    assert len(names) == 4
    assert set(names) == {'4', '9'}


def test_predict_classifies_what_can_be_read_and_reports_the_rest(
    launch, tiny_run, images, tmp_path
):
    folder, _ = tiny_run
    broken, missing = tmp_path / 'broken.png', tmp_path / 'missing.png'
    broken.write_bytes(b'not an image')
    paths = [images[0], broken, missing, *images[1:3], images[0]] * 10  # more than a batch
    done = launch('predict', f'--workdir={folder}', '--json', *paths, check=0)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row['file'] for row in rows] == [str(path) for path in paths]
    assert [row == rows[0] for row in rows] == [path == images[0] for path in paths]
    for row, path in zip(rows, paths):
        if path in (broken, missing):
            assert row['error']
        else:
            assert row['class'] in '0123456789'
            assert 0.1 <= row['probability'] <= 1
    table = launch('predict', f'--workdir={folder}', *images, broken, check=0)
    assert '%' in table.stdout
    assert 'broken.png: not read' in table.stderr
    launch('predict', f'--workdir={folder}', missing, check=1)


def test_monte_carlo_dropout_adds_the_uncertainty_and_repeats_itself(launch, tiny_run, images):
    command = 'predict', f'--workdir={tiny_run[0]}', '--mc=5', *images[:3]
    done = launch(*command, '--json', check=0)
    for row in map(json.loads, done.stdout.splitlines()):
        assert 0 < row['mutual_information'] < row['entropy'] < math.log(10)
    assert launch(*command, '--json', check=0).stdout == done.stdout
    assert launch(*command, check=0).stdout.count('  mutual information ') == 3


def test_heat_maps_are_drawn_whatever_a_file_is_called(launch, tiny_run, images, tmp_path):
    names = [os.fsdecode(b'caf\xe9.png'), '図' * 80 + '.png', '$5_$10.png']
    paths = [shutil.copy(images[0], tmp_path / name) for name in names]
    maps, flag = tmp_path / 'maps', f'--workdir={tiny_run[0]}'
    done = launch('predict', flag, f'--heatmaps={maps}', *paths, check=0)
    assert '3 heat maps' in done.stderr
    drawn = sorted(maps.iterdir())
    assert [path.name[:4] for path in drawn] == ['000_', '001_', '002_']
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in drawn)
    (tmp_path / 'file').write_text('mine')
    launch('predict', flag, f'--heatmaps={tmp_path}/file', images[0], check=2)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_find_lr_suggests_a_rate_and_writes_the_curve(launch, tiny, tmp_path):
    done = launch('find_lr', *tiny, f'--out={tmp_path}', '--steps=60', check=0)
    assert 'suggestion: --config.optimizer.learning_rate=' in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lr_finder.csv', 'lr_finder.png']
    launch('find_lr', *tiny, f'--out={tmp_path}', '--lowest=1', '--highest=0.1', check=2)


@pytest.fixture(scope='module')
def long(tiny):
    """The flags of a run that is not over when its first checkpoint has been seen."""
    return *tiny, '--config.train.epochs=12', '--config.train.checkpoint_every=1'


@pytest.fixture(scope='module')
def undisturbed(launch, long, tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'run'
    launch('train', *long, f'--workdir={folder}', check=0)
    return folder


@pytest.mark.parametrize(
    ('number', 'code'), [(signal.SIGTERM, os.EX_TEMPFAIL), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_or_killed_it_goes_on_to_the_same_numbers(
    launch, start, until_saved, long, undisturbed, tmp_path, number, code
):
    folder = tmp_path / 'stopped'
    process = start('train', *long, f'--workdir={folder}')
    until_saved(process, folder)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    done = launch('train', *long, f'--workdir={folder}', check=0)
    assert 'resuming from the checkpoint' in done.stdout
    assert metrics_hash(folder) == metrics_hash(undisturbed)


@pytest.mark.parametrize('name', ['train', 'predict'])
def test_help_is_quick_and_shows_a_command(launch, name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch(name, '--help', check=0, PYTHONUTF8='1')  # not in a fork
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: the wall's depends on what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert f'python -m launch.{name}' in done.stdout
    assert '--debug' in done.stdout
