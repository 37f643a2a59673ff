"""Class probabilities of image files, with Monte-Carlo dropout and heat maps on request."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import entr

from cnn_jax import regularizers, rng
from cnn_jax.config import OWN
from cnn_jax.data import decode
from cnn_jax.data.folder import find_images
from cnn_jax.data.source import count_left_out
from cnn_jax.errors import UserError, printable, reason_of
from cnn_jax.files import local_path
from cnn_jax.freezing import mode_arguments
from cnn_jax.models import Classifier
from cnn_jax.nn import Dropout
from cnn_jax.summary import layers
from cnn_jax.tools import heatmap
from cnn_jax.train.run import Run
from cnn_jax.train.setup import prepared_shape, shape_text

Answer = tuple[np.ndarray, dict[str, float]]  # probabilities of the classes, uncertainty


@dataclass(frozen=True)
class Prediction:
    """The classes of one file, most probable first, or why it could not be read."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ''
    uncertainty: dict[str, float] = field(default_factory=dict)  # in nats, of several draws

    def as_json(self) -> dict[str, Any]:
        """`{"file", "class", "probability", "top"}` and uncertainty, or `{"file", "error"}`."""
        if self.error:
            return {'file': str(self.path), 'error': self.error}
        top = [{'class': c, 'probability': p} for c, p in self.classes]
        return {'file': str(self.path), **top[0], 'top': top, **self.uncertainty}

    def as_text(self) -> str:
        """One line: the file, then classes with their probabilities, then the uncertainty."""
        if self.error:
            return printable(f'{self.path}: not read: {self.error}')
        parts = [f'{c} {p:.1%}' for c, p in self.classes]
        parts += [f'{k.replace("_", " ")} {v:.3f}' for k, v in self.uncertainty.items()]
        return printable(f'{self.path}: ' + '  '.join(parts))


def image_paths(names: Sequence[str], say: Callable[[str], object] = print) -> list[Path]:
    """The named files, and the images in the named folders, sorted; `say` tells what is left out.

    Errors:
        UserError: Nothing is named, a folder holds no image, or a URL or a pattern is named.
    """
    if not names:
        raise UserError('no image is named; give files or folders after the flags')
    paths: list[Path] = []
    for name in names:
        path = Path(local_path(name, 'the name of an image'))
        if path.is_dir():
            inside, others = find_images(path)
            if not inside:
                raise UserError(f'the folder {path} holds no image ({", ".join(decode.SUFFIXES)})')
            if counted := count_left_out(others):
                say(f'left out of {path}: {counted}')
            paths += inside
        elif '://' in name and not path.exists():
            raise UserError(f'{name} is a URL, which is not read; download it and give the file')
        elif set(name) & set('*?[') and not path.exists():
            raise UserError(f'no file matches {name}; name files or folders that are there')
        else:
            paths.append(path)
    return paths


def predict_files(
    run: Run, paths: Sequence[Path], batch_size: int = 32, draws: int = 0, top: int | None = None
) -> Iterator[Prediction]:
    """Classify files with the network of a run, batch by batch; nothing is kept.

    Args:
        run: An opened run.
        paths: Image files; those that cannot be read become predictions with an error.
        batch_size: Images computed at once.
        draws: Draws of Monte-Carlo dropout, whose mean is predicted; 0 predicts without dropout.
        top: Number of the most probable classes to give; `None` for all.

    Errors:
        UserError: Draws are asked for, but the network has no dropout.
    """
    if top is not None and top < 1:
        raise UserError(f'top is {top}; give a number of at least 1, or None for all classes')
    size, names = min(batch_size, max(len(paths), 1)), run.class_names
    prepare = mc_dropout(run) if draws else None

    def predict(images: np.ndarray) -> Iterator[Answer]:
        if not prepare:
            yield from ((probabilities, {}) for probabilities in run.predict(images))
            return
        draw = prepare(images)
        log_probs = np.stack([draw(number) for number in range(draws)])
        for mean, entropy, information in zip(*uncertainty(log_probs)):
            yield mean, {'entropy': float(entropy), 'mutual_information': float(information)}

    def classify(part: Sequence[Path]) -> Iterator[Prediction]:
        read = [read_image(run, path) for path in part]
        images = [image for image in read if not isinstance(image, str)]
        answers: Iterator[Answer] = iter(())
        if images:  # padded to one size, so that one compilation serves all
            blank = np.zeros_like(images[0])
            answers = predict(np.stack(images + [blank] * (size - len(images))))
        for path, image in zip(part, read):
            if isinstance(image, str):
                yield Prediction(path, error=image)
            else:
                probabilities, uncertain = next(answers)
                order = np.argsort(-probabilities, kind='stable')[:top]
                ranked = tuple((names[i], float(probabilities[i])) for i in order)
                yield Prediction(path, ranked, uncertainty=uncertain)

    parts = (paths[start : start + size] for start in range(0, len(paths), size))
    return (prediction for part in parts for prediction in classify(part))


def read_image(run: Run, path: Path) -> np.ndarray | str:
    """The pixels of a file at the network's size, resized as in training, or why not."""
    data, wanted = run.config.data, run.spec.image_shape
    try:
        pixels = decode.decode(decode.read_file(path))
    except (OSError, decode.CorruptImage) as error:
        return reason_of(error)
    image = decode.resize_image(pixels, data.resize, data.size, wanted[-1])
    if image.shape != wanted:
        return f'it is {shape_text(image.shape)}, the network takes {shape_text(wanted)}'
    return image


def heatmap_drawer(run: Run, folder: Path) -> Callable[[Prediction], bool]:
    """Draws the evidence for the most probable class of a prediction (Grad-CAM) as a PNG.

    The function returns whether it could; PNGs are named `NNN_FILE.png` in the order of its calls.
    """
    names = run.class_names
    evidence, numbers = heatmap.heat_mapper(run), itertools.count()

    def draw(prediction: Prediction) -> bool:
        number, image = next(numbers), read_image(run, prediction.path)
        if prediction.error or isinstance(image, str):
            return False
        name, probability = prediction.classes[0]
        heat = evidence(image, names.index(name))
        # A name of a file takes at most 255 bytes, those that are added in writing it included.
        stem = printable(prediction.path.stem).encode()[:200].decode(errors='ignore')
        title = printable(f'{prediction.path.name}: {name} {probability:.1%}')
        heatmap.draw_heatmap(image, heat, title, folder / f'{number:03d}_{stem}.png')
        return True

    return draw


def mc_dropout(run: Run) -> Callable[[Array | np.ndarray], Callable[[int], Float[Array, 'b k']]]:
    """Monte-Carlo dropout: images [b, h, w, c] → number of a draw → log class probabilities.

    The draws follow from the run's seed and step, so that they are reproducible. Dropout of every
    kind acts, and stochastic depth. A backbone, which has none, computes the images once.

    Errors:
        UserError: The network has no dropout, so that every draw would be the same.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation".
    """
    model = run.config.model
    mode: dict[str, Any] = mode_arguments(run.model, train=False)
    in_trunk = model.name == 'strided_net' and (model.dropout or model.stochastic_depth)
    acts = in_trunk or (model.hidden and model.head_dropout)
    if model.name == OWN:
        acts = any(layer.kind == 'Dropout' for layer in layers(run.model, prepared_shape(run.spec)))
    if not acts:
        raise UserError(
            'the network of this run has no dropout, so Monte-Carlo dropout would draw the same '
            'answer each time; leave --mc out, or train with config.model.head_dropout above 0'
        )
    has_backbone = isinstance(run.model, Classifier)

    @jax.jit
    def features(variables, images) -> Any:
        x = run.spec.prepare(images)
        if has_backbone:
            return run.model.apply(variables, x, **mode, method='features')
        return x

    @jax.jit
    def sample(variables, x, number):
        rngs = {'dropout': rng.key(run.config.seed, 'dropout', run.step + number)}
        how: dict[str, Any] = {**mode, 'method': 'classify'} if has_backbone else mode
        with nn.intercept_methods(with_dropout):
            logits: Any = run.model.apply(variables, x, rngs=rngs, **how)
        return regularizers.log_probabilities(logits)

    def prepare(images):
        x = features(run.variables, jnp.asarray(images))
        return functools.partial(sample, run.variables, x)

    return prepare


def with_dropout(call, args, kwargs, context):
    """A Linen interceptor that lets every `Dropout` act as in training, and nothing else.

    In a network called in inference, normalization stays so, and noise on the images off.
    """
    if context.method_name == '__call__':
        if isinstance(context.module, Dropout):
            args, kwargs = args[:1], {'train': True}
        elif isinstance(context.module, nn.Dropout) and context.module.deterministic is None:
            args, kwargs = args[:1], kwargs | {'deterministic': False}
    return call(*args, **kwargs)


def uncertainty(
    log_probs: Float[np.ndarray, 's b k'],
) -> tuple[Float[np.ndarray, 'b k'], Float[np.ndarray, ' b'], Float[np.ndarray, ' b']]:
    """Mean, predictive entropy and mutual information of a network's draws [s], in nats.

    p̄ = mean_s p_s,   H = −Σ_k p̄ log p̄,   I = H − mean_s(−Σ_k p_s log p_s)

    H is the uncertainty of the answer for whatever reason, I the part of it on which the draws
    disagree: of two images with the same H, more data of its kind would help the one with the
    larger I.

    Source: Gal 2016, "Uncertainty in Deep Learning", section 3.3.1.
    """
    probabilities = np.exp(np.asarray(log_probs, np.float64))
    mean = probabilities.mean(axis=0)
    entropy = entr(mean).sum(axis=-1)
    within = entr(probabilities).sum(axis=-1).mean(axis=0)
    return mean, entropy, np.maximum(entropy - within, 0)
