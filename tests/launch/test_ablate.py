"""launch.ablate as a user types it, killed and started again, and its mistakes."""

import json
import random
import time

import pytest

STUDY = (
    '--config=experiments/regularization.py',
    '--config.data.source=digits',
    '--config.data.train=train[:100]',
    '--config.data.batch=20',
    '--config.model.widths=(4,)',
    '--config.model.hidden=(8,)',
    '--config.train.epochs=2',
    '--seeds=3',
)


def summary(folder):
    return json.loads((folder / 'summary.json').read_text())


@pytest.fixture(scope='session')
def study(launch, tmp_path_factory):
    """The work directory of a finished ablation, and what it printed."""
    folder = tmp_path_factory.mktemp('study') / 'run'
    done = launch('ablate', *STUDY, f'--workdir={folder}', check=0)
    return folder, done.stdout


def test_it_says_what_it_compares_and_what_it_found(study):
    folder, printed = study
    assert '5 arms × 3 seeds' in printed
    assert 'one compilation: none, dropout, L2' in printed
    assert '[15/15]' in printed
    assert printed.count('95% CI') == 4
    assert len(list((folder / 'cells').glob('*.json'))) == 15
    for name in ('ablation.json', 'summary.json', 'summary.csv', 'report.html'):
        assert (folder / name).stat().st_size, name


def test_results_do_not_depend_on_the_number_of_workers(launch, study, tmp_path):
    launch('ablate', *STUDY, f'--workdir={tmp_path}/one', '--workers=1', check=0)
    assert summary(tmp_path / 'one') == summary(study[0])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_summary(start, launch, study, tmp_path):
    folder, kills, draw = tmp_path / 'killed', 0, random.Random(0)
    while not (folder / 'summary.json').exists() and kills < 6:
        process = start('ablate', *STUDY, f'--workdir={folder}')
        time.sleep(draw.uniform(1.0, 8.0))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    launch('ablate', *STUDY, f'--workdir={folder}', check=0)
    assert kills > 1
    assert summary(folder) == summary(study[0])


def test_the_same_command_again_runs_nothing(launch, study):
    folder, _ = study
    before = {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()}
    done = launch('ablate', *STUDY, f'--workdir={folder}', check=0)
    assert '15 of 15 cells are done already' in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()} == before


def test_another_config_is_refused_with_the_difference(launch, study):
    folder, _ = study
    done = launch('ablate', *STUDY, f'--workdir={folder}', '--config.train.epochs=3', check=2)
    assert 'train.epochs: 2.0 → 3.0' in done.stderr


def test_a_plain_experiment_is_not_an_ablation(launch, tmp_path):
    done = launch('ablate', '--config=experiments/small.py', f'--workdir={tmp_path}', check=2)
    assert 'train it with launch.train' in done.stderr


def test_a_folder_that_cannot_be_written_is_named(launch):
    done = launch('ablate', *STUDY, '--workdir=/proc/run', check=2)
    assert 'the work directory /proc/run cannot be written' in done.stderr


def test_the_report_can_be_rendered_again(launch, study):
    folder, _ = study
    before = (folder / 'summary.json').read_bytes()
    (folder / 'report.html').unlink()
    launch('report', f'--workdir={folder}', check=0)
    assert (folder / 'report.html').exists()
    assert (folder / 'summary.json').read_bytes() == before


@pytest.mark.slow
def test_on_ray_a_killed_worker_is_replaced_and_nothing_is_done_twice(
    start, study, tmp_path, worker_processes
):
    folder = tmp_path / 'ray'
    process = start('ablate', *STUDY, f'--workdir={folder}', '--executor=ray', '--workers=2')
    deadline = time.monotonic() + 120
    while len(list(folder.glob('cells/*.json'))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    victims = worker_processes(folder)
    assert victims
    victims[0].kill()
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert summary(folder) == summary(study[0])
    done = [line for line in printed.splitlines() if line.startswith('[')]
    assert len(done) == len(set(done)) == 15
