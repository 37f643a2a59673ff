"""Fine-tuning recipes against logistic regression on the same features, in folds.

  apt install tuxpaint-stamps-default dataset-fashion-mnist
  python -m benchmarks.fine_tuning --out=benchmarks/RESULTS.md
  python -m benchmarks.fine_tuning folder:photos mnist_5k --set data.size=64

Without sources, four sets: small photographs of animals against food and plants, the same in nine
classes, solar cells (experiments/elpv.py, 90 MB) and garments. Each recipe is an experiment file,
run as `launch.train` runs it on each fold; its images to choose by are held out of the fold's
training part. Logistic regression (scikit-learn) has the features that the recommended recipe's
head reads, the same training images, and a penalty chosen by loss on the same held-out images.
All are judged once, on the fold's test part.
"""

import importlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

import cnn_jax as cj
from benchmarks import cli, results
from cnn_jax import runtime

runtime.configure()  # before JAX is imported

from cnn_jax.train import setup  # noqa: E402
from cnn_jax.train.program import state_maker  # noqa: E402

LITE0 = {'model.name': 'efficientnet_lite0'}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    'the recommended recipe, VGG16': ('finetune', {}),
    'the recommended recipe, EfficientNet-Lite0': ('finetune', LITE0),
    "the lecture's recipe, VGG16": ('finetune_vgg16', {}),
}
COSTS = np.geomspace(1e-6, 1e2, 17)
STAMPS = Path('/usr/share/tuxpaint/stamps')
ANIMALS = ('birds', 'fish', 'insects', 'mammals')
TWO = {'animals': ('animals',), 'food and plants': ('food', 'plants')}
NINE = {name: (f'animals/{name}',) for name in ANIMALS} | {
    name: (name,) for name in ('clothes', 'food', 'household', 'plants', 'vehicles')
}
GARMENTS = 1000
MEASURES = {'accuracy': '{:.1%}', 'loss': '{:.3f}', 'calibration_error': '{:.3f}'}
COLUMNS = (
    *('', 'accuracy', 'loss, nats', 'calibration error'),
    *('a fold, s', 'its work directory, MB'),
)


def photographs(folder: Path, classes: dict[str, tuple[str, ...]]) -> str:
    """A class folder of Debian's stamps, without drawings, and its source."""
    for name, places in classes.items():
        (folder / name).mkdir(parents=True)
        found = (path for place in places for path in (STAMPS / place).rglob('*.png'))
        for path in found:
            if 'cartoon' not in path.parts:
                (folder / name / path.name).write_bytes(path.read_bytes())
    return f'folder:{folder}'


def drawn(folder: Path, parts: Iterator[tuple[Any, Any, Any]]) -> str:
    """A class folder of arrays of grey images, and its source."""
    for images, labels, names in parts:
        for image, label in zip(np.asarray(images), labels, strict=True):
            place = folder / str(names[label])
            place.mkdir(parents=True, exist_ok=True)
            count = sum(1 for _ in place.iterdir())
            Image.fromarray(image.reshape(image.shape[:2])).save(place / f'{count:05}.png')
    return f'folder:{folder}'


def solar_cells() -> Iterator[tuple[Any, Any, Any]]:
    from experiments import elpv

    config = elpv.get_config()
    return (elpv.source(config, split) for split in ('train', 'test'))


def garments() -> Iterator[tuple[Any, Any, Any]]:
    config = importlib.import_module('experiments.strided_fashion').get_config()
    test = setup.open_data(config, test=True).evaluate
    yield test.read(np.arange(GARMENTS)), test.labels[:GARMENTS], test.class_names


SETS = {
    'small photographs: animals, or food and plants': lambda f: photographs(f, TWO),
    'small photographs of nine classes': lambda f: photographs(f, NINE),
    'solar cells, sound or defective': lambda f: drawn(f, solar_cells()),
    'garments, ten classes, 28 px': lambda f: drawn(f, garments()),
}


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, negative log-likelihood and calibration error over ten bins."""
    chosen, best = probabilities.argmax(1), probabilities.max(1)
    right = chosen == labels
    bins = np.minimum((best * 10).astype(int), 9)
    gaps = [abs(right[bins == b].sum() - best[bins == b].sum()) for b in range(10)]
    own = np.clip(probabilities[np.arange(len(labels)), labels].astype(float), 1e-30, 1)
    return {
        'accuracy': float(right.mean()),
        'loss': float(-np.log(own).mean()),
        'calibration_error': float(sum(gaps) / len(labels)),
    }


def logistic_regression(config: cj.Config, data: setup.Data) -> dict[str, float]:
    """The scores of scikit-learn's classifier."""
    from sklearn.linear_model import LogisticRegression

    began = time.perf_counter()
    spec = setup.make_spec(config, data.description, data.weights)
    program = setup.make_programs(config, spec)[0]
    splits = data.train, data.evaluate, data.test
    parts = setup.features(program, data.description, state_maker(program)(0), *splits)
    arrays = []
    for part in parts:
        batches = [(np.asarray(b['image']), np.asarray(b['mask'])) for b in part.evaluate()]
        images = np.concatenate([image[mask] for image, mask in batches])
        images = images.mean((1, 2)) if config.model.pool == 'average' else images
        arrays.append(images.reshape(len(images), -1))
    scale = arrays[0].std(0)
    scale[scale < 1e-6] = 1
    x, held, test = ((array - arrays[0].mean(0)) / scale for array in arrays)
    # The solution lies in the span of the images: the same classifier, on n numbers an image.
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    x, held, test = (array @ axes.T for array in (x, held, test))
    best, chosen = np.inf, LogisticRegression()
    for cost in COSTS:
        model = LogisticRegression(C=cost, max_iter=2000).fit(x, data.train.labels)
        loss = scores(model.predict_proba(held), data.evaluate.labels)['loss']
        if loss < best:
            best, chosen = loss, model
    found = scores(chosen.predict_proba(test), data.test.labels)
    return found | {'seconds': time.perf_counter() - began, 'megabytes': 0.0}


def fine_tuned(name: str, config: cj.Config, test) -> dict[str, float]:
    """The scores of an experiment file's run."""
    tune = getattr(importlib.import_module(f'experiments.{name}'), 'TUNE', None)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        run = cj.fit(config, place, tune=tune, live=False, say=lambda line: None)
        seconds = time.perf_counter() - began
        found = scores(run.predict(test.read(np.arange(test.n))), test.labels)
        size = sum(path.stat().st_size for path in Path(place).rglob('*') if path.is_file())
    return found | {'seconds': seconds, 'megabytes': size / 1e6}


def in_folds(source: str, folds: int, changes: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The scores of each contender in each fold."""
    found: dict[str, list[dict[str, float]]] = {}
    for fold in range(folds):
        for label, (name, own) in RECIPES.items():
            config = importlib.import_module(f'experiments.{name}').get_config()
            given = {'data.source': source, 'data.folds': folds, 'data.fold': fold}
            config = cj.replace(config, own | given | changes)
            data = setup.open_data(config, test=True)
            if config.model.outputs == 1 and len(data.description['class_names']) > 2:
                config = cj.replace(config, {'model.outputs': 0})
            if name == 'finetune':
                row = logistic_regression(config, data)
                found.setdefault(f'logistic regression, {label.split(", ")[1]}', []).append(row)
            found.setdefault(label, []).append(fine_tuned(name, config, data.test))
            print(f'{source}, fold {fold}, {label}: {found[label][-1]}', flush=True)
    return dict(sorted(found.items()))


def table(found: dict[str, list[dict[str, float]]], folds: int) -> str:
    """The mean of each measure and its 95% interval.

    The training parts of folds overlap: the variance of the mean has 1/(folds − 1), the images
    tested on by those trained on, added to 1/folds (Nadeau & Bengio 2003, "Inference for the
    Generalization Error", Machine Learning 52).
    """
    width = stats.t.ppf(0.975, folds - 1) * np.sqrt(1 / folds + 1 / (folds - 1))
    rows = []
    for name, runs in found.items():
        cells = []
        for measure, form in MEASURES.items():
            values = np.array([run[measure] for run in runs])
            half = width * values.std(ddof=1)
            cells.append(f'{form.format(values.mean())} ± {form.format(half)}')
        seconds, size = (np.median([run[key] for run in runs]) for key in ('seconds', 'megabytes'))
        rows.append([name, *cells, f'{seconds:.0f}', f'{size:.1f}' if size else ''])
    return results.table(COLUMNS, rows)


def main() -> None:
    """Measure."""
    parser = cli.parser('benchmarks.fine_tuning', __doc__)
    parser.add_argument('sources', nargs='*', help='config.data.source of each (four sets)')
    parser.add_argument('--folds', type=int, default=5)
    parser.add_argument('--set', nargs='*', default=[], metavar='FIELD=JSON')
    given = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (each.split('=', 1) for each in given.set)}
    parts = []
    with tempfile.TemporaryDirectory() as place:
        made = {name: make(Path(place) / name) for name, make in SETS.items() if not given.sources}
        for name, source in {**made, **{each: each for each in given.sources}}.items():
            found = in_folds(source, given.folds, changes)
            parts.append(f'### {name.capitalize()}\n\n{table(found, given.folds)}')
    about = f"""{results.conditions('jaxlib', 'scikit-learn')}

Mean ± half the 95% interval over {given.folds} folds, which counts that their training parts
overlap. A fold's seconds are the median of its trials and training, with features in the cache."""
    cli.publish('Fine-tuning recipes', '\n\n'.join([about, *parts]), given.out)


if __name__ == '__main__':
    cli.run(main)
