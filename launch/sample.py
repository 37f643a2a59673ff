"""Write a few images of a source as PNG files named by their class, to try launch.predict on.

python -m launch.sample --source=mnist_5k --count=6 --out=runs/images
python -m launch.sample --source=mnist_5k --classes=4,9 --out=runs/images
"""

from pathlib import Path

from absl import flags

from launch import cli

SOURCE = flags.DEFINE_string('source', 'mnist_5k', 'A source, as in config.data.source.')
SPLIT = flags.DEFINE_string('split', 'test', 'A split of the source.')
COUNT = flags.DEFINE_integer('count', 6, 'Number of images.', lower_bound=1)
CLASSES = flags.DEFINE_list('classes', [], 'Only images of these classes.')
OUT = cli.define_path('out', 'Folder to write to.', required=True)


def main(_) -> int:
    """Write the images; returns the exit code."""
    from PIL import Image

    from cnn_jax.config import Data
    from cnn_jax.data.sources import open_split
    from cnn_jax.files import make_writable

    data = Data(source=SOURCE.value, eval=SPLIT.value, classes=tuple(CLASSES.value))
    source = open_split(data, 'eval')
    folder = Path(OUT.value)
    make_writable(folder, 'the folder for the images', '--out')
    chosen = range(0, len(source), max(1, len(source) // COUNT.value))[: COUNT.value]
    for i in chosen:
        image, label = source[i]
        name = source.class_names[label].replace('/', '_')  # a table's may be any text
        path = folder / f'{i:05d}_{name}.png'
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    print(f'{len(chosen)} images of {source.name} in {folder}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main)
