"""The training state."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int

from cnn_jax import params

Values = dict[str, Any]  # dotted config path -> number, and 'seed'


@flax.struct.dataclass
class State:
    """All that a run is, besides its config and its data.

    `opt_state`, `ema` and `start` have leaves for trainable parameters only.

    Attributes:
        step: Updates done.
        params: All parameters.
        batch_stats: Of batch normalization, as training has them; {} for nets without it.
        opt_state: As `optim.chain` has it.
        ema: Averaged weights (`averaging`); {} without averaging.
        start: The weights that L2-SP pulls toward; {} without it.
        precise: Batch statistics of the evaluated weights (`precise_norm`); {} if not wanted.
    """

    step: Int[Array, '']
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    ema: dict[str, Array]
    start: dict[str, Array] = flax.struct.field(default_factory=dict)
    precise: dict[str, Any] = flax.struct.field(default_factory=dict)

    @property
    def evaluated(self) -> dict[str, Any]:
        """The network's variables in inference: averaged weights, if any, and their statistics."""
        weights = params.flatten(self.params) | self.ema
        return {
            'params': params.unflatten(weights),
            'batch_stats': self.precise or self.batch_stats,
        }
