"""VGG16's frozen convolutions as this project computes the features that it keeps."""

import json
from types import SimpleNamespace

import jax
import numpy as np

from benchmarks.problem import Problem, backbone_weights
from benchmarks.worker import Contender, forward
from cnn_jax import __version__, params
from cnn_jax import config as cfg
from cnn_jax.features import Extractor
from cnn_jax.train.setup import preparation


def start(problem: Problem) -> Contender:
    """Uint8 images in, features out, both in NumPy."""
    extractor = Extractor(
        cfg.from_json(json.dumps(problem.config)),
        problem.classes,
        preparation(problem.preprocessing),
        problem.preprocessing,
        jax.device_put(params.unflatten(backbone_weights(problem))),
    )
    compute = extractor.function(None)
    index = np.arange(problem.images.shape[1], dtype=np.int32)

    def features(images: np.ndarray) -> np.ndarray:
        source = SimpleNamespace(n=len(images), read=lambda index: images[index])
        return extractor.rows(compute, source, index)

    return forward(features, list(problem.images), f'cnn_jax {__version__}')
