"""A run: `load_run` opens its work directory."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax import components as own
from cnn_jax import config as cfg
from cnn_jax import mesh, runtime
from cnn_jax.errors import UserError
from cnn_jax.files import workdir_path
from cnn_jax.tools import figures
from cnn_jax.tools.selfcheck import self_check
from cnn_jax.train import manifest, metrics, remote, setup
from cnn_jax.train.checkpoint import Checkpoints
from cnn_jax.train.program import (
    Program,
    RunSpec,
    State,
    eval_state_shapes,
    frozen_weights,
    make_program,
    traced_values,
)
from cnn_jax.train.record import read_lines
from cnn_jax.train.step import predict_step


class Curves(dict):
    """Learning curves by split and name: `curves['eval']['accuracy']`, a number an evaluation."""

    def __init__(self, lines: list[dict[str, Any]]):
        self._lines = lines
        for split in {line['split']: None for line in lines}:
            of_split = [line for line in lines if line['split'] == split]
            numbers = [k for k, value in of_split[-1].items() if isinstance(value, (int, float))]
            self[split] = {name: np.array([line[name] for line in of_split]) for name in numbers}

    def plot(self) -> Any:
        """Return a Matplotlib figure of loss and accuracy against epochs."""
        return figures.curves_figure(self._lines)


@dataclass(frozen=True, repr=False)
class Run:
    """A run that `fit` trained, or that `load_run` opened: enough to evaluate and to predict.

    >>> run = load_run('runs/small')  # doctest: +SKIP
    >>> run.predict(images).argmax(axis=-1)  # doctest: +SKIP
    """

    workdir: str  # its folder, or the URL that was given
    config: cfg.Config
    manifest: dict[str, Any]  # its origin: code, packages, machine, data
    spec: RunSpec  # shapes, preprocessing and length
    program: Program  # the phase of the state
    state: State  # at `step`; of a run that was opened again, without the optimizer's
    step: int  # the steps done; with early stopping those of the best evaluation
    metrics: dict[str, Any]  # loss, accuracy, … on the evaluation split at that step; {} if none
    curves: Curves
    source: Callable[[cfg.Config, str], Any] | None = None  # own images, where they can be had
    stopped: bool = False  # whether `fit` was interrupted, and saved; the same call resumes
    folder: Path = Path()  # `workdir`, or the local copy of a remote one

    def __repr__(self) -> str:
        scores = ', '.join(f'{k} {v:.4f}' for k, v in metrics.scalars(self.metrics).items())
        state = 'stopped at' if self.stopped else 'trained to'
        return (
            f'<Run {self.workdir}: {type(self.model).__name__} on {data_name(self.config)}, '
            f'{state} step {self.step} of {self.spec.phase_ends[-1]}; '
            f'{scores or "not evaluated yet"}>'
        )

    @property
    def model(self) -> nn.Module:
        """The network; the built-in ones are called as `model(prepared images, train=False)`."""
        return self.spec.network(self.config)

    @property
    def variables(self) -> dict[str, Any]:
        """The network's variables in inference: averaged weights where there are any."""
        return self.state.eval_variables

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the probabilities."""
        return self.manifest['data']['class_names']

    @functools.cached_property
    def _predict(self) -> Callable:
        return jax.jit(functools.partial(predict_step, self.program))

    def predict(self, images: UInt8[np.ndarray, 'n h w c']) -> Float[np.ndarray, 'n k']:
        """Return the class probabilities of images.

        Args:
            images: uint8 pixels of the size that the run was trained on; one may come without its
                first axis. Others are a UserError.
        """
        images = np.asarray(images)
        if images.shape == self.spec.image_shape:
            images = images[None]
        if images.dtype != np.uint8 or images.shape[1:] != self.spec.image_shape:
            raise UserError(
                f'the images are {images.dtype} {list(images.shape)}; this run takes uint8 '
                f'[n, {", ".join(map(str, self.spec.image_shape))}]'
            )
        # One image costs one; powers of two, so that few programs serve all numbers.
        few = 1 << max(len(images) - 1, 0).bit_length()
        size = min(few, self.config.data.eval_batch or self.config.data.batch)
        values, parts = traced_values(self.config), []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            parts.append(np.exp(self._predict(self.state, padded, values))[: len(part)])
        return np.concatenate(parts) if parts else np.zeros((0, len(self.class_names)), np.float32)


def data_name(config: cfg.Config) -> str:
    """Return what lines for the user call the data."""
    return 'own data' if config.data.source == cfg.OWN else config.data.source


def start(threads: int = 0, distributed: bool = False) -> runtime.Settings:
    """Prepare the process for JAX and check that it computes right; `threads` as in `configure`.

    Of several processes (`distributed`), the first one speaks for all; others print errors alone.
    """
    settings = runtime.configure(threads)
    if distributed:
        mesh.initialize()
        if not mesh.is_process_zero():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    self_check()
    return settings


def load_run(
    workdir: str | Path,
    which: str | None = None,
    *,
    model: Any = None,
    optimizer: Any = None,
    regularizers: Sequence[Any] = (),
) -> Run:
    """Open the run in a work directory at one of its checkpoints.

    Args:
        workdir: The folder of the run, or its URL.
        which: `latest`, or `best` by config.train.best on the evaluation split; by default the
            one that the run leaves: the best with config.train.patience, else the latest.
        model, optimizer, regularizers: Those that `fit` was given, if it was. An experiment file's
            are found again where it was.

    Errors:
        UserError: The folder holds no run or no such checkpoint, or own parts are missing or not
            those of the run.
    """
    if which not in (None, 'latest', 'best'):
        raise UserError(f'which is {which!r}; it can be latest or best')
    name = workdir_path(workdir)
    folder = remote.fetch_workdir(name)
    config, facts = manifest.read(folder)
    start(manifest.threads(folder, config))
    given = own.from_objects(model, None, None, optimizer, regularizers)
    components = own.reopened(config, facts, given)
    spec = setup.make_spec(config, facts['data'], components=components)

    def frozen() -> dict[str, Any]:
        """The pretrained weights, which are not looked for where no checkpoint needs them."""
        weights = setup.load_weights(config)
        return frozen_weights(make_program(config, setup.make_spec(config, facts['data'], weights)))

    checkpoints = Checkpoints(folder / 'checkpoints', config, frozen=frozen)
    which = which or ('best' if config.train.patience else 'latest')
    step = {'latest': checkpoints.latest, 'best': checkpoints.best}[which]()
    if step is None:
        raise UserError(f'{folder} has no {which} checkpoint yet; train it further')
    program = make_program(config, spec, phase=int(step > spec.phase_ends[0]))
    state, _ = checkpoints.restore(step, eval_state_shapes(program))
    lines = read_lines(checkpoints.place(step) / 'metrics.jsonl')  # which is known to be whole
    curves, scores = Curves(lines), {}
    for line in lines:
        if (line['step'], line['split']) == (step, 'eval'):
            scores = {k: v for k, v in line.items() if k not in ('step', 'split', 'epoch')}
    parts = config, facts, spec, program, state, step, scores, curves, components.source
    return Run(name, *parts, folder=folder)
