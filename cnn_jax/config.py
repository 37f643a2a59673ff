"""What an experiment is: typed fields, validation, content hash, difference.

An experiment file holds one function, `get_config() -> Config`. A launcher applies the
`--config.a.b=value` overrides to the object, calls `validate`, and writes it to the work
directory as `config.json`.

Fields declared with `value()` are *values, not structure*: they enter the compiled step as
arguments, so runs that differ only in them share one compilation (see `values`).
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from cnn_jax.errors import UserError


def value(default: float, *, switch: bool = False) -> Any:
    """A number that a compiled step takes as an argument instead of baking it in.

    With `switch`, whether it is 0 is structure all the same: what is off costs nothing.
    """
    return field(default=default, metadata={'value': True, 'switch': switch})


@dataclass
class Model:
    """The network.

    `strided_net` is: an optional stem convolution (no activation, no normalization), then for
    each width a pair Conv(stride 1), Conv(stride `stride`), each followed by activation and
    normalization, then dropout; then Flatten, the hidden Dense layers with activation,
    normalization and dropout, and the output Dense layer.

    `vgg16` is the 13 convolutions of VGG16 up to `cut`, then the same head.
    """

    name: str = 'strided_net'  # strided_net | vgg16
    outputs: int = 0  # 0: one per class (softmax); 1: one sigmoid for two classes
    dtype: str = 'float32'  # compute type: float32 | bfloat16; parameters are always float32

    # strided_net
    stem_width: int = 16  # 0: no stem
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_padding: str = 'VALID'
    widths: tuple[int, ...] = (32, 64, 128)
    kernel: int = 3
    stride: int = 2  # of the second convolution of each pair
    padding: str = 'SAME'  # SAME | SAME_TORCH | VALID | CIRCULAR | REFLECT
    downsample: str = 'stride'  # stride | max_pool | avg_pool: how a pair shrinks its input
    activation: str = 'relu'  # relu | leaky_relu | elu | gelu | silu | tanh
    weight_standardization: bool = False  # of the convolutions' kernels, filter by filter
    residual: bool = False  # a shortcut around each pair
    norm: str = 'batch'  # batch | ghost | renorm | group | layer | instance | none
    norm_position: str = 'after'  # after | before the activation
    norm_momentum: float = value(0.99)  # share of the old moving average that is kept
    norm_epsilon: float = 1e-3
    norm_groups: int = 8  # group: parts of the channels, each with its own statistics
    ghost_batch: int = 16  # ghost: examples that share their statistics
    renorm_r: float = value(3.0)  # renorm: the correction of the scale is within [1/r, r]
    renorm_d: float = value(5.0)  # renorm: the correction of the mean is within [-d, d]
    dropout: float = value(0.25)  # after each pair
    drop_kind: str = 'element'  # element | channel | block | gaussian
    drop_block: int = 7  # block: side of the squares dropped, in pixels of the feature map
    drop_ramp: float = value(0.0, switch=True)  # share of training over which dropout grows from 0
    stochastic_depth: float = value(0.0)  # rate at which the last pair is skipped; needs residual
    input_noise: float = value(0.0)  # deviation of noise added to the normalized images

    # vgg16
    weights: str = 'random'  # random | imagenet | a file (.h5, .onnx, .safetensors)
    cut: str = 'block5_pool'  # the layer whose output the head sees
    pool: str = 'flatten'  # flatten | average: what joins backbone and head

    # head
    hidden: tuple[int, ...] = (512,)
    head_norm: str = 'batch'  # batch | ghost | renorm | group | layer | none
    head_dropout: float = value(0.5)


@dataclass
class Data:
    """Where the images come from, and how they reach the network."""

    source: str = 'mnist_5k'  # mnist_5k | digits | tfds:NAME | folder:PATH | idx:PATH
    data_dir: str = ''  # where TFDS keeps prepared sets; '' is TFDS's default
    train: str = 'train'  # a split, e.g. train, train[:80%], train[:500]
    eval: str = 'test'
    classes: tuple[str, ...] = ()  # only these classes, renumbered in this order; (): all
    resize: str = 'none'  # none | stretch | crop (short side, then centre)
    size: int = 0  # height and width after resize, in pixels; 0 keeps the source's
    channels: int = 0  # 1 | 3; 0 keeps the source's
    batch: int = 32  # examples a step, over all devices
    eval_batch: int = 0  # 0: same as batch
    max_corrupt: float = 0.01  # share of unreadable images, which are skipped; more stop the run
    stream: str = 'auto'  # auto | never | always: read batches from the source at each step
    memory_gb: float = 4.0  # auto streams sets whose decoded images are larger than this


@dataclass
class Augment:
    """Random changes to the training images, made on the device, keyed by example."""

    flip: bool = False  # left-right, with probability 1/2
    crop: int = 0  # pad by this many pixels on each side, then crop back at random
    cutout: int = 0  # side of a square set to the mean, in pixels
    rotation: float = value(0.0, switch=True)  # largest angle either way, in degrees
    erasing: float = value(0.0, switch=True)  # probability that a rectangle is set to the mean
    erase_least: float = value(0.02)  # its area, as a share of the image's
    erase_most: float = value(0.4)
    erase_aspect: float = value(0.3)  # its least height : width; the largest is the inverse
    brightness: float = value(0.0, switch=True)  # the factor is uniform in 1 ± this, at least 0
    contrast: float = value(0.0, switch=True)
    saturation: float = value(0.0, switch=True)  # of images with three channels
    randaugment: float = value(0.0, switch=True)  # magnitude of its operations, 0 to 30
    randaugment_operations: int = 2  # an image
    trivialaugment: float = value(0.0, switch=True)  # probability of its one operation
    mixup: float = value(0.0, switch=True)  # α of λ ~ Beta(α, α), the share of the own image
    cutmix: float = value(0.0, switch=True)  # α; with both on, each has half of the examples


@dataclass
class Loss:
    """Task loss and penalties (equations in `cnn_jax.losses`)."""

    label_smoothing: float = value(0.0)
    confidence_penalty: float = value(0.0, switch=True)  # β of −β·H(p), H the prediction's entropy
    l2: float = value(0.0)  # λ of λ·Σw² added to the loss (Keras's definition, no 1/2)
    l2_on: tuple[str, ...] = ('*conv*/kernel',)  # parameter path patterns
    l1: float = value(0.0, switch=True)  # λ of λ·Σ|w|
    l1_on: tuple[str, ...] = ('*conv*/kernel',)
    orthogonality: float = value(0.0, switch=True)  # λ of λ·Σ‖WᵀW − I‖², a filter a column of W
    orthogonality_on: tuple[str, ...] = ('*conv*/kernel',)
    l2_sp: float = value(0.0, switch=True)  # λ of λ·Σ(w − w⁰)², w⁰ the weights at the start
    l2_sp_on: tuple[str, ...] = ('*conv*/*',)  # not the new head, which `l2_on` may name


@dataclass
class Optimizer:
    """Update rule and learning-rate schedule (equations in `cnn_jax.optim`)."""

    name: str = 'adam'  # sgd | adam | adamw
    learning_rate: float = value(1e-4)
    schedule: str = 'constant'  # constant | cosine | step | inverse_time
    warmup_epochs: float = 0.0
    decay_rate: float = value(0.0)  # inverse_time: rate; step: factor at each boundary
    decay_steps: int = 1  # inverse_time: steps between decays
    boundaries: tuple[float, ...] = ()  # step: epochs at which the rate is multiplied
    momentum: float = value(0.9)  # sgd
    nesterov: bool = False
    b1: float = value(0.9)
    b2: float = value(0.999)
    epsilon: float = value(1e-7)  # Keras's default
    weight_decay: float = value(0.0)  # decoupled: w ← w − lr·weight_decay·w
    decay_on: tuple[str, ...] = ('*/kernel',)
    clip_norm: float = 0.0  # 0: no clipping of the global gradient norm
    gradient_noise: float = value(0.0, switch=True)  # η of the noise's variance η/(1 + t)^0.55
    max_norm: float = value(0.0, switch=True)  # largest norm of an output unit's weights; 0: any
    max_norm_on: tuple[str, ...] = ('*/kernel',)
    sam: float = value(0.0, switch=True)  # ρ: the gradient is taken this far uphill; two passes
    accumulate: int = 1  # micro-batches a step


@dataclass
class Train:
    """How long, how often, and what is kept."""

    epochs: float = 10.0
    frozen: tuple[str, ...] = ()  # parameter path patterns that are not trained
    ema: float = value(0.0, switch=True)  # decay of the moving average of the weights; 0: none
    swa_from: float = value(0.0, switch=True)  # epochs after which weights are averaged equally
    precise_norm: int = 0  # batches over which the evaluated weights' batch statistics are taken
    eval_every: float = 1.0  # epochs
    checkpoint_every: float = 1.0  # epochs
    keep: int = 2  # latest checkpoints kept, besides the best
    best: str = 'accuracy'  # accuracy | loss, on the evaluation split
    patience: float = 0.0  # epochs without a better `best` that end a run, at its best; 0: no end
    threads: int = 0  # CPU threads of a computation; 0: as many as cores when the run began


@dataclass
class Unfreeze:
    """A second phase, which trains more of the network; it starts after `train.epochs`.

    What the first phase trained keeps its optimizer state and learning rate; what is new starts
    with fresh ones.
    """

    epochs: float = 0.0  # 0: there is no second phase
    frozen: tuple[str, ...] = ()  # parameter path patterns that stay frozen
    learning_rate: float = value(1e-5)  # of what is newly trained
    depth_decay: float = value(1.0)  # its factor for each block further from the head


@dataclass
class Features:
    """Outputs of a frozen backbone, computed once and kept in the user's cache folder."""

    cache: str = 'auto'  # auto: where it gives the same training | always: or stop | never
    views: int = 0  # augmented views of each image to keep; 0: augmentation forbids the cache
    dtype: str = 'float32'  # of the kept features: float32 | bfloat16


@dataclass
class Config:
    """One run. `seed` decides initial weights, data order, augmentation and dropout."""

    seed: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    unfreeze: Unfreeze = field(default_factory=Unfreeze)
    features: Features = field(default_factory=Features)


CHOICES = {
    'model.name': ('strided_net', 'vgg16'),
    'model.dtype': ('float32', 'bfloat16'),
    'model.stem_padding': ('SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT'),
    'model.padding': ('SAME', 'SAME_TORCH', 'VALID', 'CIRCULAR', 'REFLECT'),
    'model.downsample': ('stride', 'max_pool', 'avg_pool'),
    'model.activation': ('relu', 'leaky_relu', 'elu', 'gelu', 'silu', 'tanh'),
    'model.norm': ('batch', 'ghost', 'renorm', 'group', 'layer', 'instance', 'none'),
    'model.norm_position': ('after', 'before'),
    'model.head_norm': ('batch', 'ghost', 'renorm', 'group', 'layer', 'none'),
    'model.drop_kind': ('element', 'channel', 'block', 'gaussian'),
    'model.pool': ('flatten', 'average'),
    'data.resize': ('none', 'stretch', 'crop'),
    'data.channels': (0, 1, 3),
    'data.stream': ('auto', 'never', 'always'),
    'optimizer.name': ('sgd', 'adam', 'adamw'),
    'optimizer.schedule': ('constant', 'cosine', 'step', 'inverse_time'),
    'train.best': ('accuracy', 'loss'),
    'features.cache': ('auto', 'always', 'never'),
    'features.dtype': ('float32', 'bfloat16'),
}

# Closed ranges; `None` is unbounded. Rates of 0 and 1 are both legal dropout rates.
RANGES = {
    'seed': (0, 2**32 - 1),
    'model.outputs': (0, None),
    'model.stem_width': (0, None),
    'model.stem_kernel': (1, None),
    'model.stem_stride': (1, None),
    'model.kernel': (1, None),
    'model.stride': (1, None),
    'model.norm_momentum': (0, 1),
    'model.norm_epsilon': (0, None),
    'model.norm_groups': (1, None),
    'model.ghost_batch': (1, None),
    'model.renorm_r': (1, 1e6),
    'model.renorm_d': (0, 1e6),
    'model.dropout': (0, 1),
    'model.drop_block': (1, None),
    'model.drop_ramp': (0, 1),
    'model.stochastic_depth': (0, 1),
    'model.input_noise': (0, None),
    'model.head_dropout': (0, 1),
    'data.size': (0, None),
    'data.batch': (1, None),
    'data.eval_batch': (0, None),
    'data.max_corrupt': (0, 1),
    'data.memory_gb': (0, None),
    'augment.crop': (0, None),
    'augment.cutout': (0, None),
    'augment.rotation': (0, 180),
    'augment.erasing': (0, 1),
    'augment.erase_least': (0, 1),
    'augment.erase_most': (0, 1),
    'augment.erase_aspect': (0.01, 1),
    'augment.brightness': (0, None),
    'augment.contrast': (0, None),
    'augment.saturation': (0, None),
    'augment.randaugment': (0, 30),
    'augment.randaugment_operations': (0, None),
    'augment.trivialaugment': (0, 1),
    'augment.mixup': (0, None),
    'augment.cutmix': (0, None),
    'loss.label_smoothing': (0, 1),
    'loss.confidence_penalty': (0, None),
    'loss.l2': (0, None),
    'loss.l1': (0, None),
    'loss.orthogonality': (0, None),
    'loss.l2_sp': (0, None),
    'optimizer.learning_rate': (0, None),
    'optimizer.warmup_epochs': (0, None),
    'optimizer.decay_rate': (0, None),
    'optimizer.decay_steps': (1, None),
    'optimizer.momentum': (0, 1),
    'optimizer.b1': (0, 1),
    'optimizer.b2': (0, 1),
    'optimizer.epsilon': (0, None),
    'optimizer.weight_decay': (0, None),
    'optimizer.clip_norm': (0, None),
    'optimizer.gradient_noise': (0, None),
    'optimizer.max_norm': (0, None),
    'optimizer.sam': (0, None),
    'optimizer.accumulate': (1, None),
    'train.epochs': (0, None),
    'train.ema': (0, 1),
    'train.swa_from': (0, None),
    'train.precise_norm': (0, None),
    'train.patience': (0, None),
    'train.eval_every': (0, None),
    'train.checkpoint_every': (0, None),
    'train.keep': (1, None),
    'train.threads': (0, 1024),
    'unfreeze.epochs': (0, None),
    'unfreeze.learning_rate': (0, None),
    'unfreeze.depth_decay': (0, None),
    'features.views': (0, None),
}


def fields_by_path(config: Any, prefix: str = '') -> dict[str, dataclasses.Field]:
    """Every leaf field of a config (or of one of its groups), by its dotted path."""
    found = {}
    for f in dataclasses.fields(config):
        inner = getattr(config, f.name)
        if dataclasses.is_dataclass(inner):
            found |= fields_by_path(inner, f'{prefix}{f.name}.')
        else:
            found[prefix + f.name] = f
    return found


def get(config: Config, path: str) -> Any:
    """The value at a dotted path; an unknown path is a `UserError` naming the nearest one."""
    known = fields_by_path(config)
    if path not in known:
        raise UserError(unknown_key(path, known))
    for name in path.split('.'):
        config = getattr(config, name)
    return config


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """A copy of `config` with the fields at the given dotted paths changed; types are checked."""
    flat = to_flat(config)
    for path in changes:
        if path not in flat:
            raise UserError(unknown_key(path, flat))
    return from_flat(flat | changes)


def unknown_key(path: str, known) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(path, list(known), n=1, cutoff=0.0)
    hint = f'; did you mean config.{near[0]}?' if near else ''
    return f'config.{path} is not a field of the configuration{hint}'


def to_flat(config: Config) -> dict[str, Any]:
    """The config as `{dotted path: value}`."""
    return {path: get_unchecked(config, path) for path in fields_by_path(config)}


def get_unchecked(config: Any, path: str) -> Any:
    for name in path.split('.'):
        config = getattr(config, name)
    return config


def from_flat(flat: dict[str, Any]) -> Config:
    """The config with the given leaves; an unknown or mistyped one is a `UserError`.

    A field that is not given has its default: an older version did not know it.
    """
    config = Config()
    known = fields_by_path(config)
    for path, given in flat.items():
        if path not in known:
            raise UserError(unknown_key(path, known))
        *groups, name = path.split('.')
        owner = config
        for group in groups:
            owner = getattr(owner, group)
        setattr(owner, name, _coerce(path, known[path].type, given))
    return config


def _coerce(path: str, kind: Any, given: Any) -> Any:
    """`given` as the field's type, or a `UserError`; a traced array passes as a number."""
    if hasattr(given, 'dtype') and kind in (int, float):
        return given
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if isinstance(given, (list, tuple)):
            return tuple(_coerce(path, item, g) for g in given)
    elif kind is float:
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            return float(given)
    elif isinstance(given, kind) and not (kind is int and isinstance(given, bool)):
        return given
    items = get_args(kind)
    name = f'a list of {items[0].__name__}' if items else kind.__name__
    raise UserError(f'config.{path} must be {name}, not {given!r}')


def validate(config: Config) -> Config:
    """The same config, its types, choices, ranges and combinations checked (else `UserError`)."""
    config = from_flat(to_flat(config))
    for path, allowed in CHOICES.items():
        if get(config, path) not in allowed:
            near = difflib.get_close_matches(str(get(config, path)), map(str, allowed), n=1)
            hint = f'; did you mean {near[0]}?' if near else ''
            raise UserError(
                f'config.{path} is {get(config, path)!r}; it can be '
                f'{", ".join(map(str, allowed))}{hint}'
            )
    for path, (low, high) in RANGES.items():
        given = get(config, path)
        if (
            given != given
            or (low is not None and given < low)
            or (high is not None and given > high)
        ):
            wanted = f'at least {low}' if high is None else f'from {low} to {high}'
            raise UserError(f'config.{path} is {given}; it must be {wanted}')
    _validate_combinations(config)
    return config


def _validate_combinations(config: Config) -> None:
    _validate_model(config)
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


def _validate_model(config: Config) -> None:
    model = config.model
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
    if model.input_noise and model.name != 'strided_net':
        raise UserError(
            f'config.model.input_noise is {model.input_noise}, but only strided_net has it; '
            'set it to 0'
        )
    for kind, widths in (('norm', model.widths), ('head_norm', model.hidden)):
        uneven = [width for width in widths if width % model.norm_groups]
        if getattr(model, kind) == 'group' and uneven:
            raise UserError(
                f'config.model.{kind} is group, but config.model.norm_groups '
                f'({model.norm_groups}) does not divide the width {uneven[0]}'
            )
    batch = config.data.batch // config.optimizer.accumulate
    if 'ghost' in (model.norm, model.head_norm) and batch % model.ghost_batch:
        raise UserError(
            f'config.model.ghost_batch ({model.ghost_batch}) must divide the {batch} examples '
            'that the network sees at once (config.data.batch / config.optimizer.accumulate)'
        )


def values(config: Config) -> dict[str, float]:
    """The fields that enter the compiled step as arguments, `{dotted path: number}`."""
    return {
        path: get_unchecked(config, path)
        for path, f in fields_by_path(config).items()
        if f.metadata.get('value')
    }


def structure(config: Config) -> dict[str, Any]:
    """What a compilation depends on: every field but the values and the seed; switches that are on.

    Of a switch only that it is on: `{dotted path: True}`.
    """
    flat, fields = to_flat(config), fields_by_path(config)
    switched = {path: True for path, f in fields.items() if f.metadata.get('switch') and flat[path]}
    fixed = {path: v for path, v in flat.items() if path not in values(config) and path != 'seed'}
    return fixed | switched


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
    return from_flat(flat)


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
