"""Fine-tuning a frozen VGG16: 100 photographs of 224 px, 10 epochs, whole processes.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.finetune --rounds=2 --out=benchmarks/RESULTS.md
  python -m benchmarks.finetune --contenders='cnn_jax,by hand'

Every contender starts from nothing: the interpreter, the images on disk, the same ImageNet
weights, no cached features. First the losses of a few steps must agree. Contenders take turns in
every round.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import cli, contest, results, workloads
from benchmarks.contest import Entrant, keras_on, timed
from benchmarks.problem import Problem
from cnn_jax.params import flatten
from cnn_jax.pretrained.weights import Pretrained, load
from experiments import finetune_vgg16

COUNT = {'train': 50, 'test': 25}  # of each class
OURS = 'cnn_jax'
BY_HAND = ', features cached by hand'
PEERS = {
    'Keras on JAX': keras_on('jax', 'benchmarks.keras_peer:finetune'),
    'Keras on TensorFlow': keras_on('tensorflow', 'benchmarks.keras_peer:finetune'),
    'PyTorch': Entrant('benchmarks.torch_peer:finetune', 'pytorch'),
}
GATE_STEPS = 5
COLUMNS = (
    *('contender', 'whole process, s', results.OF_BEST),
    *('an epoch, s', 'peak MB', 'accuracy'),
)


def main() -> None:
    """Measure."""
    given = cli.parser('benchmarks.finetune', __doc__, rounds=2).parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_photographs(folder / 'photos')
        weights = load('auto')
        np.savez(folder / 'vgg16.npz', **flatten(weights.params))
        contenders = contenders_of(folder, given.peers)
        names = contest.matching(contenders, given.contenders)
        names = names if OURS in names else [OURS, *names]  # the warm one reads what it leaves
        gated = {OURS: Entrant('benchmarks.ours', settings=True)}
        gated |= {n: PEERS[n] for n in PEERS if any(each.startswith(n) for each in names)}
        made = gate_problem(folder / 'photos', weights)
        losses, versions = contest.answers_of(gated, made, given.peers, GATE_STEPS)
        difference = contest.check(losses)
        runs = contest.take_turns(names, given.rounds, lambda name: contenders[name]())
    seconds = {name: [run['seconds'] for run in taken] for name, taken in runs.items()}
    reference = contest.best(seconds, [name for name in names if not name.startswith(OURS)])
    rows = []
    for name, taken in runs.items():
        epoch, peak, accuracy = (
            np.median([run[key] for run in taken]) for key in ('epoch', 'peak', 'accuracy')
        )
        times = results.quartiles(seconds[name]), contest.ratio(seconds[name], seconds[reference])
        rows.append([name, *times, f'{epoch:.2f}', f'{peak:,.0f}', f'{accuracy:.2f}'])
    body = f"""{results.conditions('jaxlib', 'flax', 'optax')}, {', '.join(versions)}

100 photographs of 224×224 for training and 50 for validation after each of 10 epochs, batch 32,
float32. Median [quartiles] of {given.rounds} interleaved rounds. {results.of_best(reference)}
An epoch: the median after the first, validation included.
The losses of the first {GATE_STEPS} steps without dropout agree within {difference:.0e} of their
mean.

{results.table(COLUMNS, rows)}
"""
    cli.publish('Fine-tuning VGG16', body, given.out)


def gate_problem(photos: Path, weights: Pretrained) -> Problem:
    """Two batches, both classes in each."""
    config = finetune_vgg16.get_config()
    config.data.batch = 8
    paths = sorted((photos / 'train').glob('*/*'))[:: 2 * COUNT['train'] // 16][:16]
    order = np.arange(16).reshape(8, 2).T
    made = workloads.problem(
        config,
        {'kind': weights.preprocessing.name},
        np.stack([np.asarray(Image.open(path)) for path in paths])[order],
        np.array([path.parent.name == 'flower' for path in paths], np.int32)[order],
        classes=2,
        known={f'backbone/{path}': value for path, value in flatten(weights.params).items()},
    )
    made.weights['head/logits/kernel'] *= 1e-3  # Keras clips the probabilities of large logits
    return made


def make_photographs(folder: Path) -> None:
    """JPEG crops of two photographs, one a class."""
    draw = np.random.default_rng(0)
    for name in workloads.PHOTOGRAPHS:
        for split, count in COUNT.items():
            (folder / split / name).mkdir(parents=True)
            for i, crop in enumerate(workloads.crops(name, count, draw)):
                Image.fromarray(crop).save(folder / split / name / f'{i}.jpg', quality=92)


def contenders_of(folder: Path, peers: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """What runs, by name: functions that return seconds, an epoch's, peak MB and accuracy."""

    def ours(*flags: str, warm: bool = False, cache: str = 'cache'):
        def run() -> dict[str, float]:
            work = folder / 'work'
            shutil.rmtree(work, ignore_errors=True)
            if not warm:
                contest.cold_cache(folder / cache)
            command = [
                *(sys.executable, '-m', 'launch.train', f'--workdir={work}'),
                '--config=experiments/finetune_vgg16.py',
                f'--config.data.source=folder:{folder / "photos"}',
                *flags,
            ]
            seconds, peak, _ = timed(command, {'CNN_JAX_CACHE': str(folder / cache)})
            lines = (work / 'timing.jsonl').read_text().splitlines()
            epochs = [json.loads(line) for line in lines][1:]
            each = [100 / e['images_per_second'] + e['evaluation_seconds'] for e in epochs]
            last = json.loads((work / 'metrics.jsonl').read_text().splitlines()[-1])
            return {
                'seconds': seconds,
                'epoch': float(np.median(each)),
                'peak': peak,
                'accuracy': last['accuracy'],
            }

        return run

    def of(peer: Entrant, *options: str):
        def run() -> dict[str, float]:
            python, script = peer.interpreter(peers), peer.module.partition(':')[0]
            arguments = [str(folder / 'photos'), str(folder / 'vgg16.npz'), *options]
            seconds, peak, text = timed([python, '-m', script, *arguments], peer.environment)
            epoch, accuracy = map(float, text.split()[-2:])
            return {'seconds': seconds, 'epoch': epoch, 'peak': peak, 'accuracy': accuracy}

        return run

    # The warm runs read what the cold ones left, so the uncached ones may not empty that.
    return {
        OURS: ours(),
        f'{OURS}, features in the cache': ours(warm=True),
        f'{OURS}, features.cache=never': ours(
            '--config.features.cache=never', cache='cache_of_never'
        ),
        **{name: of(peer) for name, peer in PEERS.items()},
        **{name + BY_HAND: of(peer, '--cached') for name, peer in PEERS.items()},
    }


if __name__ == '__main__':
    cli.run(main)
