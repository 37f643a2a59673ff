"""launch.ablate as a user types it, killed and started again, and its mistakes."""

import json
import shutil

import pytest
from PIL import Image


def test_it_says_what_it_compares_and_what_it_found(study, summary):
    folder, printed = study
    assert '5 arms × 3 seeds' in printed
    assert 'budget of every arm: 2 epochs of 100 images = 10 steps of 20' in printed
    assert 'one compilation: none, dropout, L2' in printed
    assert '[15/15]' in printed
    assert printed.count('95% CI') == 4
    assert len(list((folder / 'cells').glob('*.json'))) == 15
    for name in ('ablation.json', 'summary.json', 'summary.csv', 'report.html'):
        assert (folder / name).stat().st_size, name


def test_results_do_not_depend_on_the_number_of_workers(
    launch, study, tmp_path, study_flags, summary
):
    launch('ablate', *study_flags, f'--workdir={tmp_path}/one', '--workers=1', check=0)
    assert summary(tmp_path / 'one') == summary(study[0])


def test_cells_trained_together_agree_to_rounding(launch, study, tmp_path, study_flags, summary):
    launch('ablate', *study_flags, f'--workdir={tmp_path}', '--together=3', '--workers=1', check=0)
    for arm, found in summary(tmp_path)['arms'].items():
        alone = summary(study[0])['arms'][arm]
        assert found['eval']['loss']['mean'] == pytest.approx(alone['eval']['loss']['mean'], 1e-5)


def test_the_same_command_again_runs_nothing(launch, study, study_flags):
    folder, _ = study
    before = {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()}
    done = launch('ablate', *study_flags, f'--workdir={folder}', check=0)
    assert '15 of 15 runs were done before' in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()} == before


def test_another_config_is_refused_with_the_difference(launch, study, study_flags):
    folder, _ = study
    done = launch('ablate', *study_flags, f'--workdir={folder}', '--config.train.epochs=3', check=2)
    assert 'train.epochs: 2.0 → 3.0' in done.stderr


def test_more_seeds_add_cells(launch, study, tmp_path, study_flags, summary):
    shutil.copytree(study[0], tmp_path / 'more')
    done = launch('ablate', *study_flags[:-1], '--seeds=4', f'--workdir={tmp_path}/more', check=0)
    assert '15 of 20 runs were done before' in done.stdout
    assert summary(tmp_path / 'more')['seeds'] == [0, 1, 2, 3]


def test_a_failed_cell_is_run_again_on_request(launch, study, tmp_path, study_flags, summary):
    folder = tmp_path / 'failed'
    shutil.copytree(study[0], folder)
    cell = next((folder / 'cells').glob('L2-0-*.json'))
    cell.write_text(json.dumps({'arm': 'L2', 'seed': 0, 'status': 'failed', 'reason': 'made up'}))
    done = launch('ablate', *study_flags, f'--workdir={folder}', check=1)
    assert '1 runs failed; --retry_failed repeats them' in done.stdout
    launch('ablate', *study_flags, f'--workdir={folder}', '--retry_failed', check=0)
    assert summary(folder) == summary(study[0])
    assert 'made up' in cell.with_suffix('.failed').read_text()


def test_a_plain_experiment_is_not_an_ablation(launch, tmp_path):
    done = launch('ablate', '--config=experiments/small.py', f'--workdir={tmp_path}', check=2)
    assert 'train it with launch.train' in done.stderr


def test_a_folder_that_cannot_be_written_is_named(launch, study_flags):
    done = launch('ablate', *study_flags, '--workdir=/proc/run', check=2)
    assert 'the work directory /proc/run cannot be written' in done.stderr


def test_the_report_can_be_rendered_again(launch, study):
    folder, _ = study
    before = (folder / 'summary.json').read_bytes()
    (folder / 'report.html').unlink()
    launch('report', f'--workdir={folder}', check=0)
    assert (folder / 'report.html').exists()
    assert (folder / 'summary.json').read_bytes() == before


def test_ablations_are_drawn_into_one_picture(launch, study, tmp_path):
    folder, _ = study
    done = launch('compare', f'--out={tmp_path}/new/compared.png', folder, check=0)
    assert done.stdout == f'written: {tmp_path}/new/compared.png\n'
    with Image.open(tmp_path / 'new' / 'compared.png') as picture:
        assert min(picture.size) > 100
    told = launch('compare', f'--out={tmp_path}/none.png', tmp_path, check=2).stderr
    assert 'is not the work directory of an ablation' in told
    assert 'no ablation' in launch('compare', f'--out={tmp_path}/none.png', check=2).stderr
