"""Fine-tuning a frozen VGG16: 100 photographs of 224 px, 10 epochs, whole processes.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.finetune --rounds=2 --out=benchmarks/RESULTS.md

Every contender starts from nothing: the interpreter, the images on disk, the same ImageNet
weights, no cached features. Contenders take turns in every round. Ratios are to this project's
time in the same round.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import results
from benchmarks.process import rotated, timed
from cnn_jax.cache import cache_folder
from cnn_jax.params import flatten
from cnn_jax.pretrained.load import load

COUNT, SIZE = {'train': 50, 'test': 25}, 224  # of each class
KERAS = Path(__file__).with_name('keras_finetune.py')


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser('benchmarks.finetune', description=__doc__)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--peers', type=Path, default=Path('.bench'), help='of setup_peers.sh')
    parser.add_argument('--out', type=Path, help='results file whose section is replaced')
    arguments = parser.parse_args()
    body = measure(arguments.rounds, arguments.peers)
    print(body)
    if arguments.out:
        results.write_section(arguments.out, 'Fine-tuning VGG16', body)


def measure(rounds: int, peers: Path) -> str:
    """The table, as Markdown."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_photographs(folder / 'photos')
        np.savez(folder / 'vgg16.npz', **flatten(load('auto').params))
        contenders = contenders_of(folder, peers)
        runs = {name: [] for name in contenders}
        for number in range(rounds):
            for name in rotated(contenders, number):
                runs[name].append(contenders[name]())
                print(f'round {number + 1} of {rounds}: {name}: {runs[name][-1]}', file=sys.stderr)
    reference = [run['seconds'] for run in runs['cnn_jax']]
    rows = [
        [
            name,
            results.quartiles([run['seconds'] for run in taken]),
            results.quartiles([run['seconds'] / r for run, r in zip(taken, reference)], 2),
            f'{np.median([run["epoch"] for run in taken]):.2f}',
            f'{np.median([run["peak"] for run in taken]):,.0f}',
            f'{np.median([run["accuracy"] for run in taken]):.2f}',
        ]
        for name, taken in runs.items()
    ]
    header = ('contender', 'whole process, s', 'of cnn_jax', 'an epoch, s', 'peak MB', 'accuracy')
    return '\n'.join(
        [
            results.conditions('jax', 'jaxlib', 'flax', 'optax'),
            '',
            f'100 photographs of {SIZE}×{SIZE} for training and 50 for validation after each of '
            f'10 epochs, batch 32, float32. Median [quartiles] of {rounds} interleaved rounds.',
            'An epoch: the median after the first, validation included.',
            '',
            results.table(header, rows),
        ]
    )


def make_photographs(folder: Path) -> None:
    """JPEG crops of two photographs, one a class: scikit-learn's china.jpg and flower.jpg."""
    from sklearn.datasets import load_sample_image

    draw = np.random.default_rng(0)
    for name in ('china', 'flower'):
        whole = load_sample_image(f'{name}.jpg')
        for split, count in COUNT.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                top = draw.integers(0, whole.shape[0] - SIZE)
                left = draw.integers(0, whole.shape[1] - SIZE)
                crop = whole[top : top + SIZE, left : left + SIZE]
                Image.fromarray(crop).save(folder / split / name / f'{i}.jpg', quality=92)


def contenders_of(folder: Path, peers: Path):
    """What runs, by name: functions that return seconds, an epoch's, peak MB and accuracy."""

    def ours(*flags, warm=False):
        def run():
            work = folder / 'work'
            shutil.rmtree(work, ignore_errors=True)
            if not warm:
                for part in ('features', 'images', 'index'):
                    shutil.rmtree(folder / 'cache' / part, ignore_errors=True)
            command = [
                *(sys.executable, '-m', 'launch.train', f'--workdir={work}'),
                '--config=experiments/finetune_vgg16.py',
                f'--config.data.source=folder:{folder / "photos"}',
                *flags,
            ]
            seconds, peak, _ = timed(command, {'CNN_JAX_CACHE': str(folder / 'cache')})
            lines = (work / 'timing.jsonl').read_text().splitlines()
            epochs = [json.loads(line) for line in lines][1:]
            epoch = np.median(
                [100 / e['images_per_second'] + e['evaluation_seconds'] for e in epochs]
            )
            last = json.loads((work / 'metrics.jsonl').read_text().splitlines()[-1])
            return {
                'seconds': seconds,
                'epoch': float(epoch),
                'peak': peak,
                'accuracy': last['accuracy'],
            }

        return run

    def keras(backend, *options):
        def run():
            python = peers / f'keras_{backend}' / 'bin' / 'python'
            command = [str(python), str(KERAS), str(folder / 'photos'), str(folder / 'vgg16.npz')]
            seconds, peak, text = timed([*command, *options], {'KERAS_BACKEND': backend})
            epoch, accuracy = map(float, text.split()[-2:])
            return {'seconds': seconds, 'epoch': epoch, 'peak': peak, 'accuracy': accuracy}

        return run

    shutil.copytree(cache_folder(), folder / 'cache', ignore=shutil.ignore_patterns(
        'features', 'images', 'index', 'compiled'
    ))  # fmt: skip
    return {
        'cnn_jax': ours(),
        'cnn_jax, features in the cache': ours(warm=True),
        'cnn_jax, features.cache=never': ours('--config.features.cache=never'),
        'Keras on JAX': keras('jax'),
        'Keras on TensorFlow': keras('tensorflow'),
        'Keras on JAX, features cached by hand': keras('jax', '--cached'),
        'Keras on TensorFlow, features cached by hand': keras('tensorflow', '--cached'),
    }


if __name__ == '__main__':
    main()
