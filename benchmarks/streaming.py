"""Streaming: memory against the size of the source, and how long the device waits for images.

  python -m benchmarks.streaming --out=benchmarks/RESULTS.md

A source of random access computes its 224×224×3 images from their position, so 20 GB of them need
no disk. Processes of their own read an epoch of 2 GB and one of 20 GB in random order through
`data.batches.StreamBatches`, for `--seconds` at most, and say how much was read. Three more
train a net with `cnn_jax.fit`: on the computed images, and on JPEGs decoded at each step.
"""

import argparse
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cli, contest, results

SHAPE = (224, 224, 3)
BATCH = 64
CLASSES = tuple('0123456789')
STEMS = {'small': (7, 2), 'tiny': (16, 16)}  # nets, by the first convolution's kernel and stride
STEPS = 45  # of training, after each third of which there is an evaluation
SAMPLES = 5  # of memory while an epoch is read
TRAINED = {
    'train,computed,small': ('computed from the position', 'small'),
    'train,JPEG,small': ('JPEG of 500×375, decoded and cropped', 'small'),
    'train,JPEG,tiny': ('JPEG of 500×375, decoded and cropped', 'tiny'),
}


def main() -> None:
    """Measure, and print and keep what was seen; or be one of the processes that do."""
    parser = cli.parser('benchmarks.streaming', __doc__)
    parser.add_argument('--seconds', type=float, default=60, help='of reading each source (60)')
    parser.add_argument('--child', help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, *arguments = given.child.split(',')
        found = read(float(*arguments), given.seconds) if kind == 'read' else train(*arguments)
        print(json.dumps(found))
        return
    command = [sys.executable, '-m', 'benchmarks.streaming', f'--seconds={given.seconds}']
    seen = {}
    for child in ('read,2', 'read,20', *TRAINED):
        print(f'{child} …', file=sys.stderr)
        _, mebibytes, text = contest.timed([*command, f'--child={child}'], {})
        seen[child] = json.loads(text.splitlines()[-1]) | {'peak': mebibytes * 2**20 / 1e6}
    cli.publish('Streaming', section(seen), given.out)


def section(seen: dict[str, dict[str, Any]]) -> str:
    """What the processes told, as Markdown."""
    reading = [seen['read,2'], seen['read,20']]
    small, large = reading
    rows = [
        [
            f'{each["images"] * math.prod(SHAPE) / 1e9:.0f} GB, {each["images"]:,} images',
            f'{each["read"]:,} ({each["read"] / each["images"]:.0%})',
            f'{each["speed"]:,.0f}',
            ', '.join(f'{megabytes:,.0f}' for megabytes in each['memory']),
            f'{each["peak"]:,.0f}',
        ]
        for each in reading
    ]
    header = ('source', 'images read', 'images/s', 'memory at intervals, MB', 'peak, MB')
    trained = [
        [*text, f'{seen[child]["speed"]:,.0f}', f'{seen[child]["share"]:.0%}']
        for child, text in TRAINED.items()
    ]
    return f"""{results.conditions('jaxlib', 'grain')}

Images of 224×224×3 in batches of {BATCH}, in random order; the machine's load average was
{os.getloadavg()[0]:.1f} at the end. In what was read of an epoch no example came twice, and the
first image of every batch was compared with its own. Ten times the images take
{large['peak'] - small['peak']:+,.0f} MB at the peak; of what there is for every image (label, place
in the epoch, and the draws that are ranked for it: 24 bytes) there are
{24 * (large['images'] - small['images']) / 1e6:.1f} MB more.

{results.table(header, rows)}

{STEPS} steps of a net that begins with a 7×7 convolution of stride 2 (small) or a 16×16 one of
stride 16 (tiny), with an evaluation after each third. The share of the time in which the device
stood idle because the next batch was not there is that of the last two thirds.

{results.table(('images', 'net', 'images/s', 'waited'), trained)}
"""


def computed(count: int) -> Any:
    """A source whose images are drawn anew whenever they are read."""
    return _source(count, pixels, SHAPE)


def pixels(i: int) -> np.ndarray:
    """Image `i`: noise keyed by its position."""
    words = np.random.Philox(key=i).random_raw(-(-math.prod(SHAPE) // 8))
    return words.view(np.uint8)[: math.prod(SHAPE)].reshape(SHAPE)


def photographs(count: int) -> Any:
    """A source that decodes a JPEG whenever an image is read."""
    from PIL import Image

    files = []
    for seed in range(8):
        coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((500, 375)).save(file, 'JPEG', quality=90)
        files.append(file.getvalue())

    def decode(i: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(files[i % len(files)])).convert('RGB'))

    return _source(count, decode, (375, 500, 3))


def _source(count: int, decode: Any, shape: tuple[int, ...]) -> Any:
    from cnn_jax.data.source import Source

    return Source(
        name='generated',
        class_names=CLASSES,
        labels=np.arange(count, dtype=np.int32) % len(CLASSES),
        sizes=np.broadcast_to(np.array(shape[:2], np.int32), (count, 2)),
        channels=3,
        read=decode,
        describe=str,
        fingerprint=f'generated {count}',
    )


def read(gigabytes: float, seconds: float) -> dict[str, Any]:
    """Read an epoch of a computed source (10⁹ bytes), or what of it there is time for."""
    from cnn_jax import runtime

    runtime.configure()

    from cnn_jax.data.batches import StreamBatches

    count = round(gigabytes * 1e9 / math.prod(SHAPE))
    stream = StreamBatches(computed(count), batch=BATCH)
    times = np.zeros(count, np.uint8)
    steps = count // BATCH
    began, memory = time.perf_counter(), []
    took = 0.0
    for step, batch in enumerate(itertools.islice(stream.train(), steps)):
        index = np.asarray(batch['index'])
        np.add.at(times, index, 1)
        assert np.array_equal(batch['image'][0], pixels(index[0]))
        took = time.perf_counter() - began
        if max((step + 1) / steps, took / seconds) * SAMPLES >= len(memory) + 1:
            memory.append(resident())
        if took > seconds:
            break
    assert times.max() == 1
    return {
        'images': count,
        'read': int(times.sum()),
        'speed': float(times.sum() / took),
        'memory': memory,
    }


def resident() -> float:
    """This process's memory in MB (Linux)."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


def train(images: str, net: str) -> dict[str, float]:
    """Train a net of `STEMS` on a source of 20 GB of `computed` images or of `JPEG`s."""
    import cnn_jax as cj
    from cnn_jax import config as cfg

    count = round(20e9 / math.prod(SHAPE))
    kernel, stride = STEMS[net]
    config = cfg.Config(
        model=cfg.Model(
            stem_width=4, stem_kernel=kernel, stem_stride=stride, widths=(4,), hidden=(8,)
        ),
        data=cfg.Data(batch=BATCH, stream='always', resize='crop', size=SHAPE[0]),
        train=cfg.Train(epochs=(STEPS + 0.5) * BATCH / count, eval_every=STEPS / 3 * BATCH / count),
    )
    source = {'computed': computed, 'JPEG': photographs}[images]
    with tempfile.TemporaryDirectory() as folder:
        cj.fit(config, folder, train=source(count), eval=source(2 * BATCH))
        facts = json.loads(Path(folder, 'speed.json').read_text())
    return {'speed': facts['images_per_second'], 'share': facts['waiting_share']}


if __name__ == '__main__':
    cli.run(main)
