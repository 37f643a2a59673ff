"""Fields of the network that do not go together are a user's mistake that names the field."""

import pytest

from cnn_jax import config as cfg
from cnn_jax.errors import UserError


@pytest.mark.parametrize(
    ('changes', 'field'),
    [
        ({'residual': True, 'padding': 'VALID'}, 'residual'),
        ({'stochastic_depth': 0.1}, 'residual'),
        ({'drop_kind': 'gaussian', 'dropout': 1.0}, 'dropout'),
        ({'name': 'vgg16', 'input_noise': 0.1}, 'input_noise'),
        ({'name': 'vgg16', 'dropout': 0.4}, 'dropout'),
        ({'name': 'vgg16', 'residual': True}, 'residual'),
        ({'head_norm': 'ghost', 'ghost_batch': 1}, 'ghost_batch'),
        ({'widths': (8, 0)}, 'widths'),
        ({'hidden': (-4,)}, 'hidden'),
        ({'norm': 'group', 'norm_groups': 5}, 'norm_groups'),
        ({'head_norm': 'group', 'hidden': (12,)}, 'norm_groups'),
        ({'norm': 'ghost', 'ghost_batch': 5}, 'ghost_batch'),
        ({'head_norm': 'instance'}, 'head_norm'),
        ({'renorm_r': 0.5}, 'renorm_r'),
        ({'residual': True, 'stochastic_depth': 0.5}, None),
        ({'drop_kind': 'gaussian', 'dropout': 0.99}, None),
        ({'drop_kind': 'block', 'dropout': 1.0}, None),
        ({'norm': 'ghost', 'head_norm': 'ghost'}, None),
        ({'norm': 'group', 'head_norm': 'group'}, None),
    ],
    ids=str,
)
def test_what_does_not_go_together_names_its_field(changes, field):
    config = cfg.replace(cfg.Config(), {f'model.{name}': v for name, v in changes.items()})
    if field is None:
        cfg.validate(config)
        return
    with pytest.raises(UserError, match=f'config.model.{field}'):
        cfg.validate(config)
