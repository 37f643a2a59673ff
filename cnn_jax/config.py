"""What an experiment is: typed fields, content hash, difference.

An experiment file holds one function, `get_config() -> Config`. A launcher applies the
`--config.a.b=value` overrides to the object, validates it (`cnn_jax.validation`), and writes it to
the work directory as `config.json`.

Fields declared with `value()` or `switched()` are *values, not structure*: they enter the compiled
step as arguments, so runs that differ only in them share one compilation (see `values`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cnn_jax.errors import UserError
from cnn_jax.fields import choice, number, switched, value
from cnn_jax.fields import fields_by_path as fields_by_path
from cnn_jax.fields import get as get
from cnn_jax.fields import replace as replace
from cnn_jax.fields import to_flat as to_flat
from cnn_jax.fields import unknown_key as unknown_key


@dataclass
class Model:
    """The network.

    `strided_net` is: an optional stem convolution (no activation, no normalization), then for
    each width a pair Conv(stride 1), Conv(stride `stride`), each followed by activation and
    normalization, then dropout; then Flatten, the hidden Dense layers with activation,
    normalization and dropout, and the output Dense layer.

    `vgg16` is the 13 convolutions of VGG16 up to `cut`, then the same head.
    """

    name: str = choice('strided_net', 'vgg16')
    outputs: int = number(0)  # 0: one per class (softmax); 1: one sigmoid for two classes
    dtype: str = choice('float32', 'bfloat16')  # of computations; parameters are always float32

    # strided_net
    stem_width: int = number(16)  # 0: no stem
    stem_kernel: int = number(7, low=1)
    stem_stride: int = number(2, low=1)
    stem_padding: str = choice('VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT')
    widths: tuple[int, ...] = number((32, 64, 128), low=1)
    kernel: int = number(3, low=1)
    stride: int = number(2, low=1)  # of the second convolution of each pair
    padding: str = choice('SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT')
    downsample: str = choice('stride', 'max_pool', 'avg_pool')  # how a pair shrinks its input
    activation: str = choice('relu', 'leaky_relu', 'elu', 'gelu', 'silu', 'tanh')
    weight_standardization: bool = False  # of the convolutions' kernels, filter by filter
    residual: bool = False  # a shortcut around each pair
    norm: str = choice('batch', 'ghost', 'renorm', 'group', 'layer', 'instance', 'none')
    norm_position: str = choice('after', 'before')  # the activation
    norm_momentum: float = value(0.99, high=1)  # share of the old moving average that is kept
    norm_epsilon: float = number(1e-3)
    norm_groups: int = number(8, low=1)  # group: parts of the channels that share statistics
    ghost_batch: int = number(16, low=1)  # ghost: examples that share their statistics
    renorm_r: float = value(3.0, low=1, high=1e6)  # renorm: the scale's correction is in [1/r, r]
    renorm_d: float = value(5.0, high=1e6)  # renorm: the mean's correction is in [-d, d]
    dropout: float = value(0.25, high=1)  # after each pair
    drop_kind: str = choice('element', 'channel', 'block', 'gaussian')
    drop_block: int = number(7, low=1)  # block: side of the squares, in pixels of the feature map
    drop_ramp: float = switched(0.0, high=1)  # share of training in which dropout grows from 0
    stochastic_depth: float = value(0.0, high=1)  # rate at which the last pair is skipped
    input_noise: float = value(0.0)  # deviation of noise added to the normalized images

    # vgg16
    weights: str = 'random'  # random | imagenet | a file (.h5, .onnx, .safetensors)
    cut: str = 'block5_pool'  # the layer whose output the head sees
    pool: str = choice('flatten', 'average')  # what joins backbone and head

    # head
    hidden: tuple[int, ...] = number((512,), low=1)
    head_norm: str = choice('batch', 'ghost', 'renorm', 'group', 'layer', 'none')
    head_dropout: float = value(0.5, high=1)


@dataclass
class Data:
    """Where the images come from, and how they reach the network."""

    source: str = 'mnist_5k'  # mnist_5k | digits | tfds:NAME | folder:PATH | idx:PATH
    data_dir: str = ''  # where TFDS keeps prepared sets; '' is TFDS's default
    train: str = 'train'  # a split, e.g. train, train[:80%], train[:500]
    eval: str = 'test'
    classes: tuple[str, ...] = ()  # only these classes, renumbered in this order; (): all
    resize: str = choice('none', 'stretch', 'crop')  # crop: short side, then centre
    size: int = number(0)  # height and width after resize, in pixels; 0 keeps the source's
    channels: int = choice(0, 1, 3)  # 0 keeps the source's
    batch: int = number(32, low=1)  # examples a step, over all devices
    eval_batch: int = number(0)  # 0: same as batch
    max_corrupt: float = number(0.01, high=1)  # share of unreadable images that may be skipped
    stream: str = choice('auto', 'never', 'always')  # read batches from the source at each step
    memory_gb: float = number(4.0)  # auto streams sets whose decoded images are larger than this


@dataclass
class Augment:
    """Random changes to the training images, made on the device, keyed by example."""

    flip: bool = False  # left-right, with probability 1/2
    crop: int = number(0)  # pad by this many pixels on each side, then crop back at random
    cutout: int = number(0)  # side of a square set to the mean, in pixels
    rotation: float = switched(0.0, high=180)  # largest angle either way, in degrees
    erasing: float = switched(0.0, high=1)  # probability that a rectangle is lost
    erase_least: float = value(0.02, high=1)  # its area, as a share of the image's
    erase_most: float = value(0.4, high=1)
    erase_aspect: float = value(0.3, low=0.01, high=1)  # least height : width; at most its inverse
    brightness: float = switched(0.0)  # the factor is uniform in 1 ± this, at least 0
    contrast: float = switched(0.0)
    saturation: float = switched(0.0)  # of images with three channels
    randaugment: float = switched(0.0, high=30)  # magnitude of its operations
    randaugment_operations: int = number(2)  # an image
    trivialaugment: float = switched(0.0, high=1)  # probability of its one operation
    mixup: float = switched(0.0)  # α of λ ~ Beta(α, α), the share of the own image
    cutmix: float = switched(0.0)  # α; with both on, each has half of the examples


@dataclass
class Loss:
    """Task loss and penalties (equations in `cnn_jax.losses`, `cnn_jax.penalties`)."""

    label_smoothing: float = value(0.0, high=1)
    confidence_penalty: float = switched(0.0)  # β of −β·H(p), H the prediction's entropy
    l2: float = value(0.0)  # λ of λ·Σw² added to the loss (Keras's definition, no 1/2)
    l2_on: tuple[str, ...] = ('*conv*/kernel',)  # parameter path patterns
    l1: float = switched(0.0)  # λ of λ·Σ|w|
    l1_on: tuple[str, ...] = ('*conv*/kernel',)
    orthogonality: float = switched(0.0)  # λ of λ·Σ‖WᵀW − I‖², a filter a column of W
    orthogonality_on: tuple[str, ...] = ('*conv*/kernel',)
    l2_sp: float = switched(0.0)  # λ of λ·Σ(w − w⁰)², w⁰ the weights at the start
    l2_sp_on: tuple[str, ...] = ('*conv*/*',)  # not the new head, which `l2_on` may name


@dataclass
class Optimizer:
    """Update rule and learning-rate schedule (equations in `cnn_jax.optim`)."""

    name: str = choice('adam', 'sgd', 'adamw')
    learning_rate: float = value(1e-4)
    schedule: str = choice('constant', 'cosine', 'step', 'inverse_time')
    warmup_epochs: float = number(0.0)
    decay_rate: float = value(0.0)  # inverse_time: rate; step: factor at each boundary
    decay_steps: int = number(1, low=1)  # inverse_time: steps between decays
    boundaries: tuple[float, ...] = number(())  # step: epochs at which the rate is multiplied
    momentum: float = value(0.9, high=1)  # sgd
    nesterov: bool = False
    b1: float = value(0.9, high=1)
    b2: float = value(0.999, high=1)
    epsilon: float = value(1e-7)  # Keras's default
    weight_decay: float = value(0.0)  # decoupled: w ← w − lr·weight_decay·w
    decay_on: tuple[str, ...] = ('*/kernel',)
    clip_norm: float = number(0.0)  # 0: no clipping of the global gradient norm
    gradient_noise: float = switched(0.0)  # η of the noise's variance η/(1 + t)^0.55
    max_norm: float = switched(0.0)  # largest norm of an output unit's weights; 0: any
    max_norm_on: tuple[str, ...] = ('*/kernel',)
    sam: float = switched(0.0)  # ρ: the gradient is taken this far uphill; two passes
    accumulate: int = number(1, low=1)  # micro-batches a step


@dataclass
class Train:
    """How long, how often, and what is kept."""

    epochs: float = number(10.0)
    frozen: tuple[str, ...] = ()  # parameter path patterns that are not trained
    ema: float = switched(0.0, high=1)  # decay of the weights' moving average; 0: none
    swa_from: float = switched(0.0)  # epochs after which weights are averaged equally
    precise_norm: int = number(0)  # batches for the evaluated weights' batch statistics
    eval_every: float = number(1.0)  # epochs
    checkpoint_every: float = number(1.0)  # epochs
    keep: int = number(2, low=2)  # latest checkpoints kept, besides the best
    best: str = choice('accuracy', 'loss')  # on the evaluation split
    patience: float = number(0.0)  # epochs without a better `best` that end a run there; 0: none
    threads: int = number(0, high=1024)  # of a computation on a CPU; 0: one for each core


@dataclass
class Unfreeze:
    """A second phase, which trains more of the network; it starts after `train.epochs`.

    What the first phase trained keeps its optimizer state and learning rate; what is new starts
    with fresh ones.
    """

    epochs: float = number(0.0)  # 0: there is no second phase
    frozen: tuple[str, ...] = ()  # parameter path patterns that stay frozen
    learning_rate: float = value(1e-5)  # of what is newly trained
    depth_decay: float = value(1.0)  # its factor for each block further from the head


@dataclass
class Features:
    """Outputs of a frozen backbone, computed once and kept in the user's cache folder."""

    cache: str = choice('auto', 'always', 'never')  # auto: wherever the backbone is frozen
    views: int = number(0)  # kept augmented views; 0: what is augmented is not cached
    dtype: str = choice('float32', 'bfloat16')  # of the kept features


@dataclass
class Config:
    """One run. `seed` decides initial weights, data order, augmentation and dropout."""

    seed: int = number(0, high=2**32 - 1)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    unfreeze: Unfreeze = field(default_factory=Unfreeze)
    features: Features = field(default_factory=Features)


def values(config: Config) -> dict[str, float]:
    """The fields that enter the compiled step as arguments, `{dotted path: number}`."""
    flat, fields = to_flat(config), fields_by_path(config)
    return {path: flat[path] for path, f in fields.items() if f.metadata.get('value')}


def structure(config: Config) -> dict[str, Any]:
    """What a compilation depends on: every field but the values and the seed; switches that are on.

    Of a switch only that it is on: `{dotted path: True}`.
    """
    flat, fields = to_flat(config), fields_by_path(config)
    fixed = {p: v for p, v in flat.items() if p != 'seed' and not fields[p].metadata.get('value')}
    on = {p: True for p, v in flat.items() if v and fields[p].metadata.get('switch')}
    return fixed | on


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, `{dotted path: (old, new)}`."""
    a, b = to_flat(old), to_flat(new)
    return {path: (a[path], b[path]) for path in a if a[path] != b[path]}


def to_json(config: Config) -> str:
    """The config as indented JSON with sorted keys, ending in a newline."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> Config:
    """The config that `to_json` wrote, of this version or an older one; else a `UserError`."""
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise ValueError('it is not an object')
        flat = dict(_leaves(tree))
    except (ValueError, RecursionError) as error:
        raise UserError(f'the configuration is not JSON: {error}') from error
    return replace(Config(), flat)


def _leaves(tree: dict[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for name, inner in tree.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f'{prefix}{name}.')
        else:
            yield prefix + name, inner


def content_hash(config: Config) -> str:
    """SHA-256 of the fields that differ from their defaults: equal configs, equal hash.

    A field that a later version adds leaves the hashes of earlier runs as they are.
    """
    defaults = to_flat(Config())
    chosen = {path: given for path, given in to_flat(config).items() if given != defaults[path]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def is_on(value: Any) -> bool:
    """Return whether an optional field of a bound config is compiled in: it is traced, or not 0."""
    return not (isinstance(value, (int, float)) and value == 0)
