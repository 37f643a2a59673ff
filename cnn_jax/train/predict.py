"""Class probabilities of image files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.data import decode, resize
from cnn_jax.train import heatmap, monte_carlo
from cnn_jax.train.restore import Run
from cnn_jax.train.setup import shape_text
from cnn_jax.train.step import values_of


@dataclass(frozen=True)
class Prediction:
    """The classes of one file, most probable first, or why it could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ''
    uncertainty: dict[str, float] = field(default_factory=dict)  # in nats, of several draws

    def as_json(self, top: int) -> dict[str, Any]:
        """`{"file", "class", "probability", "top"}` or `{"file", "error"}`.

        With several draws also `"entropy"` and `"mutual_information"`.
        """
        if self.error:
            return {'file': str(self.path), 'error': self.error}
        name, probability = self.classes[0]
        ranked = [{'class': c, 'probability': p} for c, p in self.classes[:top]]
        row = {'file': str(self.path), 'class': name, 'probability': probability, 'top': ranked}
        return row | self.uncertainty

    def as_text(self, top: int) -> str:
        """One line: the file, then classes with their probabilities, then the uncertainty."""
        if self.error:
            return f'{self.path}: not read: {self.error}'
        parts = [f'{c} {p:.1%}' for c, p in self.classes[:top]]
        parts += [f'{k.replace("_", " ")} {v:.3f}' for k, v in self.uncertainty.items()]
        return f'{self.path}: ' + '  '.join(parts)


def predict_files(
    run: Run, paths: Iterable[Path], batch: int = 32, draws: int = 0
) -> list[Prediction]:
    """Classify files with the network of a run.

    Args:
        run: An opened run.
        paths: Image files; those that cannot be read become predictions with an error.
        batch: Images computed at once.
        draws: Of Monte-Carlo dropout, whose mean is predicted; 0: one answer without dropout.

    Returns:
        One prediction a path, in their order.

    Errors:
        UserError: There are draws to be made, but the network has no dropout.
    """
    paths = list(paths)
    read = [read_image(run, path) for path in paths]
    good = [image for image in read if not isinstance(image, str)]
    answers = iter(_sampled(run, good, batch, draws) if draws else _certain(run, good, batch))
    names = run.manifest['data']['class_names']

    def prediction(path: Path, image) -> Prediction:
        if isinstance(image, str):
            return Prediction(path, error=image)
        shares, uncertainty = next(answers)
        ranked = sorted(zip(names, shares.tolist()), key=lambda pair: -pair[1])
        return Prediction(path, tuple(ranked), uncertainty=uncertainty)

    return [prediction(path, image) for path, image in zip(paths, read)]


def draw_heatmaps(run: Run, predictions: Iterable[Prediction], folder: Path) -> list[Path]:
    """A PNG for each file that was classified: what speaks for its most probable class.

    Args:
        run: An opened run.
        predictions: As `predict_files` gives them.
        folder: Where the PNGs go, named `NNN_FILE.png` in the order of the predictions.

    Returns:
        The PNGs.
    """
    names = run.manifest['data']['class_names']
    blank = np.zeros((1, *run.task.image_shape), np.uint8)
    layer = heatmap.default_layer(run.model, run.task.prepare(jnp.asarray(blank)))

    @jax.jit
    def compute(variables, image, number):
        prepared = run.task.prepare(image)
        return heatmap.grad_cam(run.model, variables, prepared, number, layer)

    written = []
    for place, prediction in enumerate(predictions):
        image = read_image(run, prediction.path)
        if prediction.error or isinstance(image, str):
            continue
        name, probability = prediction.classes[0]
        heat = compute(run.variables, image[None], np.array([names.index(name)]))[0]
        path = folder / f'{place:03d}_{prediction.path.stem}.png'
        title = f'{prediction.path.name}: {name} {probability:.1%}'
        heatmap.draw_heatmap(image, np.asarray(heat), title, path)
        written.append(path)
    return written


def read_image(run: Run, path: Path) -> np.ndarray | str:
    """The pixels of a file, brought to the network's size as in training, or why not."""
    data, wanted = run.config.data, run.task.image_shape
    try:
        pixels = decode.decode(decode.read_file(path))
    except OSError as error:
        return error.strerror or str(error)
    except decode.CorruptImage as error:
        return str(error)
    image = resize.prepare(pixels, data.resize, data.size, wanted[-1])
    if image.shape != wanted:
        return f'it is {shape_text(image.shape)}, the network takes {shape_text(wanted)}'
    return image


Answer = tuple[np.ndarray, dict[str, float]]  # probabilities of the classes, uncertainty


def _certain(run: Run, images: list[np.ndarray], batch: int) -> Iterator[Answer]:
    compute, values = jax.jit(run.steps.predict), values_of(run.config)
    for count, padded in _batches(images, batch):
        yield from ((p, {}) for p in np.exp(compute(run.state, padded, values))[:count])


def _sampled(run: Run, images: list[np.ndarray], batch: int, draws: int) -> Iterator[Answer]:
    sample = monte_carlo.sampler(run)
    for count, padded in _batches(images, batch):
        log_probs = np.stack([sample(padded, number)[:count] for number in range(draws)])
        for shares, entropy, information in zip(*monte_carlo.uncertainty(log_probs)):
            yield shares, {'entropy': float(entropy), 'mutual_information': float(information)}


def _batches(images: list[np.ndarray], batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of one size, the last one padded, and how many images each holds."""
    for start in range(0, len(images), batch):
        part = np.stack(images[start : start + batch])
        padded = np.zeros((batch, *part.shape[1:]), np.uint8)
        padded[: len(part)] = part
        yield len(part), padded
