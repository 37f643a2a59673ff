"""Fields of the network that do not go together are a user's mistake, in one sentence."""

import pytest

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.validation import validate


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'residual': True, 'padding': 'VALID'}, 'residual needs .* keep the size'),
        ({'stochastic_depth': 0.1}, 'set config.model.residual to True'),
        ({'drop_kind': 'gaussian', 'dropout': 1.0}, 'config.model.dropout is 1'),
        ({'name': 'vgg16', 'input_noise': 0.1}, 'only strided_net has it'),
        ({'name': 'vgg16', 'dropout': 0.4}, 'dropout is 0.4, .* would change nothing'),
        ({'name': 'vgg16', 'residual': True}, 'leave it at False'),
        ({'head_norm': 'ghost', 'ghost_batch': 1}, 'make all examples equal'),
        ({'widths': (8, 0)}, r'config.model.widths is \(8, 0\); it must be'),
        ({'hidden': (-4,)}, 'at least 1'),
        ({'norm': 'group', 'norm_groups': 5}, r'norm_groups \(5\) does not divide the width 32'),
        ({'head_norm': 'group', 'hidden': (12,)}, r'\(8\) does not divide the width 12'),
        ({'norm': 'ghost', 'ghost_batch': 5}, r'ghost_batch \(5\) must divide the 32 examples'),
        ({'head_norm': 'ghost', 'ghost_batch': 64}, r'\(64\) must divide the 32 examples'),
        ({'head_norm': 'instance'}, 'config.model.head_norm'),
        ({'renorm_r': 0.5}, 'config.model.renorm_r'),
    ],
    ids=str,
)
def test_the_sentence_names_the_field(changes, sentence):
    changes = {f'model.{name}': given for name, given in changes.items()}
    with pytest.raises(UserError, match=sentence):
        validate(cfg.replace(cfg.Config(), changes))


def test_what_goes_together_passes():
    for changes in (
        {'residual': True, 'stochastic_depth': 0.5},
        {'drop_kind': 'gaussian', 'dropout': 0.99},
        {'drop_kind': 'block', 'dropout': 1.0},
        {'norm': 'ghost', 'head_norm': 'ghost'},
        {'norm': 'group', 'head_norm': 'group'},
    ):
        changes = {f'model.{name}': given for name, given in changes.items()}
        validate(cfg.replace(cfg.Config(), changes))
