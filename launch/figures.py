"""Draw the figures of docs/regularizers.md; all that they show is computed by this package.

python -m launch.figures --out=docs

Stride, padding, dropout masks, activations before and after batch normalization (of a net that is
trained for this, a few seconds), and what fine-tuning VGG16 trains (no weights are needed).
"""

import functools
import itertools
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from launch import cli

OUT = cli.define_path('out', 'Folder of the PNGs.', required=True)

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, SKY, GREY = '#0072B2', '#E69F00', '#009E73', '#56B4E9', '#999999'

PADDINGS = ('VALID', 'SAME', 'SAME_TORCH', 'REFLECT', 'CIRCULAR')


def main(_) -> int:
    """Draw; returns the exit code."""
    cli.start()
    from cnn_jax.files import make_writable
    from cnn_jax.tools.figures import save

    folder = Path(OUT.value)
    make_writable(folder, 'the folder of the figures', '--out')
    for draw in (draw_stride, draw_padding, draw_dropout, draw_batch_norm, draw_fine_tuning):
        path = folder / f'{draw.__name__.removeprefix("draw_")}.png'
        save(draw(), path, dpi=100)
        print(path)
    return cli.OK


def padded(padding: str, size: int = 4, kernel: int = 3, stride: int = 2):
    """An image of the numbers 1, 2, … as a convolution pads it; where it is itself; output size."""
    import numpy as np

    from cnn_jax.nn.padding import output_shape, resolve_padding

    image = np.arange(1, size * size + 1).reshape(size, size)
    pads = resolve_padding(padding, size, kernel, stride)
    modes: dict[str, Any] = {'REFLECT': 'reflect', 'CIRCULAR': 'wrap'}
    inside = np.pad(np.ones((size, size), bool), pads)
    whole = np.pad(image, pads, mode=modes.get(padding, 'constant'))
    return whole, inside, output_shape(size, kernel, stride, padding=padding)


def norm_activations(steps: int = 100, layer: str = 'block2_norm1'):
    """The input and output of a batch norm in a trained small net, [examples·h·w, channels].

    The net is trained on the digits of scikit-learn; the batch is one of its training batches.
    """
    import flax.linen as nn
    import jax
    import numpy as np

    from cnn_jax.train import setup
    from cnn_jax.train.program import make_program, state_maker, traced_values
    from cnn_jax.train.step import train_step

    config = cfg.Config(
        model=cfg.Model(stem_width=0, widths=(8, 12), hidden=(32,)),
        data=cfg.Data(source='digits', batch=64),
        optimizer=cfg.Optimizer(learning_rate=3e-3),
    )
    data = setup.open_data(config)
    program = make_program(config, setup.make_spec(config, data.description))
    state, train = state_maker(program)(0), jax.jit(functools.partial(train_step, program))
    for batch in itertools.islice(data.train.train(), steps):
        state, _ = train(state, batch, traced_values(config))

    seen = {}

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name == layer:
            seen['before'], seen['after'] = args[0], y
        return y

    with nn.intercept_methods(record):
        program.spec.network(config).apply(
            {'params': state.params, 'batch_stats': state.batch_stats},
            program.spec.prepare(batch['image']),
            train=True,
            rngs={'dropout': jax.random.key(0)},
            mutable=['batch_stats'],
        )
    own = state.params[layer]
    normalized = (seen['after'] - own['bias']) / own['scale']
    return tuple(np.asarray(x).reshape(-1, x.shape[-1]) for x in (seen['before'], normalized))


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def grid(axes, numbers, inside=None, colour: str = SKY) -> None:
    """A table of numbers; those outside, if some are, on grey."""
    import numpy as np
    from matplotlib.colors import to_rgba

    inside = np.ones(numbers.shape, bool) if inside is None else inside
    axes.imshow(np.where(inside[..., None], to_rgba(colour, 0.3), to_rgba(GREY, 0.35)))
    for (row, column), number in np.ndenumerate(numbers):
        style = 'black' if inside[row, column] else '#444444'
        axes.text(column, row, f'{number:g}', ha='center', va='center', fontsize=9, color=style)
    height, width = numbers.shape
    axes.set_xticks(np.arange(-0.5, width), [])
    axes.set_yticks(np.arange(-0.5, height), [])
    axes.grid(color='white', linewidth=1.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def box(axes, row: float, column: float, side: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner, style = (column - 0.5, row - 0.5), {'linewidth': 2.5, 'clip_on': False}
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, zorder=3, **style))


def draw_stride():
    """Two windows of the input and their sums in the output, at stride 1 and 2."""
    import jax.numpy as jnp
    import numpy as np

    from cnn_jax.nn.conv import conv2d

    image = np.add.outer(np.arange(7), 2 * np.arange(7)) % 5
    x, ones = jnp.asarray(image, jnp.float32)[None, ..., None], jnp.ones((3, 3, 1, 1))
    figure = new_figure(7.6, 4.6)
    for left, right, stride in zip(*figure.subplots(2, 2).T, (1, 2)):
        output = np.asarray(conv2d(x, ones, stride=stride, padding='VALID'))[0, ..., 0]
        grid(left, image)
        grid(right, output, colour=ORANGE)
        for place, colour in ((0, BLUE), (1, '#D55E00')):
            box(left, 0, place * stride, 3, colour)
            box(right, 0, place, 1, colour)
        for axes in (left, right):  # a cell has one size
            axes.set(xlim=(-0.6, 6.6), ylim=(6.6, -0.6))
        left.set_title('input 7×7, windows 3×3', fontsize=10)
        right.set_title(f'stride {stride}: sums {"×".join(map(str, output.shape))}', fontsize=10)
    return figure


def draw_padding():
    """A 4×4 image as each padding extends it for a 3×3 kernel at stride 2."""
    figure = new_figure(11, 3.1)
    for axes, padding in zip(figure.subplots(1, len(PADDINGS)), PADDINGS):
        numbers, inside, output = padded(padding)
        grid(axes, numbers, inside)
        row, column = next(zip(*inside.nonzero()))
        axes.set(xlim=(column - 1.6, column + 4.6), ylim=(row + 4.6, row - 1.6))
        axes.set_title(f'{padding}\n4×4 → {"×".join(map(str, output))}', fontsize=10)
    figure.supxlabel('3×3 kernel, stride 2; grey: added pixels', fontsize=10)
    return figure


def draw_dropout():
    """Masks of three kinds of dropout: the same for the same seed and step, else others."""
    import jax.numpy as jnp
    import numpy as np

    from cnn_jax import rng
    from cnn_jax.nn.noise import channel_dropout, drop_block, dropout

    figure, ones = new_figure(8.4, 5.6), jnp.ones((1, 12, 12, 4))
    moments = ((0, 0), (0, 1), (0, 2), (0, 1), (1, 1))
    block = functools.partial(drop_block, side=3)
    kinds = {'element': dropout, 'channel': channel_dropout, 'block': block}
    for row, (kind, drop) in zip(figure.subplots(3, len(moments)), kinds.items()):
        for number, (axes, (seed, step)) in enumerate(zip(row, moments)):
            kept = drop(rng.key(seed, 'dropout', step), ones, 0.3)
            a, b, c, d = np.moveaxis(np.asarray(kept)[0] > 0, -1, 0)
            axes.imshow(np.block([[a, b], [c, d]]), cmap='cividis', vmin=0, vmax=1)
            axes.axhline(11.5, color='white', linewidth=2)
            axes.axvline(11.5, color='white', linewidth=2)
            axes.set(xticks=[], yticks=[])
            if kind == 'element':
                again = ' again' if number == 3 else ''
                axes.set_title(f'seed {seed}, step {step}{again}', fontsize=10)
        row[0].set_ylabel(kind, fontsize=10)
    figure.supxlabel('dark: dropped (rate 0.3) of four channels of 12×12', fontsize=10)
    return figure


def draw_batch_norm():
    """Each channel of a trained net, before and after normalization."""
    import numpy as np

    figure = new_figure(8.4, 3.4)
    titles = ('before batch norm (after the ReLU)', 'after it, before scale and shift')
    for axes, title, x, colour in zip(
        figure.subplots(1, 2, sharey=True), titles, norm_activations(), (BLUE, ORANGE)
    ):
        channels, mean, deviation = np.arange(x.shape[1]), x.mean(0), x.std(0)
        spread = np.abs(np.percentile(x, (5, 95), axis=0) - mean)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.errorbar(channels, mean, spread, fmt='o', color=colour, capsize=4)
        span = f'{deviation.min():.2f} to {deviation.max():.2f}'
        axes.set_title(f'{title}\ndeviations {span}', fontsize=10)
        axes.set(xlabel='channel (dot: mean, line: 5 to 95%)', xticks=channels)
    figure.axes[0].set_ylabel('activation')
    return figure


def draw_fine_tuning():
    """VGG16's layers by their parameters: frozen or trained, in two phases."""
    from matplotlib.patches import Patch

    from cnn_jax import params
    from cnn_jax.models import build
    from cnn_jax.summary import layers

    model = cfg.Model(name='vgg16', outputs=1, hidden=(1024,), head_norm='none')
    rows = [row for row in layers(build(model, 2), (224, 224, 3)) if row.parameters]
    names, sizes = [row.path for row in rows], [row.parameters for row in rows]
    figure = new_figure(9.2, 4.6)
    phases = ('backbone/*',), ('backbone/block[1-4]*',)
    for number, (axes, frozen) in enumerate(zip(figure.subplots(1, 2, sharey=True), phases), 1):
        trained = params.trainable(names, frozen)
        colours = [ORANGE if name in trained else SKY for name in names]
        axes.barh(range(len(names)), sizes, color=colours)
        axes.set(xscale='log', xlabel='parameters', xlim=(3e2, 1e8))
        axes.set_yticks(range(len(names)), names, fontsize=9)
        total = sum(size for name, size in zip(names, sizes) if name in trained)
        axes.set_title(f'phase {number}: {total:,} of {sum(sizes):,} trained', fontsize=10)
        axes.grid(axis='x', alpha=0.3)
    figure.axes[0].invert_yaxis()
    patches = [Patch(color=SKY, label='frozen'), Patch(color=ORANGE, label='trained')]
    figure.legend(handles=patches, loc='outside lower center', ncols=2)
    return figure


if __name__ == '__main__':
    cli.run(main)
