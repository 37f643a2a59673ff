import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn_jax.data.batches import eval_batches, order, train_indices
from cnn_jax.errors import UserError

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**32 - 1)
process_counts = st.sampled_from([1, 2, 3, 5])


@given(sizes, seeds, st.integers(0, 1000))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    permutation = order(n, seed, epoch)
    assert permutation.dtype == np.int32
    assert sorted(permutation.tolist()) == list(range(n))


def test_the_order_is_the_same_for_ever():
    assert order(10, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(10, 7, 3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_position_is_as_likely():
    n, draws = 5, 2000
    counts = np.zeros((n, n))
    for epoch in range(draws):
        counts[np.arange(n), order(n, 0, epoch)] += 1
    deviation = (counts - draws / n) / np.sqrt(draws / n * (1 - 1 / n))
    assert np.abs(deviation).max() < 4


@given(sizes, st.integers(1, 70), seeds, process_counts)
def test_training_is_the_epochs_one_after_the_other(n, batch, seed, process_count):
    batch *= process_count
    steps = -(-3 * n // batch)
    stream = np.concatenate(
        [
            train_indices(n, batch, seed, step, process, process_count)
            for step in range(steps)
            for process in range(process_count)
        ]
    )
    epochs = [order(n, seed, epoch) for epoch in range(-(-len(stream) // n))]
    np.testing.assert_array_equal(stream, np.concatenate(epochs)[: len(stream)])


@given(sizes, st.integers(1, 70), process_counts)
def test_evaluation_takes_every_example_once(n, batch, process_count):
    batch *= process_count
    seen = []
    for processes in zip(
        *(eval_batches(n, batch, process, process_count) for process in range(process_count))
    ):
        index, mask = (np.concatenate(parts) for parts in zip(*processes))
        assert (index.shape, index.dtype, mask.dtype) == ((batch,), np.int32, bool)
        assert (index[~mask] == 0).all()
        seen += index[mask].tolist()
    assert seen == list(range(n))


def test_only_the_last_evaluation_batch_is_padded():
    assert [(index.tolist(), mask.tolist()) for index, mask in eval_batches(5, 2)] == [
        ([0, 1], [True, True]),
        ([2, 3], [True, True]),
        ([4, 0], [True, False]),
    ]


def test_a_batch_that_processes_cannot_share():
    with pytest.raises(UserError, match=r'batch of 10 examples .* 3 processes.*multiples of 3'):
        train_indices(100, 10, 0, 0, 0, 3)
    with pytest.raises(UserError, match='batch of 10 examples'):
        list(eval_batches(100, 10, 0, 3))
