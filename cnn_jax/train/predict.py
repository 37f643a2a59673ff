"""Class probabilities of image files."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.data import decode
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
    batch = min(batch, max(len(paths), 1))
    answer = _sampled(run, draws) if draws else _certain(run)
    names = run.manifest['data']['class_names']

    def classified(part: list[Path]) -> Iterator[Prediction]:
        read = [read_image(run, path) for path in part]
        images = [image for image in read if not isinstance(image, str)]
        answers = iter(answer(_padded(images, batch)) if images else ())
        for path, image in zip(part, read):
            if isinstance(image, str):
                yield Prediction(path, error=image)
            else:
                shares, uncertainty = next(answers)
                ranked = sorted(zip(names, shares.tolist()), key=lambda pair: -pair[1])
                yield Prediction(path, tuple(ranked), uncertainty=uncertainty)

    # Part by part, so that the pixels of a large folder are never in memory together.
    parts = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    return [prediction for part in parts for prediction in classified(part)]


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
        # A name of a file takes at most 255 bytes, those that are added in writing it included.
        stem = os.fsencode(prediction.path.stem)[:200].decode(errors='ignore')
        path = folder / f'{place:03d}_{stem}.png'
        title = f'{prediction.path.name}: {name} {probability:.1%}'
        title = title.encode(errors='backslashreplace').decode()
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
    image = decode.resize_image(pixels, data.resize, data.size, wanted[-1])
    if image.shape != wanted:
        return f'it is {shape_text(image.shape)}, the network takes {shape_text(wanted)}'
    return image


Answer = tuple[np.ndarray, dict[str, float]]  # probabilities of the classes, uncertainty


def _certain(run: Run) -> Callable[[np.ndarray], Iterable[Answer]]:
    compute, values = jax.jit(run.steps.predict), values_of(run.config)
    return lambda images: ((p, {}) for p in np.exp(compute(run.state, images, values)))


def _sampled(run: Run, draws: int) -> Callable[[np.ndarray], Iterable[Answer]]:
    of_images = monte_carlo.sampler(run)

    def answers(images: np.ndarray) -> Iterator[Answer]:
        draw = of_images(images)
        log_probs = np.stack([draw(number) for number in range(draws)])
        for shares, entropy, information in zip(*monte_carlo.uncertainty(log_probs)):
            yield shares, {'entropy': float(entropy), 'mutual_information': float(information)}

    return answers


def _padded(images: list[np.ndarray], size: int) -> np.ndarray:
    """A batch of one size, so that one compilation serves all."""
    blank = np.zeros_like(images[0])
    return np.stack(images + [blank] * (size - len(images)))
