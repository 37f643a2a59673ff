import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cnn_jax.data.source import from_arrays
from cnn_jax.data.splits import drawn, fold, held_out, interleaved, joined, select, subset
from cnn_jax.errors import UserError
from tests.data.conftest import open_source

labels_of_a_set = st.lists(st.integers(0, 5), min_size=5, max_size=120).map(np.array)


def numbered(labels, name='set'):
    """A source whose image i has the single pixel i."""
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return from_arrays(name, images, np.asarray(labels), tuple('abcdef'))


def pixels(source) -> list[int]:
    return [int(source[i][0].item()) for i in range(len(source))]


def undivided(labels, split: str):
    return select('set', {'all': lambda: numbered(labels)}, split)


# The fixed order.


@given(labels_of_a_set)
def test_every_prefix_holds_each_class_within_one_example(labels):
    order = interleaved(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    taken = (labels[order][:, None] == np.arange(6)).cumsum(axis=0)
    share = np.bincount(labels, minlength=6) / len(labels)
    ideal = np.arange(1, len(labels) + 1)[:, None] * share
    assert np.abs(taken - ideal).max() < 1


def test_the_order_is_the_same_for_ever():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    assert interleaved(labels).tolist() == [2, 4, 0, 8, 6, 1, 5, 3, 7, 9]


@given(labels_of_a_set, st.data())
def test_folds_test_on_each_example_once_and_on_every_class_in_proportion(labels, data):
    folds = data.draw(st.integers(2, len(labels)))
    parts = [fold(labels, number, folds) for number in range(folds)]
    everything = list(range(len(labels)))
    assert sorted(np.concatenate([tested for _, tested in parts]).tolist()) == everything
    for trained, tested in parts:
        assert sorted([*trained.tolist(), *tested.tolist()]) == everything
        share = np.bincount(labels, minlength=6) * len(tested) / len(labels)
        assert np.abs(np.bincount(labels[tested], minlength=6) - share).max() < 2
    with pytest.raises(UserError, match='lower'):
        fold(labels, 0, len(labels) + 1)


# Division of a source without a test split.


@given(labels_of_a_set)
def test_train_and_test_divide_the_set(labels):
    assume(np.bincount(labels).max() > 1)  # else there is nothing to test on
    train, test = undivided(labels, 'train'), undivided(labels, 'test')
    assert sorted(pixels(train) + pixels(test)) == list(range(len(labels)))
    for k in range(6):
        size = (labels == k).sum()
        assert (train.labels == k).sum() == max(min(size, 1), int(0.8 * size))
    assert pixels(undivided(labels, 'all')) == list(range(len(labels)))


def test_a_source_with_parts_keeps_them():
    parts = {'train': lambda: numbered([0, 1, 2]), 'test': lambda: numbered([0, 1])}
    for part, expected in {'train': [0, 1, 2], 'test': [0, 1], 'all': [0, 1, 2, 0, 1]}.items():
        assert pixels(select('set', parts, part)) == expected


# Slices.


@given(
    st.lists(st.integers(0, 5), min_size=100, max_size=250).map(np.array),
    st.integers(1, 49),
    st.integers(51, 99),
)
def test_percent_slices_are_disjoint_and_complete(labels, a, b):
    splits = (f'all[:{a}%]', f'all[{a}%:{b}%]', f'all[{b}%:]')
    seen = [i for split in splits for i in pixels(undivided(labels, split))]
    assert sorted(seen) == list(range(len(labels)))


@given(labels_of_a_set, st.data())
def test_longer_slices_contain_shorter_ones(labels, data):
    short = data.draw(st.integers(1, len(labels)))
    long = data.draw(st.integers(short, len(labels)))
    both = [pixels(undivided(labels, f'all[:{n}]')) for n in (short, long)]
    assert both[1][:short] == both[0]


def test_slices_of_named_size():
    for split, count in {'train[:500]': 500, 'train[10%:20%]': 143, 'train[1400:]': 33}.items():
        assert len(open_source('digits', split=split)) == count
    assert len(open_source('digits', split='all[:]')) == 1797


@pytest.mark.parametrize(
    ('split', 'sentence'),
    [
        ('trian', "no split 'trian'; it has train, test, all; did you mean train"),
        ('validation', "no split 'validation'"),
        *((text, 'is not a split') for text in ('train[:80', 'train[80%]', 'train[-5:]')),
        *((text, 'is not a split') for text in ('train[:1.5%]', '')),
        ('train[:101%]', 'goes to 101%, but there are 100%'),
        ('train[:9]', 'goes to 9, but there are 8 examples'),
        ('train[5:5]', 'is empty'),
        ('train[60%:40%]', 'is empty'),
        ('train[:1%]', 'is empty'),
    ],
)
def test_a_bad_split_is_explained(split, sentence):
    with pytest.raises(UserError, match=sentence):
        undivided([0] * 5 + [1] * 5, split)


# Views.


@given(labels_of_a_set, st.data())
def test_a_subset_is_a_view_in_the_given_order(labels, data):
    source = numbered(labels)
    indices = data.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1))
    view = subset(source, np.array(indices), 'view')
    assert pixels(view) == indices
    assert view.labels.tolist() == labels[indices].tolist()
    assert [view.describe(i) for i in range(len(view))] == [f'example {i}' for i in indices]


def test_fingerprints_tell_views_apart():
    source = numbered([0, 1, 2, 3])
    views = [source, *(subset(source, np.array(i), '') for i in ([0, 1], [1, 0], [0]))]
    views += [joined([source, source], ''), joined([source], '')]
    assert len({view.fingerprint for view in views}) == len(views)


def test_joined_sources_keep_their_examples():
    a, b = numbered([0, 1, 2]), numbered([3, 4])
    both = joined([a, b], 'both')
    assert (pixels(both), both.labels.tolist()) == ([0, 1, 2, 0, 1], [0, 1, 2, 3, 4])
    assert (both.describe(2), both.describe(3)) == ('example 2', 'example 0')


def test_classes_are_kept_and_renumbered_in_the_order_given():
    whole = open_source('digits', split='all')
    some = open_source('digits', split='all', classes=('7', '1'))
    assert some.class_names == ('7', '1')
    assert len(some) == np.isin(whole.labels, [1, 7]).sum()
    expected = [i for i in range(len(whole)) if whole.labels[i] in (1, 7)]
    for k in (0, 5, len(some) - 1):
        image, label = whole[expected[k]]
        assert np.array_equal(some[k][0], image)
        assert some.class_names[some[k][1]] == str(label)
    assert some.fingerprint != whole.fingerprint
    assert some.fingerprint != open_source('digits', split='all', classes=('1', '7')).fingerprint


def test_slices_of_some_classes_are_of_them_alone():
    part = open_source('digits', split='train[:100]', classes=('4', '9'))
    assert np.bincount(part.labels).tolist() == [50, 50]


def test_a_class_that_is_not_there_or_twice_is_named():
    with pytest.raises(UserError, match="names 'seven'"):
        open_source('digits', split='all', classes=('1', 'seven'))
    with pytest.raises(UserError, match='twice'):
        open_source('digits', split='all', classes=('1', '1'))


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(0, 9), st.data())
def test_seeds_draw_disjoint_parts_while_there_are_any_and_never_what_is_held_out(
    labels, validation, data
):
    labels = np.array(labels, np.int32)
    assume(validation < len(labels))
    rest = len(labels) - validation
    count = data.draw(st.integers(1, rest))
    held = {*held_out(labels, validation)}
    assert len(held) == validation
    seen = set()
    for seed in range(rest // count + 3):
        rows = drawn(labels, count, seed, validation)
        assert len({*rows}) == len(rows) == count
        assert not held & {*rows}
        if seed < rest // count:
            assert not seen & {*rows}
            seen |= {*rows}
        np.testing.assert_array_equal(rows, drawn(labels, count, seed, validation))
    assert {*drawn(labels, 0, 5, validation)} == {*range(len(labels))} - held


def test_a_seed_draws_each_class_in_proportion():
    labels = np.repeat(np.arange(4, dtype=np.int32), 250)
    for seed in (0, 3, 7, 8, 1000):  # 7 whole parts of 125 are there
        counts = np.bincount(labels[drawn(labels, 125, seed, 50)], minlength=4)
        assert counts.max() - counts.min() <= 3


def test_more_than_there_is_cannot_be_drawn():
    labels = np.zeros(10, np.int32)
    with pytest.raises(UserError, match='subset asks for 8 of 10 training images, of which 3 are'):
        drawn(labels, 8, 0, 3)
    with pytest.raises(UserError, match='validation asks for 11'):
        held_out(labels, 11)
