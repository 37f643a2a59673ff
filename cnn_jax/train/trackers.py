"""Trackers: where runs are logged besides their work directory, if the user asks for it.

A tracker is one of `NAMES`, or an object with the methods of `Tracker`. W&B and MLflow are imported
when asked for; their own environment variables say where they log to.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.errors import UserError
from cnn_jax.files import Corrupt, read_json, write_json


class Tracker:
    """The calls that a tracker gets of a run."""

    identity = ''  # by which the run is found again when it resumes

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics by name, such as `loss/eval`; those since the checkpoint again on resuming."""

    def hyperparameters(self, config: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """The config by path; at the start without metrics, at the end with the final ones."""

    def close(self) -> None:
        """The run has ended, or was interrupted."""


class _HParams(Tracker):  # TensorBoard's; the work directory's own events hold the scalars
    def __init__(self, folder: Path, name: str, identity: str):
        self._folder = str(folder)

    def hyperparameters(self, config, final):
        from tensorboardX import SummaryWriter

        if final:
            with SummaryWriter(self._folder) as writer:
                writer.add_hparams(dict(config), dict(final), name='.')


class _WandB(Tracker):
    def __init__(self, folder: Path, name: str, identity: str):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(name=name, dir=folder, id=identity or None, resume='allow')
        self.identity = self._run.id

    def scalars(self, step, values):
        self._run.log(dict(values), step=step)

    def hyperparameters(self, config, final):
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.summary.update(dict(final))

    def close(self):
        self._run.finish()


class _MLflow(Tracker):
    def __init__(self, folder: Path, name: str, identity: str):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow, self._new = mlflow, not identity
        self.identity = mlflow.start_run(run_id=identity or None, run_name=name).info.run_id

    def scalars(self, step, values):
        self._mlflow.log_metrics(dict(values), step=step)

    def hyperparameters(self, config, final):
        if self._new and not final:  # later it refuses other values
            self._mlflow.log_params(dict(config))
        # Its folder of files holds no metric `loss` beside `loss/eval`.
        self._mlflow.log_metrics({f'final/{name}': value for name, value in final.items()})

    def close(self):
        self._mlflow.end_run()


NAMES = {'tensorboard': _HParams, 'wandb': _WandB, 'mlflow': _MLflow}


def check(trackers: Sequence[str | Tracker]) -> None:
    """Refuse a tracker of an unknown name, or whose package is not installed."""
    for name in trackers:
        if not isinstance(name, str):
            if not hasattr(name, 'scalars'):
                raise UserError(f'{name!r} is not a tracker; see cnn_jax.train.trackers.Tracker')
        elif name not in NAMES:
            raise UserError(f'{name} is not a tracker; there are {", ".join(NAMES)}')
        elif name != 'tensorboard' and importlib.util.find_spec(name) is None:
            raise UserError(f'{name} is not installed; pip install {name}')


@contextlib.contextmanager
def tracked(
    trackers: Sequence[str | Tracker],
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    say: Callable[[str], object] = print,
) -> Iterator[Callable[..., None]]:
    """Log a run to its trackers while the context lasts.

    `folder` is the run's and keeps their identities of it; errors: UserError, one does not start.

    Yields:
        Calls a method of every tracker. One that fails is left out from there on.
    """
    path, opened, known = folder / 'trackers.json', [], {}
    with contextlib.suppress(OSError, Corrupt):
        known = read_json(path)

    def tell(method: str, *arguments: Any) -> None:
        for each in [*opened]:
            try:
                getattr(each, method)(*arguments)
            except Exception as error:  # of whatever kind: the run is worth more
                opened.remove(each)
                with contextlib.suppress(Exception):
                    each.close()
                say(f'note: {type(each).__name__} is left out from here on: {error}')

    try:
        for each in trackers:
            if isinstance(each, str):
                try:
                    given, each = each, NAMES[each](folder, name, known.get(each, ''))
                except Exception as error:
                    raise UserError(f'{each} does not start: {error}') from error
                write_json(path, known := known | {given: each.identity})
            opened.append(each)
        tell('hyperparameters', config, {})
        yield tell
    finally:
        tell('close')


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a config as every tracker takes them."""
    return {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in values.items()}
