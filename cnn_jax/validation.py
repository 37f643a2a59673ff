"""Whether a configuration makes sense: each field alone, then what some mean together."""

from cnn_jax.config import Config, Model, replace, to_flat
from cnn_jax.errors import UserError
from cnn_jax.fields import check

# Regularizers of strided_net's convolutions; another network does not read them.
IN_THE_TRUNK = (
    'dropout',
    'drop_kind',
    'drop_block',
    'drop_ramp',
    'stochastic_depth',
    'input_noise',
    'residual',
    'weight_standardization',
    'norm',
)


def validate(config: Config) -> Config:
    """The same config, its types, choices, ranges and combinations checked (else `UserError`)."""
    config = replace(config, to_flat(config))
    check(config)
    _check_data(config)
    _check_training(config)
    _check_model(config)
    return config


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
    if model.name != 'strided_net':
        defaults = Model()
        for name in IN_THE_TRUNK:
            given, default = getattr(model, name), getattr(defaults, name)
            if given != default:
                raise UserError(
                    f'config.model.{name} is {given}, but only strided_net has it, so that it '
                    f'would change nothing; leave it at {default}'
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
