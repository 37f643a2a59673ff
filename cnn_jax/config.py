"""The configuration of an experiment: its fields, its length, JSON.

An experiment file holds one function, `get_config() -> Config`. A launcher applies the
`--config.a.b=value` overrides to the object, validates it, and writes it to the work directory as
`config.json`. What a field may hold and what it applies to stands at the field (`cnn_jax.fields`).

  config = Config(model=Model(widths=(32, 64)), loss=Loss(l2=5e-4))
  config = replace(config, {'optimizer.learning_rate': 1e-3})
"""

import json
from dataclasses import dataclass, field
from typing import Any

from cnn_jax.errors import UserError
from cnn_jax.fields import (  # noqa: F401  (what others reach as `config.NAME`)
    OWN,
    Fields,
    bind,
    choice,
    content_hash,
    differences,
    fields_by_path,
    get,
    is_on,
    leaves,
    needs,
    number,
    optional,
    replace,
    setting,
    structure,
    to_flat,
    to_json,
    traced,
    traced_values,
    without_noise,
)
from cnn_jax.validation import is_read, unread, validate  # noqa: F401

STRIDED: dict[str, Any] = {'only_for': ('strided_net',)}
NORMED_BACKBONES = 'efficientnet_lite0', 'resnet50', 'resnet50_v1'
BACKBONE: dict[str, Any] = {'only_for': ('vgg16', *NORMED_BACKBONES)}
BATCH_NORMS = 'batch', 'ghost', 'renorm'
NORMS = *BATCH_NORMS, 'group', 'layer', 'instance'
RULES = 'adam', 'adamw', 'sgd'  # of this package; others are Optax's
KEPT: dict[str, Any] = {'kept': True}
EPOCHS: dict[str, Any] = {'high': 1e6}
SIDE: dict[str, Any] = {'high': 2**14}  # in pixels
WIDTH: dict[str, Any] = {'low': 1, 'high': 2**20}
STEM = STRIDED | needs('model.stem_width')
DROPOUT = STRIDED | needs('model.dropout')
HEAD = needs('model.hidden')
ERASING = needs('augment.erasing')
ADAM = needs('optimizer.name', of=('adam', 'adamw'))
SGD = needs('optimizer.name', of=('sgd',))
SECOND_PHASE = needs('unfreeze.epochs')
TABLE = needs('data.source', of=lambda source: source.startswith(('csv:', 'parquet:')))
CACHED = BACKBONE | needs('train.frozen')


def normed(*kinds: str) -> dict[str, Any]:
    """The fact that only these kinds of normalization read a field."""
    return needs('model.norm', 'model.head_norm', of=kinds)


# Of batch normalization, which some backbones have, whatever the config's fields name.
MOVING: dict[str, Any] = needs(
    *('model.norm', 'model.head_norm', 'model.name'), of=(*BATCH_NORMS, *NORMED_BACKBONES)
)


GHOST_AS_BATCH = {'ghost': 'batch'}  # pooled statistics lack the variance between the groups


@dataclass
class Model(Fields):
    """The network.

    `strided_net` is: an optional stem convolution (no activation, no normalization), then for
    each width a pair Conv(stride 1), Conv(stride `stride`), each followed by activation and
    normalization, then dropout; then Flatten, the hidden Dense layers with activation,
    normalization and dropout, and the output Dense layer.

    The others are published networks (`cnn_jax.backbones`) up to `cut`, then the same head. `own`
    is a Flax module that the caller of `fit` or the experiment file brings; it may read any of
    these fields.
    """

    name: str = choice('strided_net', *BACKBONE['only_for'], OWN, **KEPT)
    outputs: int = number(0, **KEPT)  # 0: one per class (softmax); 1: one sigmoid for two classes
    dtype: str = choice('float32', 'bfloat16', **KEPT)  # of computations, not parameters
    # which 3×3 convolutions of stride 1 take its short cut on a CPU
    winograd: str = choice(
        'always', 'frozen', 'never', before='frozen', **needs('model.dtype', of=('float32',))
    )

    # strided_net
    stem_width: int = number(16, high=2**20, **STRIDED)  # 0: no stem
    stem_kernel: int = number(7, low=1, **SIDE, **STEM)
    stem_stride: int = number(2, low=1, **SIDE, **STEM)
    stem_padding: str = choice('VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT', **STEM)
    widths: tuple[int, ...] = number((32, 64, 128), **WIDTH, **STRIDED)
    kernel: int = number(3, low=1, **SIDE, **STRIDED)
    stride: int = number(2, low=1, **SIDE, **STRIDED)  # of the second convolution of each pair
    padding: str = choice('SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT', **STRIDED)
    downsample: str = choice('stride', 'max_pool', 'avg_pool', **STRIDED)  # by what a pair shrinks
    activation: str = choice(
        *('relu', 'leaky_relu', 'elu', 'gelu', 'silu', 'tanh'),
        **needs('model.widths', 'model.hidden'),
    )
    weight_standardization: bool = setting(False, **STRIDED)  # of the kernels, filter by filter
    residual: bool = setting(False, **STRIDED)  # a shortcut around each pair
    norm: str = choice(*NORMS, 'none', **STRIDED, noiseless=GHOST_AS_BATCH)
    norm_position: str = choice('after', 'before', **normed(*NORMS))  # the activation
    # share of the old moving average that is kept
    norm_momentum: float = traced(0.99, high=1, **MOVING)
    norm_epsilon: float = number(1e-3, **normed(*NORMS))
    norm_groups: int = number(8, **WIDTH, **normed('group'))  # parts that share statistics
    ghost_batch: int = number(16, **WIDTH, **normed('ghost'))  # examples that share statistics
    renorm_r: float = traced(3.0, low=1, high=1e6, noiseless=1.0, **normed('renorm'))  # in [1/r, r]
    # the mean's correction is in [-d, d]
    renorm_d: float = traced(5.0, high=1e6, noiseless=0.0, **normed('renorm'))
    dropout: float = traced(0.25, high=1, **STRIDED, noiseless=0.0)  # after each pair
    drop_kind: str = choice('element', 'channel', 'block', 'gaussian', **DROPOUT)
    # side of the squares, in pixels of the feature map
    drop_block: int = number(7, low=1, **SIDE, **STRIDED, **needs('model.drop_kind', of=('block',)))
    # share of training in which dropout grows from 0
    drop_ramp: float = optional(0.0, high=1, **DROPOUT)
    stochastic_depth: float = traced(0.0, high=1, **STRIDED, noiseless=0.0)  # rate of the last pair
    # deviation of noise added to the normalized images
    input_noise: float = traced(0.0, **STRIDED, noiseless=0.0)

    # a backbone
    # random | imagenet | a file (.h5, .keras, .onnx, .safetensors, .pth)
    weights: str = setting('random', path=True, **BACKBONE)
    # the layer whose output the head sees; '': the last
    cut: str = setting('', before='block5_pool', **BACKBONE)
    pool: str = choice('flatten', 'average')  # what joins backbone and head
    # whether the head reads features of mean 0 and deviation 1 over the training images
    scale_features: bool = setting(False, **BACKBONE)

    # head
    hidden: tuple[int, ...] = number((512,), **WIDTH)
    head_norm: str = choice(
        *BATCH_NORMS, 'group', 'layer', 'none', noiseless=GHOST_AS_BATCH, **HEAD
    )
    head_dropout: float = traced(0.5, high=1, noiseless=0.0, **HEAD)


@dataclass
class Data(Fields):
    """The images: their source, and their way to the network."""

    # mnist_5k | digits | tfds:NAME | folder:PATH | idx:PATH | csv:FILE | parquet:FILE | own
    source: str = 'mnist_5k'
    # columns of a csv: or parquet: table; '': one with a usual name (`cnn_jax.data.tables`)
    path_column: str = setting('', **TABLE)
    label_column: str = setting('', **TABLE)
    split_column: str = setting('', **TABLE)
    data_dir: str = setting(
        '', path=True, **needs('data.source', of=lambda source: source.startswith('tfds:'))
    )  # where TFDS keeps prepared sets; '' is TFDS's default
    train: str = 'train'  # a split, e.g. train, train[:80%], train[:500]
    eval: str = 'test'
    subset: int = number(0, high=2**31 - 1)  # images of `train` that each seed draws; 0: all
    # images held out of `train`, to choose and stop by instead of `eval`; 0: none
    validation: int = number(0, high=2**31 - 1)
    # the same as a share of `train`; a validation part of the source's own goes first
    validation_share: float = number(0.0, high=0.9)
    # parts that `train` is divided into, of which number `fold` is the evaluation split; 0: none
    folds: int = number(0, high=2**31 - 1)
    fold: int = number(0, high=2**31 - 1, **needs('data.folds'))
    classes: tuple[str, ...] = ()  # only these classes, renumbered in this order; (): all
    resize: str = choice('none', 'stretch', 'crop')  # crop: short side, then centre
    size: int = number(0, **SIDE)  # height and width after resize, in pixels; 0 keeps the source's
    channels: int = choice(0, 1, 3)  # 0 keeps the source's
    batch: int = number(32, low=1, high=2**20)  # examples a step, over all devices
    eval_batch: int = number(0, high=2**20)  # 0: same as batch
    max_corrupt: float = number(
        0.01, high=1, **needs('data.source', of=lambda source: ':' in source)
    )  # share of unreadable images that may be skipped
    # Draw each class equally often in training; an epoch is as many draws as there are images.
    balance: bool = False
    stream: str = choice('auto', 'never', 'always')  # read batches from the source at each step
    memory_gb: float = number(4.0, **needs('data.stream', of=('auto',)))  # larger sets stream

    @property
    def holds_out(self) -> bool:
        """Return whether there are images to choose and to stop by, besides the test images."""
        return bool(self.validation or self.validation_share)


@dataclass
class Augment(Fields):
    """Random changes to the training images, made on the device, keyed by example."""

    flip: bool = False  # left-right, with probability 1/2
    crop: int = number(0, **SIDE)  # pad by this many pixels on each side, then crop back at random
    cutout: int = number(0, **SIDE)  # side of a square set to the mean, in pixels
    rotation: float = optional(0.0, high=180)  # largest angle either way, in degrees
    erasing: float = optional(0.0, high=1)  # probability that a rectangle is lost
    erase_least: float = traced(0.02, high=1, **ERASING)  # its area, as a share of the image's
    erase_most: float = traced(0.4, high=1, **ERASING)
    # least height : width; at most its inverse
    erase_aspect: float = traced(0.3, low=0.01, high=1, **ERASING)
    brightness: float = optional(0.0)  # the factor is uniform in 1 ± this, at least 0
    contrast: float = optional(0.0)
    saturation: float = optional(0.0)  # of images with three channels
    randaugment: float = optional(0.0, high=30)  # magnitude of its operations
    randaugment_operations: int = number(2, high=20, **needs('augment.randaugment'))  # an image
    trivialaugment: float = optional(0.0, high=1)  # probability of its one operation
    mixup: float = optional(0.0)  # α of λ ~ Beta(α, α), the share of the own image
    cutmix: float = optional(0.0)  # α; with both on, each has half of the examples


@dataclass
class Loss(Fields):
    """Task loss and regularizers (equations in `cnn_jax.regularizers`)."""

    label_smoothing: float = traced(0.0, high=1)
    class_weights: str = ''  # of an example's loss: balanced, or one number per class, e.g. '1,2.5'
    focal: float = optional(0.0)  # γ of −(1 − p)^γ·log p, p the probability of the label
    confidence_penalty: float = optional(0.0)  # β of −β·H(p), H the prediction's entropy
    l2: float = traced(0.0)  # λ of λ·Σw² added to the loss (Keras's definition, no 1/2)
    l2_on: tuple[str, ...] = setting(('*conv*/kernel',), **needs('loss.l2'))  # path patterns
    l1: float = optional(0.0)  # λ of λ·Σ|w|
    l1_on: tuple[str, ...] = setting(('*conv*/kernel',), **needs('loss.l1'))
    orthogonality: float = optional(0.0)  # λ of λ·Σ‖WᵀW − I‖², a filter a column of W
    orthogonality_on: tuple[str, ...] = setting(('*conv*/kernel',), **needs('loss.orthogonality'))
    l2_sp: float = optional(0.0)  # λ of λ·Σ(w − w⁰)², w⁰ the weights at the start
    # not the new head, which `l2_on` may name
    l2_sp_on: tuple[str, ...] = setting(('*conv*/*',), **needs('loss.l2_sp'))
    activity_l1: float = optional(0.0)  # λ of λ·Σ|a|, a an example's layer outputs
    # layer path patterns
    activity_l1_on: tuple[str, ...] = setting(('*conv*', '*dense*'), **needs('loss.activity_l1'))
    input_gradient: float = optional(0.0)  # λ of λ·‖∂ℓ/∂x‖², x the prepared image
    r_drop: float = optional(
        0.0,
        **needs('model.dropout', 'model.head_dropout', 'model.stochastic_depth'),
    )  # α: two dropout masks shall predict alike
    own: float = optional(1.0)  # factor of the regularizers that an experiment file brings


@dataclass
class Optimizer(Fields):
    """Update rule and learning-rate schedule (equations in `cnn_jax.optim`)."""

    name: str = setting('adam', **KEPT)  # adam | sgd | adamw | any in optax or optax.contrib | own
    arguments: tuple[str, ...] = setting(
        (), **needs('optimizer.name', of=lambda name: name not in RULES)
    )  # of one that Optax names, e.g. ('b1=0.95', 'weight_decay=0.1')
    learning_rate: float = traced(1e-4)
    schedule: str = choice('constant', 'cosine', 'step', 'inverse_time')
    warmup_epochs: float = number(0.0, **EPOCHS)
    # inverse_time: rate; step: factor at each boundary
    decay_rate: float = traced(0.0, **needs('optimizer.schedule', of=('step', 'inverse_time')))
    decay_steps: int = number(
        1, low=1, high=2**31 - 1, **needs('optimizer.schedule', of=('inverse_time',))
    )  # steps between decays
    boundaries: tuple[float, ...] = number(
        (), **EPOCHS, **needs('optimizer.schedule', of=('step',))
    )  # epochs at which the rate is multiplied
    momentum: float = traced(0.9, high=1, **SGD)
    nesterov: bool = setting(False, **SGD)
    b1: float = traced(0.9, high=1, **ADAM)
    b2: float = traced(0.999, high=1, **ADAM)
    epsilon: float = traced(1e-7, **ADAM)  # Keras's number; see `optim.make_optimizer`
    # decoupled: w ← w − lr·weight_decay·w
    weight_decay: float = traced(0.0, **needs('optimizer.name', of=RULES))
    decay_on: tuple[str, ...] = setting(('*/kernel',), **needs('optimizer.weight_decay'))
    clip_norm: float = number(0.0, **KEPT)  # 0: no clipping of the global gradient norm
    gradient_noise: float = optional(0.0, **KEPT)  # η of the noise's variance η/(1 + t)^0.55
    max_norm: float = optional(0.0, **KEPT)  # largest norm of an output unit's weights; 0: any
    max_norm_on: tuple[str, ...] = setting(('*/kernel',), **KEPT, **needs('optimizer.max_norm'))
    sam: float = optional(0.0, **KEPT)  # ρ: the gradient is taken this far uphill; two passes
    accumulate: int = number(1, low=1, **KEPT)  # micro-batches a step


@dataclass
class Train(Fields):
    """The length of a run, its evaluations and checkpoints."""

    epochs: float = number(10.0, **EPOCHS)
    frozen: tuple[str, ...] = ()  # parameter path patterns that are not trained
    ema: float = optional(0.0, high=0.999999)  # decay of the weights' moving average; 0: none
    swa_from: float = optional(0.0, **EPOCHS)  # epochs after which weights are averaged equally
    precise_norm: int = number(0, high=2**20, **MOVING)  # batches to estimate them
    eval_every: float = number(1.0, **EPOCHS)  # epochs
    checkpoint_every: float = number(1.0, **EPOCHS)  # epochs
    keep: int = number(2, low=2, high=2**20)  # latest checkpoints kept, besides the best
    best: str = choice('accuracy', 'loss')  # on the evaluation split
    patience: float = number(0.0, **EPOCHS)  # epochs without a better `best` that end the run
    # points of what the experiment tunes that are tried on the held-out images before the run
    trials: int = number(0, high=1000)
    threads: int = number(0, high=1024)  # of a computation on a CPU; 0: one for each core


@dataclass
class Unfreeze(Fields):
    """A second phase, which trains more of the network; it starts after `train.epochs`.

    What the first phase trained keeps its optimizer state and learning rate; what is new starts
    with fresh ones.
    """

    epochs: float = number(0.0, **EPOCHS)  # 0: there is no second phase
    frozen: tuple[str, ...] = setting((), **SECOND_PHASE)  # path patterns that stay so
    learning_rate: float = traced(1e-5, **SECOND_PHASE)  # of what is newly trained
    depth_decay: float = traced(1.0, **SECOND_PHASE)  # its factor a block from the head


@dataclass
class Features(Fields):
    """Outputs of a frozen backbone, computed once and kept in the user's cache folder."""

    cache: str = choice('auto', 'always', 'never', **CACHED)  # auto: where the backbone is frozen
    views: int = number(0, high=1000, **CACHED)  # kept augmented views; 0: none is cached
    dtype: str = choice('float32', 'bfloat16', **CACHED)  # of the kept features


@dataclass
class Config(Fields):
    """One run. `seed` decides initial weights, data order, augmentation and dropout."""

    seed: int = number(0, high=2**32 - 1)
    own: str = ''  # digest of what the user brings (`cnn_jax.components`), set when the run starts
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    unfreeze: Unfreeze = field(default_factory=Unfreeze)
    features: Features = field(default_factory=Features)


def phase_ends(config: Config, examples: int) -> tuple[int, ...]:
    """The step after which each phase of a run on so many training examples is over."""
    epochs = [config.train.epochs]
    if config.unfreeze.epochs:
        epochs.append(config.train.epochs + config.unfreeze.epochs)
    per_epoch = examples / config.data.batch
    return tuple(max(1, int(min(e * per_epoch, 2**53) + 1e-9)) for e in epochs)


def averaging_notes(config: Config, steps: int) -> list[str]:
    """The sentences on what an average of the weights over so many steps is not.

    After T steps with decay d, a share of d^T of the average is still the initial weights. Batch
    norm's running averages are those of the weights that were trained.
    """
    notes, decay = [], config.train.ema
    if decay or config.train.swa_from:
        moving = config.model.name != OWN and is_read(config, 'train.precise_norm')
        if moving and not config.train.precise_norm:
            notes.append(
                'the averaged weights are evaluated with the batch statistics of the others; '
                'config.train.precise_norm=10 takes their own'
            )
    if not decay or (share := decay**steps) <= 0.1:
        return notes
    start = (
        f'with config.train.ema={decay:g}, {share:.0%} of the averaged weights that are evaluated '
        f'after {steps:,} steps are the initial ones; {0.1 ** (1 / steps) - 5e-7:.6f} leaves 10%'
    )
    return [*notes, start]


def without_length(config: Config) -> Config:
    """The config with the default `train.epochs` where no step depends on the run's length.

    Runs that are equal in this have the same steps, as far as both go.
    """
    optimizer, model = config.optimizer, config.model
    if config.own or optimizer.schedule == 'cosine' or config.unfreeze.epochs or model.drop_ramp:
        return config
    return replace(config, {'train.epochs': Train().epochs})


def from_json(text: str) -> Config:
    """Return the config that `to_json` wrote, in this version or an older one; or a UserError."""
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError('it is not an object')
        flat = dict(leaves(tree))
    except (ValueError, RecursionError) as error:
        raise UserError(f'the configuration is not JSON: {error}') from error
    return replace(Config(), flat)
