"""Draw training images beside their augmented versions, as the network gets them.

  python -m launch.show_batch --config=experiments/small.py --out=batch.png
  python -m launch.show_batch --config=experiments/small.py --out=batch.png \\
      --config.augment.cutmix=1 --steps=4 --images=6

Nothing is trained. Each pair of columns is one step: the images, in the order and with the
augmentation that a run of the same config and seed has at that step. A mixed image bears both
labels with their weights.
"""

from pathlib import Path
from typing import Any

from absl import flags

from cnn_jax.errors import UserError
from launch import cli

CONFIG = cli.define_config()
OUT = cli.define_path('out', 'PNG to write.', required=True)
STEPS = flags.DEFINE_integer('steps', 4, 'Number of steps, from --first on.', lower_bound=1)
FIRST = flags.DEFINE_integer('first', 0, 'First step.', lower_bound=0)
IMAGES = flags.DEFINE_integer('images', 6, 'Number of images of each batch.', lower_bound=1)

MOST = 16  # columns and rows beyond which nothing is legible


def main(_) -> int:
    """Draw; returns the exit code."""
    config, components = cli.read_experiment(CONFIG)
    if STEPS.value > MOST or IMAGES.value > MOST:
        raise UserError(f'--steps and --images can be at most {MOST}; more would not be legible')
    cli.start(config.train.threads)

    from cnn_jax.files import make_writable

    path = Path(OUT.value)
    make_writable(path.parent, 'the folder of the picture', '--out')
    columns, class_names = shown_batches(config, components, FIRST.value, STEPS.value, IMAGES.value)
    draw(columns, class_names, path)
    print(f'{STEPS.value} steps of {config.data.source} in {path}')
    return cli.OK


def shown_batches(
    config, components, first: int, steps: int, count: int
) -> tuple[list[dict[str, Any]], Any]:
    """The first examples of some training batches, before and after augmentation.

    Returns:
        For each step `step`, `image` (uint8), `shown` (what the network gets, as pixels in 0…1),
        `label`, `other_label`, `share`; and the names of the classes.
    """
    import itertools

    import jax
    import numpy as np

    from cnn_jax import rng
    from cnn_jax.data.augment import augment_and_normalize, mix
    from cnn_jax.features import views_at
    from cnn_jax.train import setup

    data = setup.open_data(config, None, components)
    batches, augment = data.train, config.augment
    prepare = setup.preparation(data.description['preprocessing'])

    @jax.jit
    def seen(batch, step):
        key, index, label = rng.key(config.seed, 'augment', step), batch['index'], batch['label']
        images = augment_and_normalize(augment, key, batch['image'], index, prepare)
        mixed = images, label, np.ones(label.shape, np.float32)
        if augment.mixup or augment.cutmix:
            mixed = mix(augment, key, images, label, index)
        return dict(zip(('shown', 'other_label', 'share'), mixed))

    spec = setup.make_spec(config, data.description, data.weights, components)
    cached = config.features.views and setup.make_programs(config, spec)[0].cached
    views = config.features.views if cached else 0

    def drawn(batch, step):
        """Augmented images of a step: of its own key, or of the cached view of its epoch."""
        if not views:
            return seen(batch, step)
        size = config.data.batch
        view = views_at(step * size, size, batches.n, views).tolist()
        kept = {each: seen(batch, each) for each in set(view)}
        return {
            name: np.stack([kept[each][name][i] for i, each in enumerate(view)])
            for name in kept[view[0]]
        }

    columns = []
    for number, batch in enumerate(itertools.islice(batches.train(first), steps), start=first):
        column = {'image': batch['image'], 'label': batch['label'], **drawn(batch, number)}
        column = {name: np.asarray(x)[:count] for name, x in column.items()}
        column['shown'] = unprepared(column['shown'], prepare, batches.image_shape[-1])
        columns.append(column | {'step': number})
    return columns, batches.class_names


def unprepared(x, prepare, channels: int):
    """Normalized images as pixels in 0…1: normalization is y = M·pixel + b, inverted here."""
    import jax.numpy as jnp
    import numpy as np

    probes = np.zeros((1, 1, channels + 1, channels), np.uint8)
    probes[0, 0, 1:] = 255 * np.eye(channels)
    origin, *ends = np.asarray(prepare(jnp.asarray(probes)))[0, 0]
    pixels = (x - origin) @ np.linalg.pinv(np.stack(ends) - origin)
    return np.clip(pixels, 0, 1)


def draw(columns: list[dict[str, Any]], class_names: Any, path: Path) -> None:
    """Draw a pair of columns for each step, an image a row: original and augmented."""
    from cnn_jax.tools.figures import new_figure, save

    rows = len(columns[0]['label'])
    figure = new_figure(2.9 * len(columns), 1.55 * rows + 0.5)
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns):
        part.suptitle(f'step {column["step"]}', fontsize=10)
        for row, (left, right) in enumerate(part.subplots(rows, 2, squeeze=False)):
            pictures = column['image'][row] / 255, column['shown'][row]
            titles = class_names[column['label'][row]], label_text(column, row, class_names)
            for axes, picture, title in zip((left, right), pictures, titles):
                grey = picture.shape[-1] == 1
                axes.imshow(picture[..., 0] if grey else picture, cmap='gray', vmin=0, vmax=1)
                axes.set_title(title, fontsize=8, parse_math=False)
                axes.set_axis_off()
    save(figure, path, dpi=100)


def label_text(column: dict[str, Any], row: int, class_names: Any) -> str:
    """`7`, or `0.62 × 7 + 0.38 × 2` where two images were mixed."""
    own, share = class_names[column['label'][row]], float(column['share'][row])
    other = class_names[column['other_label'][row]]
    return own if share == 1 else f'{share:.2f} × {own} + {1 - share:.2f} × {other}'


if __name__ == '__main__':
    cli.run(main)
