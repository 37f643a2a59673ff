"""Validation of a configuration: ranges, choices, combinations; and settings that nothing reads."""

from collections.abc import Iterator
from typing import Any

from cnn_jax.errors import UserError, nearest
from cnn_jax.fields import LARGEST, OWN, C, fields_by_path, get, is_other, replace, to_flat
from cnn_jax.files import local_path


def validate(config: C) -> C:
    """Return the config with types, choices, ranges and combinations checked, or a UserError."""
    flat, fields = to_flat(config), fields_by_path(config)
    paths = [path for path, f in fields.items() if f.metadata.get('path') and flat[path]]
    changes = {path: _without_numpy(value) for path, value in flat.items()}
    changes |= {p: local_path(flat[p], f'config.{p}') for p in paths}
    config = replace(config, changes)
    flat = to_flat(config)
    for path, f in fields.items():
        _check_field(path, f.metadata, flat[path])
    for wrong, sentence in _combinations(config):
        if wrong:
            raise UserError(sentence)
    return config


def _without_numpy(value: Any) -> Any:
    """A number of NumPy's, or several, as Python's, which JSON can hold."""
    if isinstance(value, tuple):
        return tuple(map(_without_numpy, value))
    return value.tolist() if hasattr(value, 'tolist') else value


def _check_field(path: str, facts: Any, value: Any) -> None:
    """Compare a value with its field's choices or range."""
    choices = [str(each) for each in facts.get('choices', ())]
    if choices and value not in facts['choices']:
        hint = nearest(str(value), choices)
        raise UserError(f'config.{path} is {value!r}; it can be {", ".join(choices)}{hint}')
    low, high = facts.get('range', (0, 0))
    for each in (value if isinstance(value, tuple) else (value,)) if 'range' in facts else ():
        if not abs(each) <= LARGEST:
            raise UserError(f'config.{path} is {value}; it must be finite in float32')
        if not low <= each <= high:
            wanted = f'at least {low}' if high == LARGEST else f'from {low} to {high:,}'
            raise UserError(f'config.{path} is {value}; it must be {wanted}')


def _combinations(config: Any) -> Iterator[tuple[Any, str]]:
    """What is wrong if it is true, and the sentence that says so and how to mend it."""
    data, augment, optimizer = config.data, config.augment, config.optimizer
    model, train, unfreeze = config.model, config.train, config.unfreeze
    yield (
        (data.resize == 'none') != (data.size == 0),
        f'config.data.resize is {data.resize} but config.data.size is {data.size}; set both, or '
        'neither',
    )
    yield (
        data.validation and data.validation_share,
        'config.data.validation and config.data.validation_share both hold images out; set one to '
        '0',
    )
    yield (
        data.folds == 1 or (data.folds and data.fold >= data.folds),
        f'config.data.fold is {data.fold} of config.data.folds={data.folds}; number them from 0, '
        'of at least two',
    )
    yield (
        train.trials and not data.holds_out,
        'config.train.trials compares by held-out images, and none are; set '
        'config.data.validation_share, to 0.15 say',
    )
    yield (
        augment.erase_least > augment.erase_most,
        f'config.augment.erase_least ({augment.erase_least:g}) is above '
        f'config.augment.erase_most ({augment.erase_most:g}); lower it',
    )
    yield (
        data.balance and config.loss.class_weights == 'balanced',
        'config.data.balance draws each class equally often, and config.loss.class_weights '
        'balances what is drawn once more; set one of them',
    )
    yield (
        data.batch % optimizer.accumulate,
        f'config.optimizer.accumulate ({optimizer.accumulate}) must divide config.data.batch '
        f'({data.batch})',
    )
    yield (
        optimizer.schedule == 'step' and not optimizer.boundaries,
        'config.optimizer.schedule is step but config.optimizer.boundaries is empty; say the '
        'epochs at which the learning rate drops',
    )
    yield (
        optimizer.schedule in ('step', 'inverse_time') and not optimizer.decay_rate,
        f'config.optimizer.schedule is {optimizer.schedule} but config.optimizer.decay_rate is 0; '
        'say the factor at each boundary (step), e.g. 0.1, or the rate of decay (inverse_time)',
    )
    yield (
        train.ema and train.swa_from,
        'config.train.ema and config.train.swa_from both average the weights; set one to 0',
    )
    yield (
        not train.epochs,
        'config.train.epochs is 0, and a run takes one step at least; set it, to 0.01 say',
    )
    epochs = train.epochs + unfreeze.epochs
    yield (
        train.swa_from >= epochs > 0,
        f'config.train.swa_from is {train.swa_from:g}, but the run has {epochs:g} epochs, so '
        'nothing would be averaged; lower it',
    )
    yield (
        optimizer.name == OWN and unfreeze.epochs,
        'config.unfreeze.epochs asks for a second phase with a learning rate of its own, which an '
        'own optimizer does not read; set it to 0, or use an optimizer that the config names',
    )
    yield (
        train.patience and unfreeze.epochs,
        'config.train.patience ends a run of one phase, but config.unfreeze.epochs asks for a '
        'second; set one of them to 0',
    )
    yield (
        train.patience and not train.eval_every,
        'config.train.patience needs evaluations, but config.train.eval_every is 0; set it to the '
        'epochs between them',
    )
    if model.name != OWN:  # which reads what it likes
        yield from _networks(config)


def _networks(config: Any) -> Iterator[tuple[Any, str]]:
    """`_combinations` of the built-in networks."""
    model = config.model
    for path, f in fields_by_path(config).items():
        value, readers = get(config, path), f.metadata.get('only_for', (model.name,))
        yield (
            model.name not in readers and is_other(f, value, f.default),
            f'config.{path} is {value}, but only config.model.name={" or ".join(readers)} has it, '
            f'so it would change nothing; leave it at {f.default!r}',
        )
    yield (
        model.weight_standardization and model.norm == 'none',
        'config.model.weight_standardization without a norm would multiply activations tenfold a '
        'layer; set config.model.norm, to group say',
    )
    yield (
        model.residual and model.padding == 'VALID',
        'config.model.residual needs convolutions that keep the size of their input, and '
        'config.model.padding is VALID; set it to SAME',
    )
    yield (
        model.stochastic_depth and not model.residual,
        f'config.model.stochastic_depth is {model.stochastic_depth}, but there is no branch to '
        'skip; set config.model.residual to True',
    )
    yield (
        model.drop_kind == 'gaussian' and model.dropout == 1,
        'config.model.dropout is 1, at which gaussian noise has an infinite variance; set it below '
        '1',
    )
    for kind, widths in (('norm', model.widths), ('head_norm', model.hidden)):
        uneven = [width for width in widths if width % model.norm_groups]
        yield (
            getattr(model, kind) == 'group' and uneven,
            f'config.model.{kind} is group, but config.model.norm_groups ({model.norm_groups}) '
            f'does not divide the width {uneven[:1]}',
        )
    batch = config.data.batch // config.optimizer.accumulate
    alike = {'batch': batch, 'renorm': batch, 'ghost': model.ghost_batch}
    yield (
        model.hidden and alike.get(model.head_norm) == 1,
        f'config.model.head_norm is {model.head_norm} over one example, which would make all '
        'examples equal; raise config.data.batch or config.model.ghost_batch, or set it to none',
    )
    yield (
        'ghost' in (model.norm, model.head_norm) and batch % model.ghost_batch,
        f'config.model.ghost_batch ({model.ghost_batch}) must divide the {batch} examples that '
        'the network sees at once (config.data.batch / config.optimizer.accumulate)',
    )


def unread(config: Any, channels: int = 3) -> list[str]:
    """Settings that nothing reads while others are as they are, one phrase each.

    >>> unread(Config(augment=Augment(erase_most=0.5)))
    ['config.augment.erase_most is 0.5, but config.augment.erasing is 0.0']
    """
    flat, phrases = to_flat(config), []
    for path, f in fields_by_path(config).items():
        if is_other(f, flat[path], f.default) and not is_read(config, path):
            others = [f'config.{other} is {flat[other]}' for other in f.metadata['needs']]
            phrases.append(f'config.{path} is {flat[path]}, but {" and ".join(others)}')
    if config.augment.saturation and channels != 3:
        phrases.append(
            'config.augment.saturation changes coloured images alone, which these are not'
        )
    return phrases


def is_read(config: Any, path: str) -> bool:
    """Return whether a field can matter; what the user brings reads any of its group."""
    facts = fields_by_path(config)[path].metadata
    if config.model.name not in facts.get('only_for', (config.model.name,)):
        return config.model.name == OWN
    others = facts.get('needs', {})
    for group in ('model', 'optimizer'):
        if getattr(config, group).name == OWN and any(f'{group}.' in each for each in others):
            return True
    return not others or any(
        decides(get(config, other)) and is_read(config, other) for other, decides in others.items()
    )
