"""A finished or stopped run, opened again from its work directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from cnn_jax import config as cfg
from cnn_jax.errors import UserError
from cnn_jax.models import build
from cnn_jax.train import manifest, setup, workdir
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.state import State
from cnn_jax.train.step import Steps, make_steps
from cnn_jax.train.task import Task


@dataclass(frozen=True)
class Run:
    """What a work directory holds: enough to evaluate and to predict."""

    config: cfg.Config
    manifest: dict[str, Any]
    task: Task
    steps: Steps
    state: State
    step: int

    @property
    def model(self) -> nn.Module:
        """The network, called as `model(prepared images, train=False)`."""
        return build(self.config.model, self.task.num_classes)

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with: averaged weights where there are any."""
        return self.state.evaluated


def open_run(folder: Path, which: str | None = None) -> Run:
    """Open the run in a work directory at one of its checkpoints.

    Args:
        folder: The work directory.
        which: `latest`, or `best` by the metric config.train.best on the evaluation split; None
            for what the run leaves: the best with config.train.patience, else the latest.

    Errors:
        UserError: The folder holds no run or no such checkpoint.
    """
    run_manifest = manifest.read(folder)
    config = workdir.load_config(folder)
    task = setup.make_task(config, run_manifest['data'])
    checkpoints = Checkpoints(folder / 'checkpoints', config)
    which = which or ('best' if config.train.patience else 'latest')
    step = {'latest': checkpoints.latest, 'best': checkpoints.best}[which]()
    if step is None:
        raise UserError(f'{folder} has no {which} checkpoint yet; let launch.train reach one')
    steps = make_steps(config, task)
    state = steps.init(config.seed)
    if step > task.ends[0]:
        steps = make_steps(config, task, phase=1)
        state = steps.enter(state)
    state, _ = checkpoints.restore(step, state)
    checkpoints.close()
    return Run(config, run_manifest, task, steps, state, step)
