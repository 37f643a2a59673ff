import pytest

from cnn_jax.data import folder as folder_index
from cnn_jax.data.folder import examine_files

PATHS = ['a/0.png', 'a/1.png', 'b/0.png']


@pytest.fixture
def root(tmp_path, write_images):
    return write_images(tmp_path, {'a': 2, 'b': 1})


@pytest.fixture
def read(monkeypatch):
    """The number of files read since the last look."""
    counts = []
    original = folder_index.scan
    monkeypatch.setattr(folder_index, 'scan', lambda data: counts.append(0) or original(data))

    def count():
        n = len(counts)
        counts.clear()
        return n

    return count


def test_only_new_and_changed_files_are_read(root, read):
    first = examine_files(root, PATHS)
    assert (list(first), read()) == (PATHS, 3)
    assert (examine_files(root, PATHS), read()) == (first, 0)
    (root / 'a/1.png').write_bytes((root / 'b/0.png').read_bytes())
    second = examine_files(root, PATHS)
    assert read() == 1
    assert second['a/1.png'].finding == second['b/0.png'].finding
    assert (examine_files(root, PATHS), read()) == (second, 0)


def test_a_file_that_goes_is_forgotten(root, read):
    examine_files(root, PATHS)
    assert list(examine_files(root, PATHS[:1])) == PATHS[:1]
    assert read() == 3


def test_a_link_to_nowhere_is_a_finding(root):
    (root / 'a/2.png').symlink_to(root / 'nowhere.png')
    assert examine_files(root, ['a/2.png'])['a/2.png'].finding.reason == 'No such file or directory'


def test_what_could_not_be_read_is_tried_again(root, read, monkeypatch):
    def fail(path):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(folder_index, 'read_file', fail)
        reasons = [file.finding.reason for file in examine_files(root, PATHS).values()]
        assert (reasons, read()) == (['Permission denied'] * 3, 0)
    reasons = [file.finding.reason for file in examine_files(root, PATHS).values()]
    assert (reasons, read()) == ([''] * 3, 3)


def test_a_damaged_index_is_made_again(root, read, cache_dir):
    first = examine_files(root, PATHS)
    (index,) = cache_dir.rglob('*.json')
    index.write_bytes(b'{"rule"')
    assert (examine_files(root, PATHS), read()) == (first, 6)


def test_folders_do_not_share_an_index(root, read, tmp_path, write_images):
    write_images(tmp_path / 'other', {'a': 2, 'b': 1})
    examine_files(root, PATHS)
    examine_files(tmp_path / 'other', PATHS)
    assert read() == 6
