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
from cnn_jax.data.augment import normalize
from cnn_jax.data.batches import open_batches, statistics
from cnn_jax.errors import UserError
from cnn_jax.features import Extractor, FeatureBatches, is_cached
from cnn_jax.mesh import Layout, make_mesh, on_process_zero
from cnn_jax.pretrained.weights import PREPROCESSINGS, Pretrained, insert, load
from cnn_jax.train.loop import Phase
from cnn_jax.train.state import State
from cnn_jax.train.step import Steps, make_steps
from cnn_jax.train.task import Task


def layout_of(config: cfg.Config, *, model: int = 1, fsdp: bool = False) -> Layout | None:
    """The layout of a run over all devices there are; None where there is one.

    Args:
        config: A validated config.
        model, fsdp: As `mesh.make_mesh` takes them.
    """
    if jax.device_count() == model == 1:
        return None
    data = config.data
    sizes = data.batch // config.optimizer.accumulate, data.eval_batch or data.batch
    return make_mesh(jax.devices(), sizes, model=model, fsdp=fsdp)


def open_data(
    config: cfg.Config, layout: Layout | None = None
) -> tuple[Any, Any, dict[str, Any], Pretrained | None]:
    """The batches of both splits, their description, and the weights that the config names.

    Args:
        config: A validated config.
        layout: Of batches, on several devices.

    Returns:
        Training batches; evaluation batches; what `describe` and, under that name,
        `preprocessing` give; the weights, if any.

    Errors:
        UserError: Data or weights cannot be had, or the splits do not fit each other.
    """
    part = {
        'process_index': jax.process_index(),
        'process_count': jax.process_count(),
        'sharding': layout and layout.batch,
    }
    train = open_batches(config.data, 'train', seed=config.seed, **part)
    evaluation = open_batches(config.data, 'eval', **part)
    description, weights = describe(config, train, evaluation), load_weights(config)
    description['preprocessing'] = on_process_zero(lambda: preprocessing(config, train, weights))
    return train, evaluation, description, weights


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
        return {
            'kind': weights.preprocessing.name,
            'weights': weights.digest,
            'licence': f'Convolutions: {weights.licence}. {weights.citation}',
        }
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


def make_task(
    config: cfg.Config, description: dict[str, Any], weights: Pretrained | None = None
) -> Task:
    """What a run is about.

    Args:
        config: A validated config.
        description: As `describe` gives it, with `preprocessing` under that name.
        weights: Pretrained weights of the backbone, for the first state.
    """
    steps_per_epoch = description['train']['count'] / config.data.batch
    epochs = [config.train.epochs]
    if config.unfreeze.epochs:
        epochs.append(config.train.epochs + config.unfreeze.epochs)
    return Task(
        image_shape=tuple(description['image_shape']),
        num_classes=len(description['class_names']),
        prepare=preparation(description['preprocessing']),
        steps_per_epoch=steps_per_epoch,
        ends=tuple(max(1, int(e * steps_per_epoch + 1e-9)) for e in epochs),
        initial=weights and (lambda shapes: {'backbone': insert(shapes['backbone'], weights)}),
    )


def make_phases(config: cfg.Config, task: Task) -> list[Steps]:
    """The functions of each phase of a run.

    A phase with a frozen backbone takes the backbone's features instead of images, where that
    gives the same training (`features.is_cached`).
    """
    phases = []
    for number in range(len(task.ends)):
        steps = make_steps(config, task, number)
        if is_cached(config, steps.trainable):
            steps = make_steps(config, task, number, cached=True)
        phases.append(steps)
    return phases


def open_phases(
    config: cfg.Config,
    description: dict[str, Any],
    task: Task,
    train,
    evaluation,
    layout: Layout | None = None,
) -> tuple[list[Phase], State]:
    """The phases of a run, and its state before the first step.

    Args:
        config: A validated config.
        description: As `describe` gives it, with `preprocessing` under that name.
        task: Of `make_task`.
        train, evaluation: The opened batches of images.
        layout: Of batches, on several devices.
    """
    made = make_phases(config, task)
    state = made[0].init(config.seed)
    phases = []
    for steps, end in zip(made, task.ends):
        batches = train, evaluation
        if steps.cached:
            batches = features(config, description, task, state, train, evaluation, layout=layout)
        phases.append(Phase(steps, end, *batches))
    return phases, state


def features(
    config: cfg.Config,
    description: dict[str, Any],
    task: Task,
    state: State,
    train,
    *evaluated,
    layout: Layout | None = None,
) -> list[FeatureBatches]:
    """The frozen backbone's features in the place of images, computed where they are not kept.

    Args:
        config, description, task: As in `open_phases`.
        state: Any of the run's: the backbone is frozen.
        train: Batches of images to train on, augmented if the config says so.
        evaluated: Batches of images as they are.
        layout: Of batches, on several devices.
    """
    extractor = Extractor(
        config,
        task.num_classes,
        task.prepare,
        description['preprocessing'],
        state.params['backbone'],
    )
    augments = config.augment != cfg.Augment()
    if augments and config.train.precise_norm:
        raise UserError(
            'config.train.precise_norm takes statistics of images as they are, but the kept '
            'features are those of augmented ones; set it to 0, or config.features.cache to never'
        )
    views = range(config.features.views) if augments else [None]
    of_train = [extractor.extract(train, view) for view in views]
    return [
        FeatureBatches(train, of_train, config.data, 'train', config.seed, layout),
        *(
            FeatureBatches(split, [extractor.extract(split)], config.data, 'eval', 0, layout)
            for split in evaluated
        ),
    ]


def parameter_table(config: cfg.Config, steps: Steps) -> str:
    """Which parameters a phase trains, freezes and penalizes, with counts and bytes."""
    return params.overview(
        steps.shapes,
        train=steps.trainable,
        l2=steps.penalized['l2'] if config.loss.l2 else (),
        decay=steps.decayed if config.optimizer.weight_decay else (),
    )
