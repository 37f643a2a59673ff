"""From a config and its data to the functions of a run.

Training, evaluation and prediction meet here. What prediction needs of the data (shape, classes,
preprocessing) is a small description that the manifest keeps, so it works without the data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.data.normalize import normalize, statistics
from cnn_jax.errors import UserError
from cnn_jax.pretrained.insert import insert
from cnn_jax.pretrained.load import Pretrained, load
from cnn_jax.pretrained.preprocessing import PREPROCESSINGS
from cnn_jax.train.step import Steps, Task, make_steps


def describe(config: cfg.Config, train, evaluation) -> dict[str, Any]:
    """What a run must know of its data, as JSON.

    Args:
        config: The config.
        train, evaluation: The opened batches of both splits.

    Errors:
        UserError: The splits differ in the images' shape or in the classes.
    """
    if train.image_shape != evaluation.image_shape:
        raise UserError(
            f'the training images are {shape_text(train.image_shape)} but the evaluation images '
            f'are {shape_text(evaluation.image_shape)}; set config.data.resize, size and channels'
        )
    if train.class_names != evaluation.class_names:
        raise UserError(
            f'the training classes {list(train.class_names)} are not the evaluation classes '
            f'{list(evaluation.class_names)}; give both splits the same classes'
        )
    return {
        'source': config.data.source,
        'train': {'count': train.n, 'fingerprint': train.fingerprint},
        'eval': {'count': evaluation.n, 'fingerprint': evaluation.fingerprint},
        'class_names': list(train.class_names),
        'image_shape': list(train.image_shape),
    }


def preprocessing(config: cfg.Config, train, weights: Pretrained | None) -> dict[str, Any]:
    """How uint8 images become the network's input, as JSON.

    Pretrained weights bring their own; else each channel is standardized by the training split.
    VGG16 without pretrained weights sees the same three channels.
    """
    if weights:
        return {'kind': weights.preprocessing.name, 'weights': weights.digest}
    mean, std = statistics(train)
    return {
        'kind': 'standardize',
        'mean': mean.tolist(),
        'std': std.tolist(),
        'channels': 3 if config.model.name == 'vgg16' else len(mean),
    }


def shape_text(shape: tuple[int, ...]) -> str:
    """`28×28×1`."""
    return '×'.join(map(str, shape))


def preparation(spec: dict[str, Any]) -> Callable:
    """The function that `preprocessing` describes, from uint8 images to the network's floats."""
    if spec['kind'] != 'standardize':
        return PREPROCESSINGS[spec['kind']]

    def standardize(images):
        floats = normalize(images, spec['mean'], spec['std'])
        return jnp.broadcast_to(floats, (*floats.shape[:-1], spec['channels']))

    return standardize


def prepared_shape(task: Task) -> tuple[int, ...]:
    """Height, width and channels of a prepared image."""
    images = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.uint8)
    return jax.eval_shape(task.prepare, images).shape[1:]


def load_weights(config: cfg.Config) -> Pretrained | None:
    """The pretrained weights that the config names, if it does.

    Errors:
        UserError: They cannot be had, or are not VGG16's.
    """
    if config.model.name != 'vgg16' or config.model.weights == 'random':
        return None
    return load('auto' if config.model.weights == 'imagenet' else config.model.weights)


def make_run(
    config: cfg.Config, description: dict[str, Any], weights: Pretrained | None = None
) -> tuple[Task, Steps]:
    """The task and the functions of a run.

    Args:
        config: A validated config.
        description: As `describe` gives it, with `preprocessing` under that name.
        weights: Pretrained weights of the backbone, for the first state.
    """
    examples = description['train']['count']
    steps_per_epoch = examples / config.data.batch
    task = Task(
        image_shape=tuple(description['image_shape']),
        num_classes=len(description['class_names']),
        prepare=preparation(description['preprocessing']),
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, int(config.train.epochs * steps_per_epoch + 1e-9)),
        initial=weights and (lambda shapes: {'backbone': insert(shapes['backbone'], weights)}),
    )
    return task, make_steps(config, task)


def parameter_table(config: cfg.Config, steps: Steps) -> str:
    """Which parameters are trained, frozen and penalized, with counts and bytes."""
    return params.overview(
        steps.shapes,
        train=steps.trainable,
        l2=steps.penalized if config.loss.l2 else (),
        decay=steps.decayed if config.optimizer.weight_decay else (),
    )
