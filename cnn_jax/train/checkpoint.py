"""Checkpoints by Orbax: the latest k and the best one, each whole or not used."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import mesh
from cnn_jax.errors import RunFailed, UserError
from cnn_jax.files import SEAL, Corrupt, read_sealed_folder, seal_folder, write_text
from cnn_jax.train.metrics import score_of
from cnn_jax.train.program import State

DELETED = 'deleted'
OVERHEAD = 1 << 18  # bytes of a checkpoint besides the state's, generously
OPTIONAL = ('init_params', 'eval_batch_stats')  # of the state
FORMAT = 2  # raised when a checkpoint's content is arranged otherwise


class Checkpoints:
    """The checkpoints of one run, in `step_N` folders; each is sealed once it is written.

    Args:
        folder: Where they are kept; created when the first one is saved.
        config: The run's.
    """

    def __init__(self, folder: Path, config: cfg.Config):
        self._folder = Path(folder).absolute()
        self._config = config
        self._unfinished = self._folder / 'unfinished'  # names the step of a save that goes on
        self._facts = {'format': FORMAT, 'config': cfg.content_hash(config)}

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        self._folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                step_prefix='step',
                best_fn=self._score,  # makes Orbax write the metrics beside the state
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(self._config.train.keep),
                        BestN(
                            get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
                # Renamed, then removed here: a kill leaves no half of one under its name.
                todelete_subdir=DELETED,
                create=False,  # Orbax wants it so of one process among several
                # A step is tens of milliseconds and a save not much more: a save that has
                # returned is on the disk, and an error in it stops the run.
                enable_async_checkpointing=False,
                multiprocessing_options=self._alone,
            ),
        )

    @property
    def _alone(self):
        """Orbax's option for process 0, which saves and restores without the others."""
        from orbax.checkpoint.options import MultiprocessingOptions

        if mesh.is_multiprocess():
            return MultiprocessingOptions(0, {0}, 'first')
        return MultiprocessingOptions()

    def _score(self, metrics: dict[str, float]) -> float:
        score = score_of(self._config, metrics)
        return -math.inf if math.isnan(score) else score  # never the best

    def save(self, state: State, progress: dict[str, Any], metrics: dict[str, float] | None = None):
        """Write a checkpoint of `state`; a second one of the same step is not written again.

        Args:
            state: The training state.
            progress: What the loop needs to go on in the middle of an epoch; JSON.
            metrics: Of the evaluation at this step, if there was one.

        Errors:
            RunFailed: The disk is full, or cannot be written for another reason.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self._manager.all_steps():
            return
        try:
            self._check_room(state)
            # Orbax gives the folder its name before it can be sealed.
            write_text(self._unfinished, str(step))
            parts = ocp.args.Composite(state=ocp.args.StandardSave(_parts(state)))
            self._manager.save(step, args=parts, metrics=metrics)
            content = self._facts | {'progress': progress, 'metrics': metrics}
            seal_folder(self._place(step), content)
            self._unfinished.unlink()
            self._sweep()
        except (OSError, ValueError) as error:  # ValueError: TensorStore's
            raise RunFailed(
                f'the checkpoint of step {step} cannot be written in {self._folder} '
                f'({_reason(error)}); make room, and the same command goes on from the one before'
            ) from error

    def steps(self) -> list[int]:
        """The steps of all checkpoints, whole or not, the newest first."""
        names = [path.name for path in self._folder.glob('step_*')]
        numbers = [name.removeprefix('step_') for name in names]
        return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)

    def latest(self) -> int | None:
        """The step of the newest checkpoint that was finished, if there is one."""
        finished = (step for step in self.steps() if (self._place(step) / SEAL).exists())
        return next(finished, None)

    def best(self) -> int | None:
        """The step of the best whole checkpoint, if any was saved with metrics; a tie: the last."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(Corrupt):
                if metrics := self._opened(step)['metrics']:
                    scores[step] = self._score(metrics)
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def resumable(
        self, fault: Callable[[dict[str, Any]], str], say: Callable[[str], object]
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint from which the run can go on, and its progress; None without any.

        Damaged ones, newer or older, are moved to the folder `damaged` beside this one. For the
        process alone that holds the work directory.

        Args:
            fault: What else is wrong with a progress, in words; '' for nothing.
            say: Called with a sentence about each one that is set aside.

        Errors:
            UserError: There are checkpoints, but none that can be used.
        """
        self._sweep()
        found, wrong = None, {}
        for step in self.steps():
            try:
                progress = self._opened(step)['progress']
                reason = '' if found else fault(progress)
            except Corrupt as error:
                reason = str(error)
            if reason:
                wrong[step] = reason
            elif not found:
                found = step, progress
        if wrong and not found:
            told = '; '.join(f'step {step}: {reason}' for step, reason in wrong.items())
            raise UserError(
                f'no checkpoint in {self._folder} can be used ({told}); restore one, or start anew '
                'in another --workdir'
            )
        for step, reason in wrong.items():
            say(f'the checkpoint of step {step} cannot be used ({reason}); {self._aside(step)}')
        return found

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The state and progress saved at a step.

        Args:
            step: One that `latest`, `best` or `resumable` named.
            like: A state (or its shapes) of the same structure.

        Errors:
            UserError: The checkpoint is damaged or belongs to another run.
        """
        import orbax.checkpoint as ocp

        try:
            progress = self._opened(step)['progress']
            with ocp.StandardCheckpointer(multiprocessing_options=self._alone) as checkpointer:
                path = self._place(step) / 'state'
                parts: Any = checkpointer.restore(path, _shapes(_parts(like)))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f'the checkpoint of step {step} in {self._folder} cannot be used '
                f'({_reason(error)}); launch.train with the same command goes back to the one '
                'before'
            ) from error
        return dataclasses.replace(like, **parts), progress

    def close(self) -> None:
        """Release Orbax's resources."""
        if '_manager' in vars(self):
            self._manager.close()

    def _check_room(self, state: State) -> None:
        """Find a full disk before Orbax does, whose threads then all tell of it."""
        needed = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _place(self, step: int) -> Path:
        return self._folder / f'step_{step}'

    def _opened(self, step: int) -> dict[str, Any]:
        """What was sealed into a checkpoint that is whole and this run's."""
        content = read_sealed_folder(self._place(step))
        if content['format'] != FORMAT:
            raise Corrupt('another version of cnn_jax wrote it')
        if content['config'] != self._facts['config']:
            raise Corrupt('it belongs to a run of another config')
        return content

    def _sweep(self) -> None:
        """Remove what Orbax has given up, and what killed saves left behind."""
        with contextlib.suppress(OSError, ValueError):
            place = self._place(int(self._unfinished.read_text()))
            if not (place / SEAL).exists():
                shutil.rmtree(place, ignore_errors=True)
            self._unfinished.unlink()
        for place in (self._folder / DELETED, *self._folder.glob('step_*.orbax-checkpoint-tmp*')):
            shutil.rmtree(place, ignore_errors=True)

    def _aside(self, step: int) -> str:
        """Move a checkpoint out of the way; where to, in words."""
        place = self._folder.with_name('damaged')
        place.mkdir(exist_ok=True)
        taken = len(list(place.glob(f'step_{step}*')))
        new = place / (f'step_{step}' + f'-{taken}' * bool(taken))
        os.rename(self._place(step), new)
        return f'it is kept in {new}'


def digest(state: Any) -> str:
    """SHA-256 of the values, types, shapes and paths of all leaves of a state."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        found.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _reason(error: Exception) -> str:
    """What an error of the file system or of TensorStore says, in short."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):  # buried in a report
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__


def _parts(state: State) -> dict[str, Any]:
    """The state as it is on the disk: without what the run does not use, as before there was it."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if name not in OPTIONAL or part}


def _shapes(parts: dict[str, Any]) -> dict[str, Any]:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(leaf):
        sharding = getattr(leaf, 'sharding', None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, parts)
