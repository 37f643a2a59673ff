import gc
import sys

import numpy as np
import pytest

from benchmarks import streaming


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['streaming', '--help'])
    with pytest.raises(SystemExit) as stop:
        streaming.main()
    assert stop.value.code == 0
    assert 'python -m benchmarks.streaming' in capsys.readouterr().out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(streaming, 'SHAPE', (4, 4, 3))
    monkeypatch.setattr(streaming, 'BATCH', 8)


def test_an_image_depends_on_its_position_alone():
    assert np.array_equal(streaming.pixels(3), streaming.pixels(3))
    assert not np.array_equal(streaming.pixels(3), streaming.pixels(4))
    assert streaming.pixels(0).shape == streaming.SHAPE
    assert abs(streaming.pixels(5).mean() - 127.5) < 1


def test_an_epoch_is_read_within_the_bound(small):
    seen = streaming.read(100 * 48 / 1e9, 60)
    assert (seen['images'], seen['read']) == (100, 96)  # an epoch's whole batches
    assert 8 <= seen['alive'] <= seen['bound']
    assert len(seen['memory']) == streaming.SAMPLES


def test_batches_are_counted_until_they_are_dropped():
    class Stream:
        def _unread(self, count):
            return {'image': np.zeros((count, 2))}

    stream = Stream()
    alive = streaming.Alive(stream)
    first, second = stream._unread(3), stream._unread(4)
    assert (alive.now, alive.most) == (7, 7)
    del first
    gc.collect()
    assert (alive.now, alive.most) == (4, 7)
    del second
    gc.collect()
    assert alive.now == 0


def test_the_section_tells_what_was_read():
    read = {'speed': 1e3, 'memory': [300.0, 310.0], 'alive': 256, 'bound': 320}
    trained = {'speed': 50.0, 'share': 0.25, 'peak': 1.0}
    text = streaming.section(
        {
            'read,2': read | {'images': 13_287, 'read': 13_248, 'peak': 400.0},
            'read,20': read | {'images': 132_866, 'read': 66_433, 'peak': 405.0},
            **dict.fromkeys(streaming.TRAINED, trained),
        }
    )
    assert '+5 MB at the peak' in text
    assert '| 20 GB, 132,866 images | 66,433 (50%) | 1,000 | 300, 310 | 405 | 256 of 320 |' in text
    assert text.count('| 25% |') == len(streaming.TRAINED)
