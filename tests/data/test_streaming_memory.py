"""What streaming keeps in memory, and how far it is ahead of the step that needs it."""

import threading
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cnn_jax.data import batches as module
from cnn_jax.data.batches import PART, StreamBatches
from cnn_jax.data.source import Source
from cnn_jax.runtime import cores


def computed(n, read=lambda i: np.full((2, 2, 1), i % 251, np.uint8)) -> Source:
    """A source whose images are computed when they are read: none is kept."""
    return Source(
        name='computed',
        class_names=('a', 'b'),
        labels=np.broadcast_to(np.int32(1), (n,)),
        sizes=np.broadcast_to(np.int32(2), (n, 2)),
        channels=1,
        read=read,
        describe=str,
        fingerprint='computed',
    )


class Begun:
    """Counts the batches that a stream has begun to read."""

    def __init__(self, stream, monkeypatch):
        self.count = 0
        self._changed, unread = threading.Condition(), stream._unread

        def counted(*taken):
            with self._changed:
                self.count += 1
                self._changed.notify_all()
            return unread(*taken)

        monkeypatch.setattr(stream, '_unread', counted)

    def reaches(self, count):
        with self._changed:
            return self._changed.wait_for(lambda: self.count >= count, timeout=30)


@pytest.mark.parametrize('batch', [8, 3 * PART + 1], ids=['one part', 'several parts'])
@pytest.mark.parametrize('n', [1_000, 1_000_000])
def test_the_images_at_once_do_not_depend_on_how_many_there_are(n, batch, monkeypatch):
    stream = StreamBatches(computed(n), batch=batch)
    parts = -(-batch // PART)
    ahead = -(-max(cores() + 1, 2 * parts) // parts) + 1
    assert stream.images_at_once == (ahead + 2) * batch
    begun = Begun(stream, monkeypatch)
    batches: Any = stream.train()
    for step in range(40):
        next(batches)  # step + 1 were handed out, and with what follows there are
        assert begun.reaches(step + 1 + 2)  # read ahead without being asked
        assert (begun.count - step) * batch <= stream.images_at_once
    batches.close()


@pytest.mark.parametrize('sharded', [False, True])
def test_the_next_batch_goes_to_the_device_before_the_last_is_used(sharded, monkeypatch):
    mesh = jax.make_mesh((1,), ('data',))
    sharding = NamedSharding(mesh, PartitionSpec('data')) if sharded else None
    events, put = [], module.put

    def placed(batch, where):
        assert where is sharding
        events.append(('placed', int(batch['index'][0])))
        return put(batch, where)

    monkeypatch.setattr(module, 'put', placed)
    stream = StreamBatches(computed(100), batch=10, sharding=sharding)
    monkeypatch.setattr(
        stream, '_order', type('InOrder', (), {'batch': 10, 'process_count': 1, 'evaluate': order})
    )
    for number, batch in enumerate(stream.evaluate()):
        assert isinstance(batch['image'], jax.Array)
        assert sharding is None or batch['image'].sharding == sharding
        events.append(('used', number))
    kinds = [(kind, number) for number in range(1, 5) for kind in ('placed', 'used')]
    expected = [('placed', 0), *((k, n if k == 'placed' else n - 1) for k, n in kinds), ('used', 4)]
    assert events == expected


def order():
    """Five batches that carry their number."""
    return [(np.full(10, number, np.int32), np.ones(10, bool)) for number in range(5)]


def test_the_images_of_a_process_alone_are_read():
    asked = set()

    def read(i):
        asked.add(i)
        return np.zeros((2, 2, 1), np.uint8)

    stream = StreamBatches(computed(100, read), batch=20, process_index=3, process_count=5)
    own = {int(i) for batch in stream.evaluate() for i in batch['index'][batch['mask']]}
    assert own == {i for i in range(100) if 12 <= i % 20 < 16}
    assert asked == own
