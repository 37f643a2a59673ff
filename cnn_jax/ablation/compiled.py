"""The compiled functions of one structure: for one run, or for several together.

Together, each function of a run is mapped over a leading axis, and devices share that axis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from cnn_jax import config as cfg
from cnn_jax.train import setup
from cnn_jax.train.loop import compilations
from cnn_jax.train.state import State
from cnn_jax.train.step import Steps
from cnn_jax.train.task import Task


@dataclass(frozen=True)
class Phase:
    """The functions of one phase, jitted; `steps` are those of a single run, as they are."""

    steps: Steps
    enter: Callable
    train: Callable
    evaluate: Callable
    estimate: Callable
    predict: Callable


@dataclass(frozen=True)
class Compiled:
    """The functions of one structure, and what they were made for.

    Attributes:
        task, description: Of every run.
        together: How many runs the functions train. Over 1, states, batches, values and results
            have a leading axis of that length.
        phases: The functions of each.
        stack: From one tree a run to what the functions take.
        choose: `(flags, new, old)`, one flag a run: the new state of a run, or the old one.
    """

    task: Task
    description: dict[str, Any]
    together: int
    phases: list[Phase]
    stack: Callable[[Sequence[Any]], Any]
    choose: Callable[[Any, State, State], State]

    def split(self, results: Any) -> list[Any]:
        """From what the functions return to one tree of arrays on the host a run."""
        results = jax.device_get(results)
        if self.together == 1:
            return [results]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], results) for i in range(self.together)]

    def compilations(self) -> int:
        """How often XLA compiled a training step."""
        return sum(compilations(phase.train) for phase in self.phases)


def compile_structure(
    config: cfg.Config, description: dict[str, Any], together: int = 1
) -> Compiled:
    """The jitted functions that serve every config of the same structure.

    Args:
        config: Any of them.
        description: Of the data, as `train.setup.describe` gives it, with `preprocessing`.
        together: How many runs one call trains; over 1, up to a multiple of the devices.
    """
    devices = jax.devices()
    if together > 1:
        together = math.ceil(together / len(devices)) * len(devices)
    task = setup.make_task(config, description, setup.load_weights(config))
    mesh = jax.make_mesh((len(devices),), ('run',), (AxisType.Auto,), devices=devices)
    runs = PartitionSpec('run')

    def over_runs(function: Callable) -> Callable:
        return jax.shard_map(function, mesh=mesh, in_specs=runs, out_specs=runs, check_vma=False)

    def jitted(function: Callable, **options) -> Callable:
        return jax.jit(over_runs(jax.vmap(function)) if together > 1 else function, **options)

    def stack(trees: Sequence[Any]) -> Any:
        # Through `over_runs`, so that what is stacked is laid out as what the functions return.
        return over_runs(lambda tree: tree)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))

    phases = [
        Phase(
            steps,
            enter=jitted(steps.enter),
            train=jitted(steps.train, donate_argnums=0),
            evaluate=jitted(steps.evaluate),
            estimate=jitted(steps.estimate),
            predict=jitted(steps.predict),
        )
        for steps in setup.make_phases(config, task)
    ]
    stacked = jax.jit(stack) if together > 1 else lambda trees: trees[0]
    return Compiled(task, description, together, phases, stacked, jitted(_chosen))


def _chosen(flag: Array, new: State, old: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), new, old)
