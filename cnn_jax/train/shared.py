"""A run on many devices: its compiled functions, and what all processes know of its records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cnn_jax import config as cfg
from cnn_jax import mesh
from cnn_jax.mesh import Layout
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.program import State
from cnn_jax.train.record import Record


def open_record(folder: Path) -> Record:
    """The record of a run, in whatever process: process 0 writes it."""
    return Record(folder) if mesh.is_process_zero() else Unrecorded(folder)


def open_checkpoints(
    folder: Path, config: cfg.Config, layout: Layout | None
) -> 'Checkpoints | SharedCheckpoints':
    """The checkpoints of a run, in whatever process."""
    if layout and mesh.is_multiprocess():
        return SharedCheckpoints(folder, config, layout)
    return Checkpoints(folder, config)


class SharedCheckpoints:
    """`Checkpoints` of process 0, for all: every method is to be called by all processes at once.

    The state is gathered to process 0 when it is saved, array by array, and sent to all when it is
    restored. So no file system need be shared, any number of processes can go on, and the files
    are those of a run with one process. The state must fit into one host's memory.

    Args:
        folder: As for `Checkpoints`; process 0 uses it.
        config: The run's.
        layout: Where a restored state goes.
    """

    def __init__(self, folder: Path, config: cfg.Config, layout: Layout):
        self._own = Checkpoints(folder, config)
        self._layout = layout

    def save(
        self, state: State, progress: dict[str, Any], metrics: dict[str, float] | None = None
    ) -> None:
        """As `Checkpoints.save`; returns, or fails, everywhere once it has in process 0."""
        whole = mesh.gather_to_host(state)
        mesh.on_process_zero(lambda: self._own.save(whole, progress, metrics))

    def latest(self) -> int | None:
        """As `Checkpoints.latest`."""
        return mesh.on_process_zero(self._own.latest)

    def best(self) -> int | None:
        """As `Checkpoints.best`."""
        return mesh.on_process_zero(self._own.best)

    def resumable(
        self, fault: Callable[[dict[str, Any]], str], say: Callable[[str], object]
    ) -> tuple[int, dict[str, Any]] | None:
        """As `Checkpoints.resumable`."""
        return mesh.on_process_zero(lambda: self._own.resumable(fault, say))

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """As `Checkpoints.restore`."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
        read: dict[str, State] = {}

        def here() -> dict[str, Any]:
            read['state'], progress = self._own.restore(step, shapes)
            return progress

        progress = mesh.on_process_zero(here)
        return self._layout.shard(mesh.broadcast(read.get('state'), shapes)), progress

    def close(self) -> None:
        """As `Checkpoints.close`."""
        self._own.close()


class Unrecorded(Record):
    """The record as the other processes have it: process 0 writes the same numbers."""

    def fault(self, position: dict[str, Any]) -> str:
        return ''

    def begun(self) -> bool:
        return False

    def resume(self, step: int, position: dict[str, Any] | None) -> None:
        pass

    def step(self, objective: float, gradient_norm: float) -> None:
        pass

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        pass

    def timing(self, step: int, values: dict[str, float]) -> None:
        pass

    def position(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
