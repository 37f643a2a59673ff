"""The arithmetic of sliding windows: how much a layer pads, how large its output is."""

from collections.abc import Sequence

import numpy as np

from cnn_jax.errors import UserError

Pair = tuple[int, int]
Size = int | Sequence[int]  # one number stands for two equal ones
Padding = str | int | Sequence[Pair]

NAMES = ('VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT')


def pair(value: Size) -> Pair:
    """`(value, value)` for a number; two numbers as they are."""
    vertical, horizontal = (value, value) if isinstance(value, (int, np.integer)) else value
    return int(vertical), int(horizontal)


def resolve_padding(
    padding: Padding,
    size: Size,
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    *,
    layer: str = 'conv2d',
) -> tuple[Pair, Pair]:
    """The pixels added before and after each axis, for any way of stating the padding.

    With e = d·(k−1) + 1, what a kernel of k taps spans at dilation d, an axis of n pixels gets

    - VALID: none;
    - SAME: max((⌈n/s⌉ − 1)·s + e − n, 0) in all, the smaller half first, so that the output
      has ⌈n/s⌉ pixels (TensorFlow's rule: with a stride the two sides may differ);
    - SAME_TORCH, CIRCULAR, REFLECT: e − 1 in all, the smaller half first, whatever the stride;
    - a number p: p on each side; pairs ((lo, hi), (lo, hi)): as given.

    Args:
        padding: One of `NAMES`, a number, or a pair of numbers for each axis.
        size: Height and width of the input, in pixels; one number stands for two equal ones, here
            and in the arguments that follow.
        kernel_size: Taps of the kernel.
        stride: Pixels between neighbouring windows.
        dilation: Pixels between neighbouring taps.
        layer: Name of the window's layer, for errors.

    Returns:
        ((top, bottom), (left, right)).

    Errors:
        UserError: The padding is unknown, the kernel spans more than the padded input, or
            REFLECT or CIRCULAR ask for more pixels than the input has to give.

    Source: TensorFlow's "Notes on padding"; PyTorch's `Conv2d(padding='same')`.

    >>> nn.resolve_padding('SAME', 8, 3, stride=2), nn.resolve_padding('SAME_TORCH', 8, 3, stride=2)
    (((0, 1), (0, 1)), ((1, 1), (1, 1)))
    """
    size, spare = pair(size), None  # the pixels that the padding may not take from the input
    extent = tuple(d * (k - 1) + 1 for k, d in zip(pair(kernel_size), pair(dilation)))
    if isinstance(padding, str):
        if padding not in NAMES:
            raise UserError(f'{layer}: padding is {padding!r}; it can be {", ".join(NAMES)}')
        pads = tuple(_named(padding, *axis) for axis in zip(size, extent, pair(stride)))
        spare = {'REFLECT': 1, 'CIRCULAR': 0}.get(padding)
    else:
        number = isinstance(padding, (int, np.integer))
        pads = tuple(map(pair, (padding, padding) if number else padding))
    if spare is not None and any(max(p) > n - spare for n, p in zip(size, pads)):
        raise UserError(
            f'{layer}: {padding} padding of {_by(map(max, pads))} pixels needs more than its '
            f'{_by(size)} input has; use a larger input, a smaller kernel or SAME'
        )
    padded = tuple(n + lo + hi for n, (lo, hi) in zip(size, pads))
    if any(e > n for e, n in zip(extent, padded)):
        raise UserError(
            f'{layer}: a kernel that spans {_by(extent)} pixels does not fit its input of '
            f'{_by(size)}, padded to {_by(padded)}; use a larger input, a smaller kernel or '
            'more padding'
        )
    return pads[0], pads[1]


def output_shape(
    size: Size,
    kernel_size: Size,
    stride: Size = 1,
    dilation: Size = 1,
    padding: Padding = 'SAME',
    *,
    layer: str = 'conv2d',
) -> Pair:
    """Height and width of the output of a sliding window: the number of its positions.

    ⌊(n + lo + hi − d·(k−1) − 1) / s⌋ + 1 an axis. Arguments and errors as `resolve_padding`.

    >>> nn.output_shape(7, 3, stride=1, padding='VALID'), nn.output_shape(7, 3, 2, padding='VALID')
    ((5, 5), (3, 3))
    """
    pads = resolve_padding(padding, size, kernel_size, stride, dilation, layer=layer)
    axes = zip(pair(size), pair(kernel_size), pair(stride), pair(dilation), pads)
    height, width = ((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in axes)
    return height, width


def _named(padding: str, size: int, extent: int, stride: int) -> Pair:
    of_same = max((-(-size // stride) - 1) * stride + extent - size, 0)
    total = {'VALID': 0, 'SAME': of_same}.get(padding, extent - 1)
    return total // 2, total - total // 2


def _by(numbers) -> str:
    return '×'.join(str(n) for n in numbers)
