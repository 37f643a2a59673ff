"""`resolve_padding` and `output_shape` against windows slid by hand over a NumPy array."""

import itertools

import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.nn.padding import output_shape, resolve_padding

MODES = {'CIRCULAR': 'wrap', 'REFLECT': 'reflect'}


def count_windows(size, kernel, stride, dilation, before, after):
    """Positions at which every tap of the kernel lies in the padded row."""
    row = np.pad(np.arange(size), (before, after))
    starts = range(0, len(row), stride)
    return sum(start + dilation * (kernel - 1) < len(row) for start in starts)


def tensorflow_same(size, kernel, stride, dilation):
    """The least padding that makes ⌈size/stride⌉ windows fit, the odd pixel at the end."""
    wanted = len(range(0, size, stride))
    for total in itertools.count():
        if count_windows(size, kernel, stride, dilation, 0, total) >= wanted:
            return total // 2, total - total // 2
    raise AssertionError


def torch_same(size, kernel, dilation):
    """The padding that keeps the size at stride 1, the odd pixel at the end."""
    for total in itertools.count():
        if count_windows(size, kernel, 1, dilation, 0, total) == size:
            return total // 2, total - total // 2
    raise AssertionError


def expected_padding(padding, size, kernel, stride, dilation):
    if padding == 'VALID':
        return 0, 0
    if padding == 'SAME':
        return tensorflow_same(size, kernel, stride, dilation)
    if padding in ('SAME_TORCH', *MODES):
        return torch_same(size, kernel, dilation)
    return (padding, padding) if isinstance(padding, int) else padding[0]


def is_possible(padding, size, before, after):
    """Whether the mode pads with pixels of the image, none twice, the edge not mirrored."""
    if padding not in MODES:
        return True
    padded = np.pad(np.arange(size), (before, after), mode=MODES[padding]).tolist()
    left, right = padded[:before], padded[before + size :]
    if padding == 'REFLECT':
        left, right = [0, *left], [size - 1, *right]
    return all(len(set(side)) == len(side) for side in (left, right))


PADDINGS = ['VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT', 1, 2, ((0, 1), (0, 1))]


@pytest.mark.parametrize('padding', PADDINGS, ids=str)
def test_agrees_with_sliding_a_window(padding):
    """8 sizes × 6 kernels × 3 strides × 3 dilations, odd and even: 432 cases a padding."""
    cases = list(itertools.product(range(1, 9), range(1, 7), (1, 2, 3), (1, 2, 3)))
    assert len(cases) == 432
    refused = 0
    for size, kernel, stride, dilation in cases:
        before, after = expected_padding(padding, size, kernel, stride, dilation)
        count = count_windows(size, kernel, stride, dilation, before, after)
        if count and is_possible(padding, size, before, after):
            pads = resolve_padding(padding, size, kernel, stride, dilation)
            assert pads == ((before, after), (before, after))
            assert output_shape(size, kernel, stride, dilation, padding) == (count, count)
        else:
            refused += 1
            with pytest.raises(UserError):
                output_shape(size, kernel, stride, dilation, padding)
    assert (refused == 0) == (padding in ('SAME', 'SAME_TORCH'))


def test_an_unknown_padding_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'same'.*VALID, SAME, SAME_TORCH, CIRCULAR, REFLECT"):
        resolve_padding('same', 8, 3)
