"""The peer: VGG16's frozen convolutions of `keras.applications`, backend in KERAS_BACKEND."""

import keras

from benchmarks.keras_finetune import backbone
from benchmarks.keras_step import version
from benchmarks.problem import Problem, backbone_weights, prepared
from benchmarks.worker import Contender, forward


def start(problem: Problem) -> Contender:
    """Prepared images in, features out."""
    model = backbone(backbone_weights(problem))
    model.compile(jit_compile=keras.config.backend() == 'jax')
    return forward(model.predict_on_batch, list(prepared(problem)), version())
