"""When a run has had its best: early stopping, with the best weights restored at its end.

The run ends at the first evaluation that lies `train.patience` epochs after the last one that was
better than all before it. What it leaves is the state at its best evaluation, the last one of
equals; a checkpoint of it is saved whenever there is a better one.

Source: Prechelt 1998, "Early Stopping — But When?"; patience as in Keras's `EarlyStopping`.
"""

from dataclasses import dataclass

from cnn_jax import config as cfg


@dataclass(frozen=True)
class Best:
    """The best score so far, and the step of the first evaluation that had it."""

    score: float = float('-inf')
    step: int = 0

    def after(self, step: int, score: float) -> 'Best':
        """The same once another evaluation is known; a NaN is never better."""
        return Best(score, step) if score > self.score else self


def score_of(config: cfg.Config, metrics: dict[str, float]) -> float:
    """What `train.best` looks at, so that more is better."""
    return -metrics['loss'] if config.train.best == 'loss' else metrics['accuracy']


def is_over(config: cfg.Config, best: Best, step: int, steps_per_epoch: float) -> bool:
    """Whether patience has run out at the evaluation after `step`.

    step − best.step ≥ ⌊patience · steps_per_epoch⌋: evaluations fall on whole steps, so that two
    of them an epoch apart may be closer than an epoch by less than a step.
    """
    wait = int(config.train.patience * steps_per_epoch + 1e-9)
    return bool(config.train.patience) and step - best.step >= max(wait, 1)
