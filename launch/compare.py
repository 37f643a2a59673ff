"""Draw what regularizers buy against the number of training images, from several ablations.

  python -m launch.compare --out=atlas.png runs/atlas_200 runs/atlas_1000 runs/atlas_5000

A saved `summary.json` works in place of its work directory. Every arm has a panel: its difference
from its control, with simultaneous intervals, filled where it is decided; the other arms in grey.
"""

from pathlib import Path

from absl import flags

from cnn_jax.errors import UserError
from cnn_jax.files import local_path
from launch import cli

OUT = cli.define_path('out', 'The PNG to write.', required=True)
MEASURE = flags.DEFINE_enum(
    'measure',
    'loss',
    ['accuracy', 'loss', 'calibration_error', 'top5'],
    'The primary measure of the ablations that is drawn; loss: negative log-likelihood.',
)


def main(arguments: list[str]) -> int:
    """Draw; returns the exit code."""
    folders = [Path(local_path(each, 'a work directory')) for each in arguments[1:]]
    if not folders:
        raise UserError('no ablation; give the work directories of launch.ablate')

    from cnn_jax.ablation.figures import draw_against_n
    from cnn_jax.files import make_writable
    from cnn_jax.tools.figures import save

    figure, path = draw_against_n(folders, MEASURE.value), Path(OUT.value)
    make_writable(path.parent, 'the folder of the picture', '--out')
    save(figure, path, dpi=200)
    print(f'written: {path}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main, takes_words=True)
