"""Fine-tuning recipes against logistic regression on the same features, in five folds.

  python -m benchmarks.fine_tuning folder:photos mnist_5k --folds=5

Each recipe of `RECIPES` is an experiment file, run as `launch.train` runs it on each fold; its
images to choose by are held out of the fold's training part. Logistic regression (scikit-learn)
has the features that the first recipe's head reads, the same training images, and a penalty chosen
by loss on the same held-out images. All are judged once, on the fold's test part.
"""

import argparse
import importlib
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import cnn_jax as cj
from cnn_jax import runtime

runtime.configure()  # before JAX is imported

from cnn_jax.train import setup  # noqa: E402
from cnn_jax.train.program import state_maker  # noqa: E402

RECIPES = 'finetune', 'finetune_vgg16'
COSTS = np.geomspace(1e-6, 1e2, 17)


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
    return found | {'seconds': time.perf_counter() - began}


def fine_tuned(name: str, config: cj.Config, test, folder: Path) -> dict[str, float]:
    """The scores of an experiment file's run."""
    experiment = importlib.import_module(f'experiments.{name}')
    began = time.perf_counter()
    tune = getattr(experiment, 'TUNE', None)
    run = cj.fit(config, folder, tune=tune, live=False, say=lambda line: None)
    seconds = time.perf_counter() - began
    images = test.read(np.arange(test.n))
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    facts = {'seconds': seconds, 'megabytes': size / 1e6}
    return scores(run.predict(images), test.labels) | facts


def main() -> None:
    parser = argparse.ArgumentParser(
        'python -m benchmarks.fine_tuning',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('sources', nargs='+')
    parser.add_argument('--folds', type=int, default=5)
    parser.add_argument('--set', nargs='*', default=[], metavar='FIELD=JSON')
    parser.add_argument('--recipes', nargs='*', default=RECIPES)
    arguments = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (each.split('=', 1) for each in arguments.set)}
    for source in arguments.sources:
        found: dict[str, list[dict[str, float]]] = {}
        names: list[str] = arguments.recipes
        for fold, name in itertools.product(range(arguments.folds), names):
            config = importlib.import_module(f'experiments.{name}').get_config()
            given = {'data.source': source, 'data.folds': arguments.folds, 'data.fold': fold}
            config = cj.replace(config, given | changes)
            data = setup.open_data(config, test=True)
            if config.model.outputs == 1 and len(data.description['class_names']) > 2:
                config = cj.replace(config, {'model.outputs': 0})
            with tempfile.TemporaryDirectory() as folder:
                row = fine_tuned(name, config, data.test, Path(folder))
            found.setdefault(name, []).append(row)
            if name == arguments.recipes[0]:
                row = logistic_regression(config, data)
                found.setdefault('logistic regression', []).append(row)
        print(f'\n{source}: mean of {arguments.folds} folds (standard deviation)')
        for name, rows in found.items():
            cells = []
            for key in rows[0]:
                values = np.array([row[key] for row in rows])
                cells.append(f'{key} {values.mean():.3f} ({values.std(ddof=1):.3f})')
            print(f'  {name:<22}' + '  '.join(cells), flush=True)


if __name__ == '__main__':
    main()
