"""Checkpoints by Orbax: the latest k and the best one, each whole or absent."""

from pathlib import Path
from typing import Any

import jax

from cnn_jax.errors import UserError
from cnn_jax.train.step import State


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Where they are kept; created when the first one is saved.
        keep: Number of latest checkpoints kept.
        best: `accuracy` (largest is best) or `loss` (smallest); one more checkpoint is kept for it.
    """

    def __init__(self, folder: Path, *, keep: int = 2, best: str = 'accuracy'):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        def score(metrics: dict[str, float]) -> float:
            return -metrics['loss'] if best == 'loss' else metrics['accuracy']

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                step_prefix='step',
                best_fn=score,  # makes Orbax write the metrics beside the state
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(keep),
                        BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                # A step is tens of milliseconds and a save not much more: a save that has
                # returned is on the disk, and an error in it stops the run.
                enable_async_checkpointing=False,
            ),
        )

    def save(self, state: State, progress: dict[str, Any], metrics: dict[str, float] | None = None):
        """Write a checkpoint of `state`; a second one of the same step is not written again.

        Args:
            state: The training state.
            progress: What the loop needs to go on in the middle of an epoch; JSON.
            metrics: Of the evaluation at this step, if there was one.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        parts = self._args.Composite(
            state=self._args.StandardSave(state), progress=self._args.JsonSave(progress)
        )
        self._manager.save(step, args=parts, metrics=metrics)

    def latest(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of the best checkpoint, if any was saved with metrics."""
        scored = [step for step in self._manager.all_steps() if self._manager.metrics(step)]
        return self._manager.best_step() if scored else None

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state and progress saved at a step.

        Args:
            step: One that `latest` or `best` named.
            like: A state (or its shapes) of the same structure.

        Errors:
            UserError: The checkpoint cannot be read or belongs to another network.
        """
        try:
            parts: Any = self._manager.restore(
                step,
                args=self._args.Composite(
                    state=self._args.StandardRestore(_shapes(like)),
                    progress=self._args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f'the checkpoint of step {step} in {self._manager.directory} cannot be read '
                f'({reason}); delete its folder to go on from the one before'
            ) from error
        return parts.state, parts.progress

    def close(self) -> None:
        """Release Orbax's resources."""
        self._manager.close()


def _shapes(state: State) -> State:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
