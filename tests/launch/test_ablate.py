"""launch.ablate as a user types it, killed and started again, and its mistakes."""

import shutil

from PIL import Image

from cnn_jax.files import read_json, write_json

# Of 5 arms a trial with 4 seeds, and 2 replicates; the baseline's first again, 2 of pixels.
RUNS = 5 * 4 + 5 * 2 + 1 + 2


def test_it_says_what_it_compares_and_what_it_found(study, summary):
    folder, printed = study
    assert '5 arms, 2 replicates' in printed
    assert 'budget of every arm: 2 epochs of 100 images = 10 steps of 20' in printed
    assert 'one compilation: none, dropout, L2' in printed
    assert f'[{RUNS}/{RUNS}]' in printed
    assert printed.count('against none, 2 replicates') == 4
    assert len(list((folder / 'cells').glob('*.json'))) == RUNS
    for name in ('ablation.json', 'summary.json', 'summary.csv', 'report.html'):
        assert (folder / name).stat().st_size, name


def test_the_same_command_again_runs_nothing(launch, study, study_flags):
    folder, _ = study
    before = {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()}
    done = launch('ablate', *study_flags, f'--workdir={folder}', check=0)
    assert f'{RUNS} runs were done before' in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (folder / 'cells').iterdir()} == before


def test_verify_trains_a_replicate_again(launch, study, tmp_path):
    folder = tmp_path / 'study'
    shutil.copytree(study[0], folder)
    arguments = f'--workdir={folder}', '--arm=dropout', '--seed=1'
    assert 'bitwise identical' in launch('verify', *arguments, check=0).stdout
    cell = next((folder / 'cells').glob('dropout-1-*.json'))
    write_json(cell, read_json(cell) | {'losses': '00'})
    assert 'differs  losses of dropout, seed 1' in launch('verify', *arguments, check=1).stdout
    assert 'the seeds 0 to 1' in launch('verify', *arguments[:2], '--seed=2', check=2).stderr
    assert 'no replicate of arm' in launch('verify', arguments[0], '--arm=x', check=2).stderr


def test_a_failed_cell_is_run_again_on_request(launch, study, tmp_path, study_flags, summary):
    folder = tmp_path / 'failed'
    shutil.copytree(study[0], folder)
    cell = next((folder / 'cells').glob('L2-0-*.json'))
    write_json(cell, read_json(cell) | {'status': 'failed', 'reason': 'made up'})
    done = launch('ablate', *study_flags, f'--workdir={folder}', check=1)
    assert '1 run failed; --retry_failed repeats them' in done.stdout
    launch('ablate', *study_flags, f'--workdir={folder}', '--retry_failed', check=0)
    assert summary(folder) == summary(study[0])
    assert 'made up' in cell.with_suffix('.failed').read_text()


def test_usage_errors_are_named(launch, study, study_flags, tmp_path):
    for arguments, words in (
        ((*study_flags, f'--workdir={study[0]}', '--config.train.epochs=3'), 'epochs: 2.0 → 3.0'),
        (('--config=experiments/small.py', f'--workdir={tmp_path}'), 'launch.train'),
        ((*study_flags, '--workdir=/proc/run'), '/proc/run cannot be written'),
    ):
        assert words in launch('ablate', *arguments, check=2).stderr


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
