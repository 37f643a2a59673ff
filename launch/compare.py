"""Draw what several ablations found into one picture, data set beside data set.

  python -m launch.compare --out=compared.png runs/noise runs/noise_fashion runs/penalties

Experiments stand one below the other; the same experiment on other training images stands in
another column. A row is an arm: its difference from the baseline for each seed, their mean, and
the 95% interval of it.
"""

from pathlib import Path

from cnn_jax.errors import UserError
from cnn_jax.files import local_path
from launch import cli

OUT = cli.define_path('out', 'The PNG to write.', required=True)


def main(arguments: list[str]) -> int:
    """Draw; returns the exit code."""
    folders = [Path(local_path(each, 'a work directory')) for each in arguments[1:]]
    if not folders:
        raise UserError('no ablation; give the work directories of launch.ablate')

    from cnn_jax.ablation.figures import draw_side_by_side
    from cnn_jax.files import make_writable
    from cnn_jax.tools.figures import save

    figure, path = draw_side_by_side(folders), Path(OUT.value)
    make_writable(path.parent, 'the folder of the picture', '--out')
    save(figure, path, dpi=100)
    print(f'written: {path}')
    return cli.OK


if __name__ == '__main__':
    cli.run(main, takes_words=True)
