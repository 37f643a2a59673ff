"""The frozen convolutions of VGG16 on photographs of 224 px, ImageNet's weights, float32.

  bash benchmarks/setup_peers.sh
  python -m benchmarks.features --rounds=5 --out=benchmarks/RESULTS.md

This project's contender is what `cnn_jax.features` runs, from uint8 pixels; the others get prepared
floats. Each lives in a process of its own, with all cores; in every round each computes a batch in
turn. First the features of all must agree.
"""

import importlib.util

import numpy as np

from benchmarks import cli, contest, results, workloads
from benchmarks.contest import Entrant, keras_on
from cnn_jax.pretrained.weights import load

# Flax with this project's settings shows what these are worth; nobody has it so.
OURS = {
    'cnn_jax': Entrant('benchmarks.ours:features', settings=True),
    'Flax with our runtime settings': Entrant('benchmarks.flax_peer:features', settings=True),
}
FREEZING = {'TORCHINDUCTOR_FREEZING': '1'}  # what torch.compile needs to lay out kernels once
PEERS = {
    'Flax': Entrant('benchmarks.flax_peer:features'),
    'Keras on JAX': keras_on('jax', 'benchmarks.keras_peer:features'),
    'Keras on TensorFlow': keras_on('tensorflow', 'benchmarks.keras_peer:features'),
    'Keras on PyTorch': keras_on('torch', 'benchmarks.keras_peer:features'),
    'PyTorch': Entrant('benchmarks.torch_peer:features', 'pytorch'),
    'PyTorch, channels_last': Entrant('benchmarks.torch_peer:features_channels_last', 'pytorch'),
    'PyTorch, torch.compile': Entrant(
        'benchmarks.torch_peer:features_compiled', 'pytorch', environment=FREEZING, compiler=True
    ),
}
if importlib.util.find_spec('onnxruntime'):
    PEERS['ONNX Runtime'] = Entrant('benchmarks.onnx_features')
COLUMNS = (
    *('contender', 'images/s', f'time {results.OF_BEST}'),
    *('relative error', 'first batch, s', 'peak MB'),
)
TOLERANCE = 1e-4  # float32 sums in another order; half precision is a hundred times further off


def main() -> None:
    """Measure."""
    parser = cli.parser('benchmarks.features', __doc__, rounds=5)
    parser.add_argument('--batch', type=int, default=8, help='images computed at once (8)')
    given = parser.parse_args()
    entrants, left_out = contest.chosen(OURS | PEERS, given.contenders, given.peers)
    found = contest.measure(
        entrants,
        workloads.features_problem(given.batch, load('auto')),
        given.peers,
        rounds=given.rounds,
        numbers=given.batch * 7 * 7 * 512,
        check=relative_errors,
        least=1,
        warm=1,
    )
    reference = contest.best(found.seconds, PEERS)
    rows = [
        [
            name,
            results.quartiles([given.batch / each for each in seconds], digits=2),
            contest.ratio(seconds, found.seconds[reference]),
            f'{found.checked[name]:.0e}',
            *found.costs(name),
        ]
        for name, seconds in found.seconds.items()
    ]
    body = f"""{results.conditions('jaxlib')}, {', '.join(found.versions)}

224×224×3, batch {given.batch}, float32, 13 convolutions with ImageNet's weights.
Median [quartiles] of {given.rounds} interleaved rounds. {results.of_best(reference)}
First batch: from the process's start, with nothing compiled before but the native library.
Relative error: ‖f − f₁‖ / ‖f₁‖ of the features, f₁ those of {judge(entrants)}.
{results.left_out(left_out)}
{results.table(COLUMNS, rows)}
"""
    cli.publish('Features of VGG16', body, given.out)


def judge(names) -> str:
    """Whose features the others' are compared with: a peer's, if one takes part."""
    return next((name for name in names if name in PEERS), next(iter(names)))


def relative_errors(features: dict[str, list[float]]) -> dict[str, float]:
    """‖f − f₁‖ / ‖f₁‖ by name.

    Errors:
        contest.Disagreement: One is larger than `TOLERANCE`, or not finite.
    """
    first = judge(features)
    expected = np.array(features[first])
    found = {
        name: float(np.linalg.norm(each - expected) / np.linalg.norm(expected))
        for name, each in features.items()
    }
    for name, error in found.items():
        if not error <= TOLERANCE:
            raise contest.Disagreement(
                f'the features of {name} are {error:.1e} off those of {first}: they are not the '
                'same network on the same images'
            )
    return found


if __name__ == '__main__':
    cli.run(main)
