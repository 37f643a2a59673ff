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
from cnn_jax.train.step import Steps, Task, make_steps


def describe(config: cfg.Config, train, evaluation) -> dict[str, Any]:
    """What a run must know of its data, as JSON.

    Args:
        config: The config.
        train, evaluation: The opened batches of both splits.

    Errors:
        UserError: The splits differ in shape or classes, or a batch is larger than the data.
    """
    if train.image_shape != evaluation.image_shape:
        raise UserError(
            f'the training images are {shape_text(train.image_shape)} but the evaluation images '
            f'are {shape_text(evaluation.image_shape)}; set config.data.resize, size and channels'
        )
    if train.class_names != evaluation.class_names:
        raise UserError(
            f'the training classes {list(train.class_names)} are not the evaluation classes '
            f'{list(evaluation.class_names)}'
        )
    mean, std = statistics(train)
    return {
        'source': config.data.source,
        'train': {'count': train.n, 'fingerprint': train.fingerprint},
        'eval': {'count': evaluation.n, 'fingerprint': evaluation.fingerprint},
        'class_names': list(train.class_names),
        'image_shape': list(train.image_shape),
        'preprocessing': {'mean': [float(m) for m in mean], 'std': [float(s) for s in std]},
    }


def shape_text(shape: tuple[int, ...]) -> str:
    """`28×28×1`."""
    return '×'.join(map(str, shape))


def preparation(description: dict[str, Any]) -> Callable:
    """The function from uint8 images to the floats that the network was trained on."""
    mean, std = (description['preprocessing'][name] for name in ('mean', 'std'))
    return lambda images: normalize(images, mean, std)


def prepared_shape(task: Task) -> tuple[int, ...]:
    """Height, width and channels of a prepared image."""
    images = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.uint8)
    return jax.eval_shape(task.prepare, images).shape[1:]


def make_run(
    config: cfg.Config, description: dict[str, Any], initial: params.Flat | None = None
) -> tuple[Task, Steps]:
    """The task and the functions of a run.

    Args:
        config: A validated config.
        description: As `describe` gives it.
        initial: Parameters that replace freshly drawn ones, by path.
    """
    examples = description['train']['count']
    steps_per_epoch = examples / config.data.batch
    task = Task(
        image_shape=tuple(description['image_shape']),
        num_classes=len(description['class_names']),
        prepare=preparation(description),
        steps_per_epoch=steps_per_epoch,
        total_steps=max(1, int(config.train.epochs * steps_per_epoch + 1e-9)),
        initial=initial,
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
