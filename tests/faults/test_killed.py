"""Runs killed again and again, or whose power is cut, end as if nobody had touched them."""

import os
import random
import re
import signal
import subprocess
import time

import pytest

from tests.faults import runs


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    return runs.tiny(runs.images(tmp_path_factory.mktemp('images')))


@pytest.fixture(scope='module')
def undisturbed(config, tmp_path_factory):
    """The end of a run that nobody disturbs; the first one compiled."""
    folder = tmp_path_factory.mktemp('undisturbed')
    runs.whole(config, folder / 'first')
    return runs.whole(config, folder / 'second')


@pytest.mark.parametrize(
    'kills',
    [
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(200, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(
    config, undisturbed, tmp_path, kills, record_property
):
    draw, done, count = random.Random(kills), 0, 0
    while done < kills:
        folder = tmp_path / f'run{count}'
        done += runs.survive(config, folder, draw, min(kills - done, 8), undisturbed.operations)
        assert runs.ended(folder).result() == undisturbed.result(), runs.log(folder)
        count += 1
    record_property('tried', done)


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system in a file; what the kernel has not written is not in that file."""
    if os.geteuid() or not os.path.exists('/dev/loop-control'):
        pytest.skip('a power cut needs root and loop devices')
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(image):
        subprocess.run(['mount', '-o', 'loop', image, folder], check=True)
        return folder

    yield mount
    subprocess.run(['umount', folder], capture_output=True)


@pytest.mark.parametrize('cuts', [pytest.param(20, marks=pytest.mark.exhaustive)])
def test_after_a_power_cut_it_goes_on_from_the_newest_checkpoint(
    config, undisturbed, disk, tmp_path, cuts, record_property
):
    """The disk's file is copied while the run stands still: what is not there was never written."""
    image, draw, snapshots = tmp_path / 'image', random.Random(cuts), []
    while len(snapshots) < cuts:
        image.write_bytes(b'')
        os.truncate(image, 128 << 20)
        subprocess.run(['mkfs.ext4', '-q', image], check=True)
        folder = disk(image)
        process = runs.start(config, folder / 'run')
        while process.exitcode is None and len(snapshots) < cuts:
            time.sleep(draw.uniform(0.1, 0.5))
            saved = folder.glob('run/checkpoints/step_*')
            steps = sorted(int(place.name.removeprefix('step_')) for place in saved)
            if not steps:
                continue
            os.kill(process.pid, signal.SIGSTOP)
            snapshots.append((tmp_path / f'image{len(snapshots)}', steps))
            subprocess.run(['cp', '--sparse=always', image, snapshots[-1][0]], check=True)
            os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.join()
        subprocess.run(['umount', folder], check=True)
    for snapshot, steps in snapshots:
        folder = disk(snapshot)
        assert runs.whole(config, folder / 'run').result() == undisturbed.result()
        begun = re.findall(r'resuming from the checkpoint of step (\d+)', runs.log(folder / 'run'))
        # The newest one may have its name and its save not returned yet; all others have.
        assert int(begun[0]) >= steps[-2:][0], (begun, steps)
        subprocess.run(['umount', folder], check=True)
        snapshot.unlink()
    record_property('tried', cuts)
