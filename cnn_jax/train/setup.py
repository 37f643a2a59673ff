"""From a config and its data to the phases of a run.

Training, evaluation and prediction meet here. What prediction needs of the data (shape, classes,
preprocessing) is a small description that the manifest keeps, so it works without the data.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import params
from cnn_jax.backbones import BACKBONES
from cnn_jax.components import NO_COMPONENTS, Components, blamed_on
from cnn_jax.data.augment import normalize
from cnn_jax.data.batches import open_batches
from cnn_jax.data.source import as_source
from cnn_jax.data.sources import has_validation
from cnn_jax.data.splits import drawn, fold, held_out, part_of
from cnn_jax.errors import UserError
from cnn_jax.features import Extractor, FeatureBatches, cached_cut
from cnn_jax.mesh import Layout, make_mesh, on_process_zero
from cnn_jax.pretrained.weights import PREPROCESSINGS, Pretrained, insert, load
from cnn_jax.regularizers import class_weights
from cnn_jax.train.loop import Phase, compile_phase
from cnn_jax.train.program import Program, RunSpec, State, begin_phase, make_program, state_maker
from cnn_jax.train.step import check_step


def layout_of(config: cfg.Config, *, model: int = 1, fsdp: bool = False) -> Layout | None:
    """The layout of a run over all devices (as of `mesh.make_mesh`); None where there is one."""
    if jax.device_count() == model == 1:
        return None
    data = config.data
    sizes = data.batch // config.optimizer.accumulate, data.eval_batch or data.batch
    return make_mesh(jax.devices(), sizes, model=model, fsdp=fsdp)


@dataclass(frozen=True)
class Data:
    """The opened data of a run: the batches of both splits, and what a run must know of them.

    `train` are the images to train on, those that fold and seed draw from the training split
    (`pool`); `evaluate` the held-out ones where there are any, else `test`, the evaluation split.
    This is None if it was not asked for. `validation` is the source's own part to hold out.
    `description` is the result of `describe`, with `preprocessing` under that name; `weights` are
    the pretrained ones that the config names, if any.
    """

    train: Any
    evaluate: Any
    description: dict[str, Any]
    weights: Pretrained | None
    pool: Any = None
    test: Any = None
    validation: Any = None

    @property
    def held_out(self) -> Any:
        """The held-out batches; None where there are none."""
        return None if self.evaluate is self.test else self.evaluate


def open_data(
    config: cfg.Config,
    layout: Layout | None = None,
    components: Components = NO_COMPONENTS,
    test: bool = False,
) -> Data:
    """Open the splits, and the weights that the config names.

    Images are standardized by the whole training split, whatever part of it fold and seed draw.

    Args:
        config, layout, components: Those of the run.
        test: Whether to open the evaluation split where there are held-out images, too.
    """
    part: dict[str, Any] = {
        'process': (jax.process_index(), jax.process_count()),
        'sharding': layout.batch if layout else None,
    }
    own: Any = [None, None]
    if components.source:
        with blamed_on('your own source'):
            given = [components.source(config, split) for split in ('train', 'eval')]
        own[0] = as_source(given[0], 'the training data')
        names = own[0].class_names
        own[1] = as_source(given[1], 'the evaluation data', class_names=names)

    pool = open_batches(config.data, 'train', seed=config.seed, source=own[0], **part)
    share, validation, tested = config.data.validation_share, None, None
    if share and not components.source and has_validation(config.data):
        validation = open_batches(config.data, 'validation', **part)
    if (test or not config.data.holds_out) and not config.data.folds:
        tested = open_batches(config.data, 'eval', source=own[1], **part)
    data = deal(config, Data(None, None, {}, None, pool, tested, validation))
    description, weights = describe(config, data.train, data.evaluate), load_weights(config)
    if data.test:
        describe(config, data.train, data.test)  # refuses those that do not fit
    description['preprocessing'] = on_process_zero(lambda: preprocessing(config, pool, weights))
    description['class_weights'] = weights_of_classes(config, pool)
    return dataclasses.replace(data, description=description, weights=weights)


def for_arm(config: cfg.Config, data: Data) -> Data:
    """The opened data as another config on the same images takes them: its weights, their input.

    Data without images are as they were described.
    """
    if data.pool is None:
        return data
    weights = load_weights(config)
    facts = data.description | {
        'preprocessing': preprocessing(config, data.pool, weights),
        'class_weights': weights_of_classes(config, data.pool),
    }
    return dataclasses.replace(data, description=facts, weights=weights)


def training_images(config: cfg.Config, own: Any = None) -> Any:
    """The images that a run trains on; `own` as `Components.source` gives them."""
    pool = open_batches(config.data, 'train', seed=config.seed, source=own)
    if own is None and config.data.validation_share and has_validation(config.data):
        config = cfg.replace(config, {'data.validation_share': 0.0})
    return deal(config, Data(None, None, {}, None, pool)).train


def deal(config: cfg.Config, data: Data) -> Data:
    """The data with the images that a config's fold and seed draw, to train, choose and test on."""
    asked, pool, test, evaluate = config.data, data.pool, data.test, data.validation
    if asked.folds:
        rest, tested = fold(pool.labels, asked.fold, asked.folds)
        pool, test = pool.at(rest), pool.at(tested)
    reserved = asked.validation
    if asked.validation_share and not evaluate:
        reserved = max(1, round(asked.validation_share * pool.n))
    if data.evaluate and not asked.folds:  # the same for every seed
        evaluate = data.evaluate
    elif reserved:
        evaluate = pool.at(held_out(pool.labels, reserved))
    if asked.subset or reserved:
        pool = pool.at(drawn(pool.labels, asked.subset, config.seed, reserved))
    if asked.batch > pool.n:
        raise UserError(
            f'config.data.batch is {asked.batch}, but {pool.n} images are left; lower it'
        )
    return dataclasses.replace(data, train=pool, evaluate=evaluate or test, test=test)


def shared_images(config: cfg.Config, data: Data) -> list[str]:
    """A note, if slices of a source (`train[:500]` and `all[2000:]`) have images in common."""
    asked, test = config.data, data.test
    parts = {part_of(asked.train), part_of(asked.eval)}
    if asked.source == cfg.OWN or asked.folds or test is None or parts == {'train', 'test'}:
        return []
    trained = {data.pool.describe(i) for i in range(data.pool.n)}
    if not (shared := sum(test.describe(i) in trained for i in range(test.n))):
        return []
    return [
        f'note: {shared:,} of the {test.n:,} images of config.data.eval={asked.eval} are in '
        f'config.data.train={asked.train}, too; take two slices of one part that do not overlap'
    ]


def describe(config: cfg.Config, train, evaluation) -> dict[str, Any]:
    """The facts that a run must know of its splits, as JSON; UserError if they differ in kind."""
    if train.image_shape != evaluation.image_shape:
        raise UserError(
            f'the training images are {shape_text(train.image_shape)} but the evaluation images '
            f'are {shape_text(evaluation.image_shape)}; set config.data.resize, size and channels'
        )
    side, augment = min(train.image_shape[:2]), config.augment
    if augment.crop > side or augment.cutout >= 2 * side:
        raise UserError(
            f'the images have {side} pixels a side, of which config.augment.crop={augment.crop} or '
            f'config.augment.cutout={augment.cutout} would leave nothing; lower it'
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
    """The way from uint8 images to the network's input, as JSON.

    Pretrained weights bring their own; else each channel is standardized by the training split.
    A backbone without pretrained weights sees the same three channels.
    """
    if weights:
        return {
            'kind': weights.preprocessing.name,
            'weights': weights.digest,
            'licence': f'{BACKBONES[config.model.name].TITLE}: {weights.licence}. '
            f'{weights.citation}',
        }
    mean, std = train.moments
    return {
        'kind': 'standardize',
        'mean': mean.tolist(),
        'std': std.tolist(),
        'channels': 3 if config.model.name in BACKBONES else len(mean),
    }


def weights_of_classes(config: cfg.Config, pool: Any) -> list[float]:
    """The weights of the classes in the loss, by the whole training split; [] where alike."""
    counts = np.bincount(pool.labels, minlength=len(pool.class_names))
    return class_weights(config.loss.class_weights, counts, pool.class_names)


def shape_text(shape: tuple[int, ...]) -> str:
    """`28×28×1`."""
    return '×'.join(map(str, shape))


def preparation(spec: dict[str, Any]) -> Callable:
    """The function from uint8 images to the network's floats that `preprocessing` describes."""
    if spec['kind'] != 'standardize':
        return PREPROCESSINGS[spec['kind']]

    def standardize(images):
        floats = normalize(images, spec['mean'], spec['std'])
        return jnp.broadcast_to(floats, (*floats.shape[:-1], spec['channels']))

    return standardize


def prepared_shape(spec: RunSpec) -> tuple[int, ...]:
    """Height, width and channels of a prepared image."""
    images = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.uint8)
    return jax.eval_shape(spec.prepare, images).shape[1:]


def load_weights(config: cfg.Config) -> Pretrained | None:
    """The pretrained weights that the config names, if it does."""
    model = config.model
    if model.name not in BACKBONES or model.weights == 'random':
        return None
    source = 'auto' if model.weights == 'imagenet' else model.weights
    return load(source, backbone=model.name)


def make_spec(
    config: cfg.Config,
    description: dict[str, Any],
    weights: Pretrained | None = None,
    components: Components = NO_COMPONENTS,
) -> RunSpec:
    """Put together what the steps must know of a run besides its config, from a `Data`."""
    count = description['train']['count']

    def pretrained(variables: dict[str, Any]) -> dict[str, Any]:
        assert weights is not None
        # A layer's parameters and its statistics have different names.
        own = {kind: tree.get('backbone', {}) for kind, tree in variables.items()}
        flat = {kind: params.flatten(tree) for kind, tree in own.items()}
        given = params.flatten(insert(params.merge(*flat.values()), weights))
        return {
            kind: {'backbone': params.unflatten({name: given[name] for name in names})}
            for kind, names in flat.items()
        }

    return RunSpec(
        image_shape=tuple(description['image_shape']),
        num_classes=len(description['class_names']),
        prepare=preparation(description['preprocessing']),
        steps_per_epoch=count / config.data.batch,
        phase_ends=cfg.phase_ends(config, count),
        pretrained=pretrained if weights else None,
        class_weights=tuple(description.get('class_weights', ())),
        model=components.model,
        optimizer=components.optimizer,
        regularizers=components.regularizers,
    )


def make_programs(config: cfg.Config, spec: RunSpec) -> list[Program]:
    """The programs of a run's phases.

    A phase takes features of the backbone's frozen layers instead of images, where that gives the
    same training (`features.cached_cut`).
    """
    programs = [make_program(config, spec, phase) for phase in range(len(spec.phase_ends))]
    for phase, program in enumerate(programs):
        need_images = [r.field for r in program.regularizers if r.needs_images]
        facts = config, spec.network(config), prepared_shape(spec)
        if cut := cached_cut(*facts, program.trainable, need_images):
            programs[phase] = dataclasses.replace(program, cached=cut)
    if spec.model or spec.optimizer or spec.regularizers or config.optimizer.arguments:
        own = spec.model or spec.optimizer or spec.regularizers
        with blamed_on('your own part' if own else 'config.optimizer.arguments'):
            check_step(programs[0])
    return programs


def open_phases(
    config: cfg.Config, data: Data, spec: RunSpec, layout: Layout | None = None
) -> tuple[list[Phase], State]:
    """The phases of a run, and its state before the first step."""
    programs = make_programs(config, spec)
    state = state_maker(programs[0])(config.seed)
    state = with_scale(config, data.description, spec, state, data.train)
    phases, shapes = [], jax.eval_shape(lambda: state)
    for program, end in zip(programs, spec.phase_ends):
        train, evaluate = data.train, data.evaluate
        if program.cached:
            train, evaluate = features(
                program, data.description, state, train, evaluate, layout=layout
            )
        if program.phase:
            shapes = jax.eval_shape(functools.partial(begin_phase, program), shapes)
        phases.append(compile_phase(program, end, shapes, layout, train=train, evaluate=evaluate))
    return phases, state


def with_scale(
    config: cfg.Config, description: dict[str, Any], spec: RunSpec, state: State, train: Any
) -> State:
    """The state before the first step with `models.Scale` fitted, if `model.scale_features` asks.

    Mean and deviation of each channel are those of the training images' features, not augmented;
    where there is no deviation, it is 1.
    """
    if not config.model.scale_features or config.model.name == cfg.OWN:
        return state
    count, total, squares = 0, np.zeros(()), np.zeros(())
    rows = _extractor(config, description, spec, state).extract(train)
    for first in range(0, train.n, 256):
        values = rows[np.arange(first, min(first + 256, train.n))].astype(np.float64)
        if config.model.pool == 'average':
            values = values.mean(axis=(1, 2))
        values = values.reshape(-1, values.shape[-1])
        count += len(values)
        total, squares = total + values.sum(0), squares + np.square(values).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    fitted = {'mean': mean, 'deviation': np.where(deviation > 1e-6, deviation, 1)}
    statistics = params.flatten(state.batch_stats)
    statistics |= {f'head/scale/{k}': jnp.asarray(v, jnp.float32) for k, v in fitted.items()}
    fresh = params.unflatten(statistics)
    again = jax.tree.map(jnp.copy, fresh) if config.train.precise_norm else state.eval_batch_stats
    return dataclasses.replace(state, batch_stats=fresh, eval_batch_stats=again)


def _extractor(
    config: cfg.Config, description: dict[str, Any], spec: RunSpec, state: State
) -> Extractor:
    preprocessing = description['preprocessing']
    network: Any = spec.network(config)  # its last layer by name, as `features` names it
    config = cfg.replace(config, {'model.cut': network.frozen_layers(())[-1]})
    return Extractor(config, spec.num_classes, spec.prepare, preprocessing, state.backbone)


def features(
    program: Program,
    description: dict[str, Any],
    state: State,
    train,
    *evaluated,
    layout: Layout | None = None,
) -> list[FeatureBatches]:
    """The features that a phase takes in place of images, computed where they are not cached.

    `state` is any of the run's; of the batches, those to train on are augmented if the config
    says so, and the `evaluated` are as they are.
    """
    spec, config = program.spec, cfg.replace(program.config, {'model.cut': program.cached})
    trained = [f'params/{path}' for path in program.trainable]
    frozen = params.unflatten(params.partition(state.backbone, trained)[1])
    preparing = spec.prepare, description['preprocessing']
    extractor = Extractor(config, spec.num_classes, *preparing, frozen)
    augments = config.augment != cfg.Augment()
    if augments and config.train.precise_norm:
        raise UserError(
            'config.train.precise_norm takes statistics of images as they are, but the cached '
            'features are those of augmented ones; set it to 0, or config.features.cache to never'
        )
    views = range(config.features.views) if augments else [None]
    of_views = [extractor.extract(train, view) for view in views]
    plain = [extractor.extract(split) for split in evaluated]
    return [
        FeatureBatches(train, of_views, config.data, 'train', config.seed, layout),
        *(
            FeatureBatches(split, [rows], config.data, 'eval', 0, layout)
            for split, rows in zip(evaluated, plain)
        ),
    ]
