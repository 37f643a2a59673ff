"""Checkpoints by Orbax: the latest k and the best one, each whole or not used."""

import contextlib
import dataclasses
import errno
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
from cnn_jax.files import (
    SEAL,
    Corrupt,
    make_folder,
    read_json,
    read_sealed_folder,
    seal_folder,
    sync,
)
from cnn_jax.mesh import Layout
from cnn_jax.train.metrics import score_of
from cnn_jax.train.program import State

FORMAT = 2  # raised when a checkpoint's content is arranged otherwise
OPTIONAL = ('init_params', 'eval_batch_stats')  # parts of the state that a run may not use
SAVING, REMOVING = 'saving', 'removing'  # folders of what has not, or no longer, a step's name
OVERHEAD = 1 << 18  # bytes of a checkpoint besides the state's, generously


class Checkpoints:
    """The checkpoints of one run, in folders `step_N` which appear whole, sealed and on the disk.

    With several processes every method but `steps` and `place` is a collective: all must call it
    at once. Process 0 alone reads and writes. The state is gathered into its memory, array by
    array, when it is saved, and broadcast when it is restored. So no file system need be shared,
    any number of processes can resume, and the files are those of a run with one process.

    Args:
        folder: Their folder; created when the first one is saved.
        config: The run's config.
        layout: The layout of a restored state on several devices.
    """

    def __init__(self, folder: Path, config: cfg.Config, layout: Layout | None = None):
        self._folder = Path(folder).absolute()
        self._config, self._layout = config, layout
        self._facts = {'format': FORMAT, 'config': cfg.content_hash(config)}

    def place(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self._folder / f'step_{step}'

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, whole or not, the newest first."""
        names = [path.name.removeprefix('step_') for path in self._folder.glob('step_*')]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, if there is one."""
        return mesh.on_process_zero(self._latest)

    def best(self) -> int | None:
        """Return the step of the best whole checkpoint saved with metrics; a tie: the last."""
        return mesh.on_process_zero(lambda: self._best(self._content))

    def save(
        self,
        state: State,
        progress: dict[str, Any],
        metrics: dict[str, float] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        """Write a checkpoint, and remove those that are no longer wanted once it is on the disk.

        A second one of the same step is not written again.

        Args:
            state: The training state.
            progress: The facts with which the loop resumes in the middle of an epoch; JSON.
            metrics: The evaluation at this step, if there was one.
            files: More files to hold, by name.

        Errors:
            RunFailed: The disk is full, or cannot be written for another reason.
        """
        step, parts = int(state.step), mesh.gather_to_host(_parts(state))
        content = self._facts | {'progress': progress, 'metrics': metrics}
        content['structure'] = _structure(_parts(state))
        mesh.on_process_zero(lambda: self._save(step, parts, content, files or {}))

    def resumable(self, say: Callable[[str], object]) -> tuple[int, dict[str, Any]] | None:
        """Return the newest whole checkpoint's step and its progress; None without any.

        Damaged ones are moved to the folder `damaged` beside this one, so only the process that
        holds the work directory may call it.

        Args:
            say: Called with a sentence about each one that is moved.

        Errors:
            UserError: There are checkpoints, but none that can be used.
        """
        return mesh.on_process_zero(lambda: self._resumable(say))

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Return the state and the progress saved at a step.

        Args:
            step: One that `latest`, `best` or `resumable` returned.
            like: A state (or its shapes) of the same structure; where its optimizer state is None,
                that is not read.

        Errors:
            UserError: The checkpoint is damaged or belongs to another run.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _parts(like))
        parts: dict[str, Any] = {}

        def read() -> dict[str, Any]:
            arrays, progress = self._read(step, shapes)
            parts.update(arrays)
            return progress

        progress = mesh.on_process_zero(read)
        if mesh.is_multiprocess():
            parts = mesh.broadcast(parts, shapes)
        state = dataclasses.replace(like, **parts)
        return self._layout.shard(state) if self._layout else jax.device_put(state), progress

    def _save(
        self, step: int, parts: dict[str, Any], content: dict[str, Any], files: dict[str, bytes]
    ) -> None:
        if self.place(step).exists():
            return
        new = self._folder / SAVING
        try:
            self._sweep()
            self._check_room(parts)
            make_folder(new)
            with _checkpointer() as checkpointer:
                checkpointer.save(new / 'state', parts)
            for name, data in files.items():
                (new / name).write_bytes(data)
            seal_folder(new, content)
            os.rename(new, self.place(step))
            sync(self._folder)
            for old in self._unwanted():
                os.rename(self.place(old), self._folder / REMOVING)
                shutil.rmtree(self._folder / REMOVING)
        except (OSError, ValueError) as error:  # ValueError: TensorStore's
            raise RunFailed(
                f'the checkpoint of step {step} cannot be written in {self._folder} '
                f'({_reason(error)}); make room, and rerun the same command to resume from the '
                'one before'
            ) from error

    def _latest(self) -> int | None:
        sealed = (step for step in self.steps() if (self.place(step) / SEAL).exists())
        return next(sealed, None)

    def _best(self, read: Callable[[int], dict[str, Any]]) -> int | None:
        """Find the best checkpoint among those whose content can be read."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(Corrupt, OSError):
                if metrics := read(step)['metrics']:
                    score = score_of(self._config, metrics)
                    scores[step] = -math.inf if math.isnan(score) else score
        return max(scores, key=lambda step: (scores[step], step)) if scores else None

    def _unwanted(self) -> list[int]:
        """The steps that are neither among the latest nor the best."""
        best = self._best(lambda step: read_json(self.place(step) / SEAL)['content'])
        return [step for step in self.steps()[self._config.train.keep :] if step != best]

    def _resumable(self, say: Callable[[str], object]) -> tuple[int, dict[str, Any]] | None:
        self._sweep()
        newest, wrong = None, {}
        for step in self.steps():
            try:
                content = self._content(step)
            except Corrupt as error:
                wrong[step] = str(error)
            else:
                newest = newest or (step, content['progress'])
        if wrong and not newest:
            reasons = '; '.join(f'step {step}: {reason}' for step, reason in wrong.items())
            raise UserError(
                f'no checkpoint in {self._folder} can be used ({reasons}); restore one, or start '
                'again in another --workdir'
            )
        for step, reason in wrong.items():
            place = self._quarantine(step)
            say(f'the checkpoint of step {step} cannot be used ({reason}); it was moved to {place}')
        return newest

    def _read(self, step: int, shapes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the arrays and the progress of a checkpoint into this host's memory."""
        try:
            content = self._content(step)
            for name, structure in _structure(shapes).items():  # which Orbax need not check
                if content['structure'].get(name) != structure:
                    raise ValueError(f'its {name} are arranged otherwise')
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
            return _restore(self.place(step) / 'state', target), content['progress']
        except UserError:
            raise
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f'the checkpoint of step {step} in {self._folder} cannot be used '
                f'({_reason(error)}); rerun launch.train with the same command to go back to the '
                'one before'
            ) from error

    def _content(self, step: int) -> dict[str, Any]:
        """Return what was sealed into a checkpoint that is whole and this run's.

        Errors:
            Corrupt: It is damaged, or of another config.
            UserError: Another version of cnn_jax wrote it.
        """
        content = read_sealed_folder(self.place(step))
        if content['format'] != FORMAT:
            raise UserError(
                f'another version of cnn_jax wrote the checkpoints in {self._folder} (format '
                f'{content["format"]}; this one reads {FORMAT}); use that version, or start again '
                'in another --workdir'
            )
        if content['config'] != self._facts['config']:
            raise Corrupt('it belongs to a run of another config')
        return content

    def _check_room(self, parts: dict[str, Any]) -> None:
        """Find a full disk before Orbax does, whose threads then all report it."""
        needed = OVERHEAD + sum(leaf.nbytes for leaf in jax.tree.leaves(parts))
        make_folder(self._folder)
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sweep(self) -> None:
        """Remove what a killed process was saving or removing."""
        for name in (SAVING, REMOVING):
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _quarantine(self, step: int) -> Path:
        """Move a checkpoint out of the way; returns where it is now."""
        folder = self._folder.with_name('damaged')
        make_folder(folder)
        new, number = folder / f'step_{step}', 1
        while new.exists():
            new, number = folder / f'step_{step}-{number}', number + 1
        os.rename(self.place(step), new)
        return new


def digest(state: Any) -> str:
    """Return the SHA-256 of the values, types, shapes and paths of all leaves of a state."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        sha256.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def _restore(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Read the arrays of a state, or some of its parts, with Orbax."""
    import orbax.checkpoint as ocp

    arguments = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
        return checkpointer.restore(folder, args=arguments)


def _checkpointer():
    """Orbax's writer of a tree of arrays, done with a call when it returns.

    A step is tens of milliseconds and a save not much more: a save that has returned is on the
    disk, and an error in it stops the run.
    """
    import orbax.checkpoint as ocp

    handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
    return ocp.Checkpointer(handler, multiprocessing_options=_alone())


def _alone():
    """Orbax's option for process 0, which does not wait for the others."""
    from orbax.checkpoint.options import MultiprocessingOptions

    if mesh.is_multiprocess():
        return MultiprocessingOptions(0, {0}, 'first')
    return MultiprocessingOptions()


def _parts(state: State) -> dict[str, Any]:
    """The state as it is on the disk: without the parts that the run does not use."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {
        name: part
        for name, part in parts.items()
        if part is not None and (name not in OPTIONAL or part)
    }


def _structure(parts: dict[str, Any]) -> dict[str, str]:
    """A digest of the paths, shapes and types of the arrays of each part."""

    def arrays(part: Any) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(part)
        return str([(jax.tree_util.keystr(at), leaf.shape, str(leaf.dtype)) for at, leaf in leaves])

    return {name: hashlib.sha256(arrays(part).encode()).hexdigest() for name, part in parts.items()}


def _reason(error: Exception) -> str:
    """The short text of an error of the file system or of TensorStore."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):  # buried in a report
        if os.strerror(number) in text:
            return os.strerror(number)
    return text.splitlines()[0] if text else type(error).__name__
