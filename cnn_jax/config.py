"""The configuration of an experiment: typed fields, validation, hash, JSON.

An experiment file holds one function, `get_config() -> Config`. A launcher applies the
`--config.a.b=value` overrides to the object, validates it, and writes it to the work directory as
`config.json`.

A field says itself what it may hold and what it applies to. *Traced* fields enter the compiled
step as arguments, so runs that differ only in them share one compilation; of an *optional* one
it is static whether it is 0, so that what is off costs nothing.

  config = Config(model=Model(widths=(32, 64)), loss=Loss(l2=5e-4))
  config = replace(config, {'optimizer.learning_rate': 1e-3})
"""

import ast
import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from cnn_jax.errors import UserError, nearest

C = TypeVar('C')
LARGEST = 3.4e38  # what float32 holds
OWN = 'own'  # the name of a model, source or optimizer that the user brings


def setting(default: Any, **facts: Any) -> Any:
    """A field with facts about it.

    Args:
        default: Its default.
        facts: `only_for`, the one `model.name` that reads the field; `noiseless`, the value under
            which the network adds no noise to what it computes (or a table of such values);
            `kept`, whether it is read although the user brings the model or the optimizer; and
            what the functions below set.
    """
    return field(default=default, metadata=facts)


def choice(default: Any, *others: Any, **facts: Any) -> Any:
    """One of the listed values."""
    return setting(default, choices=(default, *others), **facts)


def number(default: Any, *, low: float = 0, high: float = LARGEST, **facts: Any) -> Any:
    """A number from `low` to `high`, both included, or a tuple of such numbers."""
    return setting(default, range=(low, high), **facts)


def traced(default: float, *, low: float = 0, high: float = LARGEST, **facts: Any) -> Any:
    """A number that a compiled step takes as an argument instead of baking it in."""
    return number(default, low=low, high=high, traced=True, **facts)


def optional(default: float, *, low: float = 0, high: float = LARGEST, **facts: Any) -> Any:
    """A traced number; whether it is 0 is static, so it costs nothing when off."""
    return traced(default, low=low, high=high, optional=True, **facts)


def needs(*others: str, of: Any = bool) -> dict[str, Any]:
    """The fact that a field is read only where one of these others has a value `of` this kind.

    Args:
        others: Dotted paths.
        of: The values, or a function that tells them; by default any but 0, '' and ().
    """
    return {'needs': {other: of.__contains__ if isinstance(of, tuple) else of for other in others}}


STRIDED: dict[str, Any] = {'only_for': 'strided_net'}
VGG: dict[str, Any] = {'only_for': 'vgg16'}
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
CACHED = VGG | needs('train.frozen')


def normed(*kinds: str) -> dict[str, Any]:
    """The fact that only these kinds of normalization read a field."""
    return needs('model.norm', 'model.head_norm', of=kinds)


GHOST_AS_BATCH = {'ghost': 'batch'}  # pooled statistics lack the variance between the groups


class Fields:
    """A group of fields, in which a misspelt one cannot be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = [f.name for f in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        if name not in known:
            raise UserError(f'{type(self).__name__} has no field {name}{nearest(name, known)}')
        super().__setattr__(name, value)


@dataclass
class Model(Fields):
    """The network.

    `strided_net` is: an optional stem convolution (no activation, no normalization), then for
    each width a pair Conv(stride 1), Conv(stride `stride`), each followed by activation and
    normalization, then dropout; then Flatten, the hidden Dense layers with activation,
    normalization and dropout, and the output Dense layer.

    `vgg16` is the 13 convolutions of VGG16 up to `cut`, then the same head. `own` is a Flax module
    that the caller of `fit` or the experiment file brings; it may read any of these fields.
    """

    name: str = choice('strided_net', 'vgg16', OWN, **KEPT)
    outputs: int = number(0, **KEPT)  # 0: one per class (softmax); 1: one sigmoid for two classes
    # of computations; parameters are always float32
    dtype: str = choice('float32', 'bfloat16', **KEPT)
    # which 3×3 convolutions of stride 1 take its short cut on a CPU
    winograd: str = choice('frozen', 'always', 'never', **needs('model.dtype', of=('float32',)))

    # strided_net
    stem_width: int = number(16, high=2**20, **STRIDED)  # 0: no stem
    stem_kernel: int = number(7, low=1, **SIDE, **STEM)
    stem_stride: int = number(2, low=1, **SIDE, **STEM)
    stem_padding: str = choice('VALID', 'SAME', 'SAME_TORCH', 'CIRCULAR', 'REFLECT', **STEM)
    widths: tuple[int, ...] = number((32, 64, 128), **WIDTH, **STRIDED)
    kernel: int = number(3, low=1, **SIDE, **STRIDED)
    stride: int = number(2, low=1, **SIDE, **STRIDED)  # of the second convolution of each pair
    padding: str = choice('SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT', **STRIDED)
    # how a pair shrinks its input
    downsample: str = choice('stride', 'max_pool', 'avg_pool', **STRIDED)
    activation: str = choice(
        *('relu', 'leaky_relu', 'elu', 'gelu', 'silu', 'tanh'),
        **needs('model.widths', 'model.hidden'),
    )
    # of the convolutions' kernels, filter by filter
    weight_standardization: bool = setting(False, **STRIDED)
    residual: bool = setting(False, **STRIDED)  # a shortcut around each pair
    norm: str = choice(*NORMS, 'none', **STRIDED, noiseless=GHOST_AS_BATCH)
    norm_position: str = choice('after', 'before', **normed(*NORMS))  # the activation
    # share of the old moving average that is kept
    norm_momentum: float = traced(0.99, high=1, noiseless=0.0, **normed(*BATCH_NORMS))
    norm_epsilon: float = number(1e-3, **normed(*NORMS))
    norm_groups: int = number(8, **WIDTH, **normed('group'))  # parts that share statistics
    ghost_batch: int = number(16, **WIDTH, **normed('ghost'))  # examples that share statistics
    # the scale's correction is in [1/r, r]
    renorm_r: float = traced(3.0, low=1, high=1e6, noiseless=1.0, **normed('renorm'))
    # the mean's correction is in [-d, d]
    renorm_d: float = traced(5.0, high=1e6, noiseless=0.0, **normed('renorm'))
    dropout: float = traced(0.25, high=1, **STRIDED, noiseless=0.0)  # after each pair
    drop_kind: str = choice('element', 'channel', 'block', 'gaussian', **DROPOUT)
    # side of the squares, in pixels of the feature map
    drop_block: int = number(7, low=1, **SIDE, **STRIDED, **needs('model.drop_kind', of=('block',)))
    # share of training in which dropout grows from 0
    drop_ramp: float = optional(0.0, high=1, **DROPOUT)
    # rate at which the last pair is skipped
    stochastic_depth: float = traced(0.0, high=1, **STRIDED, noiseless=0.0)
    # deviation of noise added to the normalized images
    input_noise: float = traced(0.0, **STRIDED, noiseless=0.0)

    # vgg16
    # random | imagenet | a file (.h5, .onnx, .safetensors)
    weights: str = setting('random', path=True, **VGG)
    cut: str = setting('block5_pool', **VGG)  # the layer whose output the head sees
    pool: str = choice('flatten', 'average')  # what joins backbone and head

    # head
    hidden: tuple[int, ...] = number((512,), **WIDTH)
    head_norm: str = choice(
        *BATCH_NORMS, 'group', 'layer', 'none', noiseless=GHOST_AS_BATCH, **HEAD
    )
    head_dropout: float = traced(0.5, high=1, noiseless=0.0, **HEAD)


@dataclass
class Data(Fields):
    """The images: their source, and their way to the network."""

    source: str = 'mnist_5k'  # mnist_5k | digits | tfds:NAME | folder:PATH | idx:PATH | own
    data_dir: str = setting(
        '', path=True, **needs('data.source', of=lambda source: source.startswith('tfds:'))
    )  # where TFDS keeps prepared sets; '' is TFDS's default
    train: str = 'train'  # a split, e.g. train, train[:80%], train[:500]
    eval: str = 'test'
    subset: int = number(0, high=2**31 - 1)  # images of `train` that each seed draws; 0: all
    # images held out of `train`, to choose and stop by instead of `eval`; 0: none
    validation: int = number(0, high=2**31 - 1)
    classes: tuple[str, ...] = ()  # only these classes, renumbered in this order; (): all
    resize: str = choice('none', 'stretch', 'crop')  # crop: short side, then centre
    size: int = number(0, **SIDE)  # height and width after resize, in pixels; 0 keeps the source's
    channels: int = choice(0, 1, 3)  # 0 keeps the source's
    batch: int = number(32, low=1, high=2**20)  # examples a step, over all devices
    eval_batch: int = number(0, high=2**20)  # 0: same as batch
    max_corrupt: float = number(
        0.01, high=1, **needs('data.source', of=lambda source: ':' in source)
    )  # share of unreadable images that may be skipped
    stream: str = choice('auto', 'never', 'always')  # read batches from the source at each step
    # sets whose decoded images are larger stream
    memory_gb: float = number(4.0, **needs('data.stream', of=('auto',)))


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
    confidence_penalty: float = optional(0.0)  # β of −β·H(p), H the prediction's entropy
    l2: float = traced(0.0)  # λ of λ·Σw² added to the loss (Keras's definition, no 1/2)
    # parameter path patterns
    l2_on: tuple[str, ...] = setting(('*conv*/kernel',), **needs('loss.l2'))
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
    ema: float = optional(0.0, high=1)  # decay of the weights' moving average; 0: none
    swa_from: float = optional(0.0, **EPOCHS)  # epochs after which weights are averaged equally
    # batches for the evaluated weights' batch statistics
    precise_norm: int = number(0, high=2**20, **normed(*BATCH_NORMS))
    eval_every: float = number(1.0, **EPOCHS)  # epochs
    checkpoint_every: float = number(1.0, **EPOCHS)  # epochs
    keep: int = number(2, low=2, high=2**20)  # latest checkpoints kept, besides the best
    best: str = choice('accuracy', 'loss')  # on the evaluation split
    # epochs without a better `best` that end a run there; 0: none
    patience: float = number(0.0, **EPOCHS)
    threads: int = number(0, high=1024)  # of a computation on a CPU; 0: one for each core


@dataclass
class Unfreeze(Fields):
    """A second phase, which trains more of the network; it starts after `train.epochs`.

    What the first phase trained keeps its optimizer state and learning rate; what is new starts
    with fresh ones.
    """

    epochs: float = number(0.0, **EPOCHS)  # 0: there is no second phase
    # parameter path patterns that stay frozen
    frozen: tuple[str, ...] = setting((), **SECOND_PHASE)
    learning_rate: float = traced(1e-5, **SECOND_PHASE)  # of what is newly trained
    # its factor for each block further from the head
    depth_decay: float = traced(1.0, **SECOND_PHASE)


@dataclass
class Features(Fields):
    """Outputs of a frozen backbone, computed once and kept in the user's cache folder."""

    # auto: wherever the backbone is frozen
    cache: str = choice('auto', 'always', 'never', **CACHED)
    # kept augmented views; 0: what is augmented is not cached
    views: int = number(0, high=1000, **CACHED)
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


def fields_by_path(config: Any, prefix: str = '') -> dict[str, dataclasses.Field]:
    """The leaf fields of a configuration (or of one of its groups), by dotted path."""
    leaves = {}
    for f in dataclasses.fields(config):
        inner = getattr(config, f.name)
        if dataclasses.is_dataclass(inner):
            leaves |= fields_by_path(inner, f'{prefix}{f.name}.')
        else:
            leaves[prefix + f.name] = f
    return leaves


def get(config: Any, path: str) -> Any:
    """Return the value at a dotted path; an unknown path is a `UserError` with a suggestion."""
    known = fields_by_path(config)
    if path not in known:
        raise UserError(unknown_key(path, known))
    return attrgetter(path)(config)


def to_flat(config: Any) -> dict[str, Any]:
    """Return the configuration as `{dotted path: value}`."""
    return {path: attrgetter(path)(config) for path in fields_by_path(config)}


def replace(config: C, changes: dict[str, Any]) -> C:
    """Return a copy of a configuration with the fields at the given dotted paths changed.

    Errors:
        UserError: A path is unknown, or a value does not have its field's type.
    """
    new = type(config)()
    known = fields_by_path(new)
    for path, value in (to_flat(config) | changes).items():
        if path not in known:
            raise UserError(unknown_key(path, known))
        group, _, name = path.rpartition('.')
        owner = attrgetter(group)(new) if group else new
        setattr(owner, name, _coerce(path, known[path].type, value))
    return new


def unknown_key(path: str, known: Iterable[str]) -> str:
    """The sentence for a key that does not exist, with a near one of its group or, else, of any."""
    group, _, name = path.rpartition('.')
    inside = [other for other in known if other.rpartition('.')[0] == group]
    leaves = {other.rpartition('.')[2]: f'config.{other}' for other in [*known][::-1] + inside}
    hint = nearest(name, leaves) or '; cnn_jax/config.py lists them'
    return f'config.{path} is not a field of the configuration{hint}'


def local_path(given: str, name: str) -> str:
    """A path of this machine with its `~` expanded; a URL stays as it is.

    Args:
        given: What the user wrote.
        name: Where, such as `--workdir`.

    Errors:
        UserError: It is empty or cannot be a path, or there is no such home.
    """
    if not given.strip():
        raise UserError(f'{name} is empty; give a path')
    if '\0' in given:
        raise UserError(f'{name} is {given!r}; a path holds no zero byte')
    try:
        return str(Path(given).expanduser()) if given.startswith('~') else given
    except RuntimeError as error:
        raise UserError(f'{name} is {given}, and there is no such home; give the path') from error


def from_text(path: str, kind: Any, text: str) -> Any:
    """The value of a field that a command line gives as text; a tuple's items stand at commas.

    Args:
        path: The field.
        kind: Its type.
        text: For example `0.5`, `true`, `32,64`, `(32, 64)`, `a,b` or `('a,b',)`.

    Errors:
        UserError: The text does not say such a value.
    """
    try:
        if kind is bool:
            return {'true': True, 't': True, '1': True, 'false': False, 'f': False, '0': False}[
                text.lower()
            ]
        if kind in (int, float, str):
            return kind(text)
        if get_args(kind)[0] is str and not set(text) & set('\'"'):
            text = repr([each.strip() for each in text.strip('()[] ').split(',') if each.strip()])
        with warnings.catch_warnings(action='ignore'):  # of Python, on odd literals
            value = ast.literal_eval(text.strip())
        return _coerce(path, kind, value if isinstance(value, (list, tuple)) else (value,))
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise _mistyped(path, kind, text) from error


def _coerce(path: str, kind: Any, value: Any) -> Any:
    """Return the value as the field's type, or raise; a traced array passes as a number."""
    if hasattr(value, 'dtype') and kind in (int, float):
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)):
            try:
                return tuple(_coerce(path, get_args(kind)[0], each) for each in value)
            except UserError:
                pass  # told with the whole list
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise _mistyped(path, kind, value)


def _mistyped(path: str, kind: Any, value: Any) -> UserError:
    """The error for a value that is not of its field's type."""
    names = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'True or False'}
    if get_origin(kind) is tuple:
        name = 'a list of ' + names[get_args(kind)[0]].partition(' ')[2] + 's'
    else:
        name = names.get(kind, f'a {kind.__name__}')
    return UserError(f'config.{path} must be {name}, not {value!r}')


def traced_values(config: Config) -> dict[str, float]:
    """The fields that enter the compiled step as arguments, `{dotted path: number}`.

    >>> traced_values(Config())['optimizer.learning_rate']
    0.0001
    """
    flat, fields = to_flat(config), fields_by_path(config)
    return {path: flat[path] for path, f in fields.items() if f.metadata.get('traced')}


def bind(config: C, values: dict[str, Any]) -> C:
    """Return the config with (perhaps traced) numbers in it; optional fields that are 0 stay 0.0.

    Code inside a compiled step takes this one object: `is_on` tells which optional parts are
    compiled in, and the numbers are arguments of the program.

    Args:
        config: Says what is on.
        values: `{dotted path: number}`, as `traced_values` names them.
    """
    fields, flat = fields_by_path(config), to_flat(config)
    off = {path for path, f in fields.items() if f.metadata.get('optional') and not flat[path]}
    return replace(config, {path: v for path, v in values.items() if path not in off})


def is_on(value: Any) -> bool:
    """Return whether an optional field of a bound config is compiled in: it is traced, or not 0."""
    return not (isinstance(value, (int, float)) and value == 0)


def without_noise(config: Config) -> dict[str, Any]:
    """Return the changes under which the network in training computes without any noise.

    Batch statistics are then the batch's own, and each layer sees what it sees in inference.
    """
    changes = {}
    for path, f in fields_by_path(config).items():
        value = f.metadata.get('noiseless')
        if isinstance(value, dict):
            value = value.get(get(config, path))
        if value is not None:
            changes[path] = value
    return changes


def structure(config: Config) -> dict[str, Any]:
    """The fields that determine the compiled program, `{dotted path: value}`.

    These are all but the seed and the traced fields; an optional field that is on contributes True.
    """
    flat, fields = to_flat(config), fields_by_path(config)
    fixed = {p: v for p, v in flat.items() if p != 'seed' and not fields[p].metadata.get('traced')}
    on = {p: True for p, v in flat.items() if v and fields[p].metadata.get('optional')}
    return fixed | on


def unread(config: Config, channels: int = 3) -> list[str]:
    """Settings that nothing reads while others are as they are, one phrase each.

    Args:
        config: A validated config.
        channels: Those of the images.

    >>> unread(Config(augment=Augment(erase_most=0.5)))
    ['config.augment.erase_most is 0.5, but config.augment.erasing is 0.0']
    """
    phrases = []
    for path, f in fields_by_path(config).items():
        value = get(config, path)
        if value != f.default and not _is_read(config, path):
            others = [f'config.{other} is {get(config, other)}' for other in f.metadata['needs']]
            phrases.append(f'config.{path} is {value}, but {" and ".join(others)}')
    if config.augment.saturation and channels != 3:
        phrases.append(
            'config.augment.saturation changes coloured images alone, which these are not'
        )
    return phrases


def _is_read(config: Config, path: str) -> bool:
    """Return whether a field can matter; what the user brings reads any of its group."""
    facts = fields_by_path(config)[path].metadata
    if facts.get('only_for', config.model.name) not in (config.model.name, OWN):
        return config.model.name == OWN
    others = facts.get('needs', {})
    for group in ('model', 'optimizer'):
        if getattr(config, group).name == OWN and any(f'{group}.' in each for each in others):
            return True
    return not others or any(
        decides(get(config, other)) and _is_read(config, other) for other, decides in others.items()
    )


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, `{dotted path: (old, new)}`."""
    a, b = to_flat(old), to_flat(new)
    return {path: (a[path], b[path]) for path in a if a[path] != b[path]}


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
    notes = []
    if config.train.ema or config.train.swa_from:
        norms = {config.model.norm, config.model.head_norm} & {*BATCH_NORMS}
        if norms and config.model.name != OWN and not config.train.precise_norm:
            notes.append(
                'the averaged weights are evaluated with the batch statistics of the others; '
                'config.train.precise_norm=10 takes their own'
            )
    share, enough = config.train.ema**steps, 0.1 ** (1 / steps)
    if not config.train.ema or share <= 0.1:
        return notes
    start = (
        f'with config.train.ema={config.train.ema:g}, {share:.0%} of the averaged weights that are '
        f'evaluated after {steps:,} steps are the initial ones; {enough - 5e-7:.6f} leaves 10%'
    )
    return [*notes, start]


def without_length(config: Config) -> Config:
    """The config with the default `train.epochs` where no step depends on the run's length.

    Runs that are equal in this have the same steps, as far as both go.
    """
    if (
        config.own
        or config.optimizer.schedule == 'cosine'
        or config.unfreeze.epochs
        or config.model.drop_ramp
    ):
        return config
    return replace(config, {'train.epochs': Train().epochs})


def to_json(config: Config) -> str:
    """Return the config as indented JSON with sorted keys, ending in a newline."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> Config:
    """Return the config that `to_json` wrote, in this version or an older one.

    Errors:
        UserError: The text is not such a config.
    """
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
    chosen = {path: value for path, value in to_flat(config).items() if value != defaults[path]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def validate(config: Config) -> Config:
    """Return the config with its types, choices, ranges and combinations checked.

    Errors:
        UserError: The first thing that is wrong, and how to mend it.
    """
    paths = {
        path: local_path(get(config, path), f'config.{path}')
        for path, f in fields_by_path(config).items()
        if f.metadata.get('path') and get(config, path)
    }
    config = replace(config, paths)
    check_fields(config)
    _check_data(config)
    _check_training(config)
    _check_model(config)
    return config


def check_fields(config: Any) -> None:
    """Compare each field with its choices or range; the first that fails is a `UserError`."""
    for path, f in fields_by_path(config).items():
        value = attrgetter(path)(config)
        if 'choices' in f.metadata and value not in f.metadata['choices']:
            choices = [str(each) for each in f.metadata['choices']]
            hint = nearest(str(value), choices)
            raise UserError(f'config.{path} is {value!r}; it can be {", ".join(choices)}{hint}')
        if 'range' in f.metadata:
            low, high = f.metadata['range']
            for each in value if isinstance(value, tuple) else (value,):
                if not abs(each) <= LARGEST:
                    raise UserError(f'config.{path} is {value}; it must be finite in float32')
                if not low <= each <= high:
                    wanted = f'at least {low}' if high == LARGEST else f'from {low} to {high:,}'
                    raise UserError(f'config.{path} is {value}; it must be {wanted}')


def _check_data(config: Config) -> None:
    if config.data.resize == 'none' and config.data.size:
        raise UserError(
            f'config.data.size is {config.data.size} but config.data.resize is none; '
            'set config.data.resize to stretch or crop'
        )
    if config.data.resize != 'none' and not config.data.size:
        raise UserError(
            f'config.data.resize is {config.data.resize} but config.data.size is 0; '
            'say the size in pixels'
        )
    augment = config.augment
    if augment.erase_least > augment.erase_most:
        raise UserError(
            f'config.augment.erase_least ({augment.erase_least:g}) is above '
            f'config.augment.erase_most ({augment.erase_most:g}); lower it'
        )


def _check_training(config: Config) -> None:
    if config.data.batch % config.optimizer.accumulate:
        raise UserError(
            f'config.optimizer.accumulate ({config.optimizer.accumulate}) must divide '
            f'config.data.batch ({config.data.batch})'
        )
    if config.optimizer.schedule == 'step' and not config.optimizer.boundaries:
        raise UserError(
            'config.optimizer.schedule is step but config.optimizer.boundaries is empty; '
            'say the epochs at which the learning rate drops'
        )
    if config.optimizer.schedule in ('step', 'inverse_time') and not config.optimizer.decay_rate:
        raise UserError(
            f'config.optimizer.schedule is {config.optimizer.schedule} but '
            'config.optimizer.decay_rate is 0; say the factor at each boundary (step), e.g. 0.1, '
            'or the rate of decay (inverse_time)'
        )
    if config.train.ema == 1:
        raise UserError(
            'config.train.ema is 1, with which the average stays the first weights; set it below 1'
        )
    if config.train.ema and config.train.swa_from:
        raise UserError(
            'config.train.ema and config.train.swa_from both average the weights; set one to 0'
        )
    epochs = config.train.epochs + config.unfreeze.epochs
    if config.train.swa_from >= epochs > 0:
        raise UserError(
            f'config.train.swa_from is {config.train.swa_from:g}, but the run has {epochs:g} '
            'epochs, so nothing would be averaged; lower it'
        )
    if config.optimizer.name == OWN and config.unfreeze.epochs:
        raise UserError(
            'config.unfreeze.epochs asks for a second phase with a learning rate of its own, which '
            'an own optimizer does not read; set it to 0, or use an optimizer that the config names'
        )
    if config.train.patience and config.unfreeze.epochs:
        raise UserError(
            'config.train.patience ends a run of one phase, but config.unfreeze.epochs asks for a '
            'second; set one of them to 0'
        )
    if config.train.patience and not config.train.eval_every:
        raise UserError(
            'config.train.patience needs evaluations, but config.train.eval_every is 0; set it to '
            'the epochs between them'
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.name == OWN:  # which reads what it likes
        return
    for path, f in fields_by_path(config).items():
        value, reader = get(config, path), f.metadata.get('only_for', model.name)
        if reader != model.name and value != f.default:
            raise UserError(
                f'config.{path} is {value}, but only {reader} has it, so it would change '
                f'nothing; leave it at {f.default}'
            )
    if model.weight_standardization and model.norm == 'none':
        raise UserError(
            'config.model.weight_standardization without a norm would multiply activations tenfold '
            'a layer; set config.model.norm, to group say'
        )
    if model.residual and model.padding == 'VALID':
        raise UserError(
            'config.model.residual needs convolutions that keep the size of their input, and '
            'config.model.padding is VALID; set it to SAME'
        )
    if model.stochastic_depth and not model.residual:
        raise UserError(
            f'config.model.stochastic_depth is {model.stochastic_depth}, but there is no branch '
            'to skip; set config.model.residual to True'
        )
    if model.drop_kind == 'gaussian' and model.dropout == 1:
        raise UserError(
            'config.model.dropout is 1, at which gaussian noise has an infinite variance; '
            'set it below 1'
        )
    for kind, widths in (('norm', model.widths), ('head_norm', model.hidden)):
        uneven = [width for width in widths if width % model.norm_groups]
        if getattr(model, kind) == 'group' and uneven:
            raise UserError(
                f'config.model.{kind} is group, but config.model.norm_groups '
                f'({model.norm_groups}) does not divide the width {uneven[0]}'
            )
    batch = config.data.batch // config.optimizer.accumulate
    alike = {'batch': batch, 'renorm': batch, 'ghost': model.ghost_batch}
    if model.hidden and alike.get(model.head_norm) == 1:
        raise UserError(
            f'config.model.head_norm is {model.head_norm} over one example, which would make all '
            'examples equal; raise config.data.batch or config.model.ghost_batch, or set it to none'
        )
    if 'ghost' in (model.norm, model.head_norm) and batch % model.ghost_batch:
        raise UserError(
            f'config.model.ghost_batch ({model.ghost_batch}) must divide the {batch} examples '
            'that the network sees at once (config.data.batch / config.optimizer.accumulate)'
        )
