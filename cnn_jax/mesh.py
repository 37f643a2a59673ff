"""Which device holds what: a mesh of devices, and the layout of batches and parameters on it.

The computation is the same on any mesh: `jit` divides it by the layout of its inputs and puts in
the communication. Batches are divided along the axis `data`; parameters are on every device,
unless they are asked to be divided.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cnn_jax.errors import UserError

DATA, MODEL = 'data', 'model'
LARGE = 2**18  # elements of a leaf from which on dividing it pays for gathering it


@dataclass(frozen=True)
class Layout:
    """Where batches and state lie.

    Attributes:
        mesh: Its axes are `data` and `model`.
        fsdp: Whether large leaves of the state are divided along `data`, too: each device keeps
            a part and gathers the others when it needs them (Rajbhandari et al. 2020, "ZeRO",
            stage 3).
    """

    mesh: Mesh
    fsdp: bool = False

    def __str__(self) -> str:
        sizes = ' × '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items() if size > 1)
        return (sizes or 'one device') + ', parameters divided' * self.fsdp

    @property
    def facts(self) -> dict[str, Any]:
        """What a record must know of it; `lay_out` takes the last two."""
        hosts = len({device.process_index for device in self.mesh.devices.flat})
        return {'processes': hosts, **self.mesh.shape, 'fsdp': self.fsdp}

    @property
    def batch(self) -> NamedSharding:
        """Of arrays with an axis of examples in front."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    @property
    def everywhere(self) -> NamedSharding:
        """Of what each device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of(self, tree: Any) -> Any:
        """The layout of each leaf of a state (or of its shapes).

        Matrices as large as `LARGE` are divided along `model` by their columns, and with `fsdp`
        every leaf that large along `data` by its longest axis that can be; others are everywhere.
        """
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), tree)

    def place(self, tree: Any) -> Any:
        """Put a state that every process holds whole where it belongs."""

        def put(leaf, sharding):
            if sharding.is_fully_addressable:
                return jax.device_put(leaf, sharding)
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        return jax.tree.map(put, tree, self.of(tree))

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        axes: list[str | None] = [None] * len(shape)
        if np.prod(shape) < LARGE:
            return PartitionSpec()
        if len(shape) == 2 and self._divides(MODEL, shape[1]):
            axes[1] = MODEL
        free = [k for k, size in enumerate(shape) if not axes[k] and self._divides(DATA, size)]
        if self.fsdp and free:
            axes[max(free, key=lambda k: shape[k])] = DATA
        return PartitionSpec(*axes)

    def _divides(self, axis: str, size: int) -> bool:
        parts = self.mesh.shape[axis]
        return parts > 1 and size % parts == 0


def lay_out(
    devices: Sequence[Any], batches: Sequence[int], *, model: int = 1, fsdp: bool = False
) -> Layout:
    """The layout over some devices.

    Where one process has them all, a batch that they cannot share is shared by fewer.

    Args:
        devices: All devices of all processes, or those of a topology that is not here.
        batches: The sizes of all batches that will be divided.
        model: How many devices share each large matrix; groups of as many share the batch.
        fsdp: See `Layout`.

    Errors:
        UserError: `model` does not divide the number of each process's devices, or several
            processes cannot divide a batch.
    """
    # In this order, each process has a part of every batch in one piece.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    hosts = len({device.process_index for device in ordered})
    parts, rest = divmod(len(ordered), model)
    if rest or len(ordered) // hosts % model:
        raise UserError(
            f'--model_parallel={model} does not divide the number of devices of a process, '
            f'{len(ordered) // hosts}; choose a divisor'
        )
    common = math.gcd(*batches)
    if hosts == 1:
        parts = max(n for n in range(1, parts + 1) if common % n == 0)
    elif common % parts:
        raise UserError(
            f'batches of {" and ".join(map(str, sorted(set(batches))))} cannot be divided among '
            f'{parts} devices; set config.data.batch and config.data.eval_batch to multiples of '
            f'{parts}'
        )
    grid = np.array(ordered[: parts * model]).reshape(parts, model)
    return Layout(Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2), fsdp)
