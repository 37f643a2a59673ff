"""Evaluate a run on a split: measures, every prediction, and a page that shows the mistakes."""

import base64
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from cnn_jax import config as cfg
from cnn_jax.data.batches import open_batches
from cnn_jax.data.source import as_source
from cnn_jax.data.splits import part_of
from cnn_jax.errors import UserError, printable
from cnn_jax.files import write_text
from cnn_jax.tools import heatmap
from cnn_jax.tools.figures import as_files, reliability_figure, themed
from cnn_jax.tools.page import number, template, to_json, write_csv
from cnn_jax.train import metrics, setup
from cnn_jax.train.loop import shard_state
from cnn_jax.train.program import traced_values
from cnn_jax.train.run import Run
from cnn_jax.train.step import eval_sums, predict_step

FILES = 'evaluation.html', 'evaluation.json', 'predictions.csv'
MISTAKES, HITS = 12, 6  # images of the gallery
PAIRS = 20  # of classes that are confused, as listed
MATRIX, CLASSES, LISTED = 20, 30, 50  # classes of the matrix and the table, duplicates: in the page
MOST_DECODED = 10_000  # training images that are decoded once more to find duplicates
CHUNK = 256  # training images in memory at once
LARGEST, LOSSLESS = 256, 64  # sides of the gallery's images, in pixels


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The predictions of a run for each image of a split, and how good they are.

    `metrics` are those of training; `accuracy_interval` (Wilson, 95%), `balanced_accuracy` and
    `macro_f1`; `guessing_loss`, ln(classes); `classes`, `largest_confusions`, `reliability` and
    `duplicates` (images that are in the training set, too): rows, as in `evaluation.json`.

    >>> result = evaluate(run, 'test')  # doctest: +SKIP
    >>> print(result)  # the summary
    >>> result.probabilities[result.mistakes[0]], result.files[result.mistakes[0]]
    >>> result.table  # a row an image, for pandas.DataFrame
    """

    run: Run
    split: str
    files: list[str]  # or the origin of an image that is none
    labels: Int[np.ndarray, ' n']
    predicted: Int[np.ndarray, ' n']
    probabilities: Float[np.ndarray, 'n k']
    metrics: dict[str, Any]
    notes: tuple[str, ...]  # what there is to say of the data
    sought: str  # how many duplicates there are, and in what
    read: Callable[[np.ndarray], UInt8[np.ndarray, 'm h w c']]  # the images at some positions

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each image, as in `predictions.csv`."""
        return [*self._rows()]

    def _rows(self) -> Iterator[dict[str, Any]]:
        names = self.run.class_names
        columns = [f'p({name})' for name in names]
        for i, file in enumerate(self.files):
            row = {'file': file, 'truth': names[self.labels[i]]}
            row['prediction'] = names[self.predicted[i]]
            yield row | dict(zip(columns, self.probabilities[i]))

    @property
    def mistakes(self) -> Int[np.ndarray, ' m']:
        """Positions of the images that are classified wrongly, the most confident first."""
        truth = self.probabilities[range(len(self.files)), self.labels]
        order = np.lexsort((truth, -self.probabilities.max(axis=1)))
        return order[self.predicted[order] != self.labels[order]]

    @property
    def hits(self) -> Int[np.ndarray, ' m']:
        """Positions of the images that are classified rightly, the least confident first."""
        order = np.argsort(self.probabilities.max(axis=1), kind='stable')
        return order[self.predicted[order] == self.labels[order]]

    @property
    def folder(self) -> Path:
        """Where `write_report` writes: `evaluation/SPLIT-step_N` in the work directory.

        Slices are written out there: `test[50%:]` is `test_50pct..`.
        """
        split = self.split
        for old, new in (('[', '_'), (']', ''), (':', '..'), ('%', 'pct')):
            split = split.replace(old, new)
        return self.run.folder / 'evaluation' / f'{split}-step_{self.run.step}'

    def write_report(self, folder: Path | None = None) -> list[Path]:
        """Write page, numbers and predictions into `folder`, or another; returns their paths."""
        page, numbers, predictions = paths = [(folder or self.folder) / name for name in FILES]
        content = {'split': self.split, 'step': self.run.step}
        content |= self.metrics | metrics.as_json(self.metrics)
        content |= {'confusion': content['confusion'].tolist(), 'duplicates_sought': self.sought}
        write_text(numbers, to_json(content))
        write_csv(self._rows(), predictions)
        write_text(page, self._page())
        return paths

    def __repr__(self) -> str:
        found, config = self.metrics, self.run.config
        low, high = found['accuracy_interval']
        remarks = {
            'accuracy': f' ({low:.4f} to {high:.4f}, 95% Wilson interval)',
            'loss': f' nats (equal guesses: {found["guessing_loss"]:.4f})',
        }
        names = 'accuracy', 'balanced_accuracy', 'macro_f1', 'loss', 'calibration_error', 'top5'
        lines = {'images': f'{found["count"]:,}'} | {
            name.replace('_', ' '): f'{found[name]:.4f}{remarks.get(name, "")}'
            for name in names
            if name in found
        }
        worst = [f'{row["class"]} (F1 {row["f1"]:.2f})' for row in _worst(found['classes'])[:3]]
        lines['worst classes'] = ', '.join(worst)
        lines['most confused'] = ', '.join(map(confusion_text, found['largest_confusions'][:3]))
        lines['duplicates'] = self.sought
        source = 'own data' if config.data.source == cfg.OWN else config.data.source
        head = f'{source} {self.split}, step {self.run.step:,}'
        text = [f'  {name:<18} {value or "none"}' for name, value in lines.items()]
        return '\n'.join(map(printable, [head, *text]))

    def _page(self) -> str:
        from markupsafe import Markup

        found, names = self.metrics, self.run.class_names
        drawn = as_files(lambda: reliability_figure(found['reliability']), 'reliability')
        shown, matrix = merged(found['confusion'], names)
        files = self.files + [row['training_file'] for row in found['duplicates']]
        are_paths = all(map(os.path.isabs, files))
        above = os.path.commonpath(map(os.path.dirname, files)) if are_paths else ''
        return template(Path(__file__).with_suffix('.jinja')).render(
            evaluation=self,
            found=found,
            count=len(self.files),
            galleries=self._galleries(),
            **{'names': shown, 'matrix': matrix, 'worst': _worst(found['classes'])},
            reliability=Markup(themed(drawn['svg'], 'Reliability diagram')),
            **{'CLASSES': CLASSES, 'LISTED': LISTED, 'MISTAKES': MISTAKES, 'HITS': HITS},
            above=above,
            short=lambda file: file.removeprefix(above).lstrip('/'),
            **{'number': number, 'confusion_text': confusion_text},
        )

    def _galleries(self) -> dict[str, list[dict[str, Any]]]:
        """The images of the page, by kind, as data URLs with what belongs to them."""
        try:
            evidence = heatmap.heat_mapper(self.run)
        except UserError:  # there is no map of a network that sees no image
            evidence = None
        names, galleries = self.run.class_names, {}
        chosen = {'mistakes': self.mistakes[:MISTAKES], 'hits': self.hits[:HITS]}
        for kind, positions in chosen.items():
            galleries[kind] = rows = []
            for i, image in zip(positions, self.read(positions) if len(positions) else ()):
                pictures, predicted = [image], int(self.predicted[i])
                if evidence:
                    pictures.append(heatmap.overlay(image, evidence(image, predicted)))
                row = {'file': self.files[i], 'pictures': [*map(data_url, pictures)]}
                for kind, k in (('truth', self.labels[i]), ('prediction', predicted)):
                    row |= {kind: names[k], f'p_{kind}': self.probabilities[i, k]}
                rows.append(row)
        return galleries


def evaluate(run: Run, split: str = '', data: Any = None, train: Any = None) -> Evaluation:
    """Predict the images of a split in inference, and measure the predictions.

    Args:
        run: An opened run.
        split: The split; '' for the one that training evaluated: the run's config.data.eval, or
            its fold of config.data.train.
        data: A `Source` or arrays in place of the config's data.
        train: The same for the images that the run was trained on, which are only compared with
            those of the split, to find duplicates.

    Errors:
        UserError: The data cannot be had, or their classes are not those of the run.
    """
    config = run.config
    folds = 0 if split or data is not None else config.data.folds
    asked = split or config.data.eval
    split = f'{config.data.train}, fold {config.data.fold} of {folds}' if folds else asked
    if data is None and config.data.source == cfg.OWN:
        if run.source is None:
            raise UserError('the run was trained on own data; give those to evaluate on as data=…')
        own = {each: run.source(config, each) for each in ('train', 'eval')}
        parts = {part_of(config.data.train): 'train', part_of(config.data.eval): 'eval'}
        if (part := part_of(asked)) not in parts:
            raise UserError(f'own data have no part {part!r}, only {" and ".join(parts)}')
        train = own['train'] if train is None else train
        data = own['train' if folds else parts[part]]
    if data is not None:  # arrays bring no names, and not always the last class
        names = () if config.data.classes else run.class_names
        data = as_source(data, 'the evaluation data', class_names=names)
    layout = setup.layout_of(config)
    batches = open_batches(
        cfg.replace(config, {'data.eval': asked, 'data.folds': folds}).data,
        'eval',
        source=data,
        sharding=layout.batch if layout else None,
    )
    if batches.image_shape != run.spec.image_shape:
        shapes = setup.shape_text(batches.image_shape), setup.shape_text(run.spec.image_shape)
        raise UserError('the images are {}, the run was trained on {}; resize them'.format(*shapes))
    if list(batches.class_names) != run.class_names:
        raise UserError(
            f'the classes of {config.data.source} are {", ".join(batches.class_names)} now, but '
            f'the run was trained on {", ".join(run.class_names)}; restore them'
        )
    log_probs, sums, positions = _predictions(run, batches, layout)
    duplicates, sought = _duplicates(run, batches, positions, train)
    labels, predicted = np.asarray(batches.labels), log_probs.argmax(axis=1)
    found = metrics.result(sums)
    probabilities = np.exp(log_probs)
    found |= measures(labels, probabilities, found['confusion'], run.class_names)
    found |= {'reliability': reliability(sums), 'duplicates': duplicates}
    seen = batches.fingerprint == run.manifest['data']['eval']['fingerprint']
    notes = [*batches.notes, *_warnings(found)]
    if (folds or split == config.data.eval) and not seen and not config.data.holds_out:
        notes.insert(0, 'these are not the images that the run was evaluated on')
    files = [batches.describe(i) for i in range(batches.n)]
    result = run, split, files, labels, predicted, probabilities, found
    return Evaluation(*result, tuple(notes), sought, batches.read)


def _predictions(
    run: Run, batches: Any, layout: Any
) -> tuple[np.ndarray, metrics.Sums, dict[bytes, list[int]]]:
    """Log probabilities and sums of all batches, and the positions of each image by its digest."""

    def step(state, batch, values):
        log_probs = predict_step(run.program, state, batch['image'], values)
        return log_probs, eval_sums(log_probs, batch)

    compute = jax.jit(step, out_shardings=layout.replicated if layout else None)
    state, values = shard_state(run.state, layout), traced_values(run.config)
    log_probs = np.empty((batches.n, len(run.class_names)), np.float32)
    positions: dict[bytes, list[int]] = {}
    total: metrics.Sums = {}
    for batch in batches.evaluate():
        scores, sums = compute(state, batch, values)
        total = metrics.add(total or None, sums)
        mask = np.asarray(batch['mask'])
        index = np.asarray(batch['index'])[mask]
        log_probs[index] = np.asarray(scores)[mask]
        for i, image in zip(index.tolist(), np.asarray(batch['image'])[mask]):
            positions.setdefault(_digest(image), []).append(i)
    return log_probs, total, positions


def _digest(image: np.ndarray) -> bytes:
    """The digest of an image's pixels, at the size that the network takes."""
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()


def _duplicates(
    run: Run, batches: Any, positions: dict[bytes, list[int]], train: Any
) -> tuple[list[dict[str, Any]], str]:
    """The images with the pixels of a training image, in order, and how many in what."""
    config, unknown = run.config, 'not looked for, as the training images'
    if train is None and config.data.source == cfg.OWN:
        return [], f'{unknown} are own data'
    try:
        trained = setup.training_images(config, train)
    except UserError as error:
        return [], f'{unknown} cannot be opened ({error})'
    count = min(trained.n, MOST_DECODED) if trained.streams else trained.n
    found: dict[int, int] = {}
    for start in range(0, count, CHUNK):
        rows = np.arange(start, min(start + CHUNK, count))
        for row, image in zip(rows.tolist(), trained.read(rows)):
            for i in positions.get(_digest(image), ()):
                found.setdefault(i, row)
    names = run.class_names
    table = [
        {
            'file': batches.describe(i),
            'training_file': trained.describe(row),
            'truth': names[batches.labels[i]],
            'training_truth': names[trained.labels[row]],
        }
        for i, row in sorted(found.items())
    ]
    part = '' if count == trained.n else f'the first {count:,} of '
    many = f'{len(table):,}' if table else 'none'
    return table, f'{many} in {part}the {trained.n:,} training images'


def measures(
    labels: Int[np.ndarray, ' n'],
    probabilities: Float[np.ndarray, 'n k'],
    confusion: Int[np.ndarray, 'k k'],
    names: list[str],
) -> dict[str, Any]:
    """The measures of `Evaluation.metrics` that training does without.

    precision = TP / (TP + FP),  recall = TP / (TP + FN),  F1 = 2·TP / (2·TP + FP + FN)
    balanced accuracy = mean recall;  macro-F1 = mean F1
    AUC of class k: P(p_k of an image of k > p_k of another) + ½ P(they are equal)

    Means are over the classes for which the measure exists; where it does not, it is NaN.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.stats import binomtest
    from sklearn.metrics import roc_auc_score

    right, support, taken = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid='ignore', divide='ignore'):
        precision, recall, f1 = right / taken, right / support, 2 * right / (support + taken)
    auc = np.full(len(names), np.nan)
    for k, score in enumerate(probabilities.T):
        if 0 < support[k] < len(labels) and np.isfinite(score).all():
            auc[k] = roc_auc_score(labels == k, score)
    columns = zip(names, support, precision, recall, f1, auc)
    keys = 'class', 'count', 'precision', 'recall', 'f1', 'auc'
    interval = binomtest(int(right.sum()), len(labels)).proportion_ci(method='wilson')
    wrong = confusion - np.diag(right)
    pairs = np.argsort(-wrong, axis=None, kind='stable')[:PAIRS]
    pairs = [(int(i), int(j)) for i, j in np.transpose(np.unravel_index(pairs, wrong.shape))]
    return {
        'accuracy_interval': [float(interval.low), float(interval.high)],
        'balanced_accuracy': float(np.nanmean(recall)),
        'macro_f1': float(np.nanmean(f1)),
        'guessing_loss': math.log(len(names)),
        'classes': [
            dict(zip(keys, (name, int(n), *map(float, rest)))) for name, n, *rest in columns
        ],
        'largest_confusions': [
            {'truth': names[i], 'prediction': names[j], 'count': int(wrong[i, j])}
            | {'of': int(support[i])}
            for i, j in pairs
            if wrong[i, j]
        ],
    }


def reliability(sums: metrics.Sums) -> list[dict[str, Any]]:
    """Images, mean confidence and accuracy by bins of confidence, (from, to]; none of empty ones.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    keys = 'count', 'confidence', 'accuracy'
    parts = zip(sums['bin_count'], sums['bin_confidence'], sums['bin_correct'])
    return [
        {'from': i / metrics.BINS, 'to': (i + 1) / metrics.BINS}
        | dict(zip(keys, (int(n), float(confidence / n), float(correct / n))))
        for i, (n, confidence, correct) in enumerate(parts)
        if n
    ]


def merged(
    confusion: Int[np.ndarray, 'k k'], names: list[str]
) -> tuple[list[str], Int[np.ndarray, 'm m']]:
    """The confusion matrix of a page: with many classes, of the most confused and of the others."""
    if len(names) <= MATRIX:
        return names, confusion
    wrong = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * np.diag(confusion)
    chosen = np.sort(np.argsort(-wrong, kind='stable')[:MATRIX])
    place = np.full(len(names), MATRIX)
    place[chosen] = range(MATRIX)
    matrix = np.zeros((MATRIX + 1, MATRIX + 1), confusion.dtype)
    np.add.at(matrix, (place[:, None], place[None]), confusion)
    return [*(names[k] for k in chosen), f'the {len(names) - MATRIX:,} others'], matrix


def _warnings(found: dict[str, Any]) -> Iterable[str]:
    yield from metrics.doubts(found, len(found['classes']))
    if found['duplicates']:
        yield (
            'images with the pixels of a training image: '
            f'{len(found["duplicates"]):,} of {found["count"]:,}'
        )


def _worst(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the classes that have images, the lowest F1 first."""
    return sorted((row for row in classes if row['count']), key=lambda row: row['f1'])


def confusion_text(row: dict[str, Any]) -> str:
    """`4 for 9 (3 of 40)`: what was taken for what, how often."""
    return f'{row["truth"]} taken for {row["prediction"]} ({row["count"]:,} of {row["of"]:,})'


def data_url(image: UInt8[np.ndarray, 'h w c']) -> str:
    """An image within a page: a PNG of a small one, else a JPEG."""
    from PIL import Image

    picture, file = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), io.BytesIO()
    picture.thumbnail((LARGEST, LARGEST))
    kind = 'png' if max(picture.size) <= LOSSLESS else 'jpeg'
    picture.save(file, kind, quality=88)
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'
