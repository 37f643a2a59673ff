"""Classify image files, or the image files in folders.

  python -m launch.predict --workdir=runs/small digit.png more/digits
  python -m launch.predict --workdir=runs/small --json digit.png
  python -m launch.predict --workdir=runs/mine --heatmaps=maps photo.jpg
  python -m launch.predict --workdir=runs/small --mc=30 digit.png
  python -m launch.predict --model=efficientnet_lite0 photo.jpg

With --model a published network tells ImageNet's 1,000 classes apart; its weights and the names of
the classes are fetched when they are first needed.

With --mc the network predicts that many times with dropout on; the mean is printed with its
entropy and with the mutual information of prediction and dropout, which measures how much the
draws disagree.

Images are brought to the network's size as in training, and a line is printed for each as soon as
its batch is done; Ctrl-C keeps what was printed. A file that cannot be read is reported and the
others are classified; the exit code is 1 when none could be.
"""

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from cnn_jax import runtime
from cnn_jax.errors import UserError
from launch import cli

if TYPE_CHECKING:  # else --help would wait for JAX
    from cnn_jax.train.run import Run

WORKDIR = cli.define_path('workdir', 'Folder of a run of launch.train, or its gs:// URL.', url=True)
MODEL = flags.DEFINE_enum(
    'model', None, ['efficientnet_lite0'], 'A published network, in place of a run.'
)
JSON = flags.DEFINE_bool('json', False, 'Print JSON, one object per line.')
TOP = flags.DEFINE_integer('top', 3, 'Number of classes to print for each image.', lower_bound=1)
MC = flags.DEFINE_integer(
    'mc', 0, 'Draws of Monte-Carlo dropout; 0 predicts once, without dropout.', lower_bound=0
)
CHECKPOINT = cli.define_checkpoint()

HEATMAPS = cli.define_path(
    'heatmaps', 'Folder for PNGs of the evidence for the predicted class (Grad-CAM).'
)


def main(arguments: list[str]) -> int:
    """Predict; returns the exit code."""
    if bool(WORKDIR.value) == bool(MODEL.value) or (MODEL.value and CHECKPOINT.value):
        raise UserError(
            'give either --workdir=FOLDER of a run, perhaps with --checkpoint, or --model=NAME of '
            'a published network'
        )
    runtime.configure()  # before JAX is imported

    from tqdm import tqdm

    from cnn_jax.files import make_writable
    from cnn_jax.tools import predict

    paths = predict.image_paths(arguments[1:], functools.partial(print, file=sys.stderr))
    maps = Path(HEATMAPS.value) if HEATMAPS.value else None
    if maps:
        make_writable(maps, 'the folder for heat maps', '--heatmaps')
    run = opened()
    draw = predict.heatmap_drawer(run, maps) if maps else None
    read = drawn = 0
    rows = predict.predict_files(run, paths, draws=MC.value, top=TOP.value)
    shown = sys.stderr.isatty() and not sys.stdout.isatty()  # else the lines show how far it is
    for row in tqdm(rows, total=len(paths), disable=not shown):
        if JSON.value:
            print(json.dumps(row.as_json()), flush=True)
        else:
            print(row.as_text(), file=sys.stderr if row.error else sys.stdout, flush=True)
        read += not row.error
        if draw:
            drawn += draw(row)
    if maps:
        print(f'{drawn} heat maps in {maps}', file=sys.stderr)
    return cli.OK if read else cli.FAILED


def opened() -> 'Run':
    """The run, or the published network, whose licence is printed."""
    from cnn_jax.pretrained.weights import PUBLISHED
    from cnn_jax.tools.published import NAMES_LICENCE, published_run
    from cnn_jax.train.run import load_run

    if not MODEL.value:
        return load_run(WORKDIR.value, CHECKPOINT.value)
    weights = PUBLISHED[MODEL.value]
    print(f'{weights.name}: {weights.licence}; class names: {NAMES_LICENCE}', file=sys.stderr)
    return published_run(MODEL.value)


if __name__ == '__main__':
    cli.run(main, takes_words=True, ends_unread=True)
