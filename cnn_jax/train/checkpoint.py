"""Checkpoints by Orbax: the latest k and the best one, each whole or not used."""

import dataclasses
import errno
import functools
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnn_jax import config as cfg
from cnn_jax import mesh, params
from cnn_jax.errors import RunFailed, UserError, reason_of
from cnn_jax.files import (
    SEAL,
    Corrupt,
    make_folder,
    read_json,
    read_sealed_folder,
    seal_folder,
    sync,
    write_json,
)
from cnn_jax.mesh import Layout
from cnn_jax.train import manifest
from cnn_jax.train.metrics import score_of
from cnn_jax.train.program import State

FORMAT = 3  # raised when a checkpoint's content is arranged otherwise
SLIM = 4  # that of one without frozen parameters
OPTIONAL = ('init_params', 'eval_batch_stats')  # parts of the state that a run may not use
SAVING, REMOVING = 'saving', 'removing'  # folders of what has not, or no longer, a step's name
OVERHEAD = 1 << 18  # bytes of a checkpoint besides the state's, generously


class Checkpoints:
    """The checkpoints of one run, in folders `step_N` which appear whole, sealed and on the disk.

    Each holds a copy of the run's manifest, which readers compare, and the step of the best one.

    `frozen` returns the parameters, by path, that no phase trains and a file of pretrained weights
    brings. A checkpoint holds their digest only, and they are what it returns when one is restored.

    With several processes every method but `steps` and `place` is a collective: all must call it
    at once. Process 0 alone reads and writes. The state is gathered into its memory, array by
    array, when it is saved, and broadcast when it is restored. So no file system need be shared,
    any number of processes can resume, and the files are those of a run with one process.
    """

    def __init__(
        self,
        folder: Path,
        config: cfg.Config,
        layout: Layout | None = None,
        frozen: Callable[[], params.Flat] = dict,
    ):
        self._folder = Path(folder).absolute()
        self._config, self._layout, self._frozen = config, layout, frozen

    def place(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self._folder / f'step_{step}'

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, whole or not, the newest first."""
        names = [path.name.removeprefix('step_') for path in self._folder.glob('step_*')]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint, if there is one."""
        return mesh.on_process_zero(lambda: next(iter(self.steps()), None))

    def best(self) -> int | None:
        """Return the step of the best checkpoint with metrics (of equals the last), if any."""

        def best() -> int | None:
            latest = next(iter(self.steps()), None)
            return None if latest is None else self.check(latest)['best'].get('step')

        return mesh.on_process_zero(best)

    def check(self, step: int) -> dict[str, Any]:
        """Return what was sealed into a checkpoint; errors as of `restore`. Process 0 alone."""
        try:
            return self._content(step)
        except (Corrupt, OSError) as error:
            raise self._unusable(step, error) from error

    def save(
        self,
        state: State,
        progress: dict[str, Any],
        metrics: dict[str, float] | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        """Write a checkpoint, and remove those that are no longer wanted once it is on the disk.

        One that is there is left as it is; a full disk is a `RunFailed`.

        Args:
            state: The training state.
            progress: The facts with which the loop resumes in the middle of an epoch; JSON.
            metrics: The evaluation at this step, if there was one.
            files: More files to hold, by name.
        """
        step, parts = int(state.step), mesh.gather_to_host(_parts(state))
        content = {'format': FORMAT, 'progress': progress}
        mesh.on_process_zero(lambda: self._save(step, parts, content, metrics, files or {}))

    def resumable(self, say: Callable[[str], object]) -> tuple[int, dict[str, Any]] | None:
        """Return the newest whole checkpoint's step and its progress; None without any.

        Damaged ones are moved to the folder `damaged` beside this one, with a sentence to `say`, so
        only the process that holds the work directory may call it. UserError if all are damaged.
        """
        return mesh.on_process_zero(lambda: self._resumable(say))

    def restore(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """Return the state and the progress saved at a step that another method returned.

        `like` is a state (or its shapes) of the same structure; what is None is not read. A damaged
        checkpoint, or that of another run, is a UserError.
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
        self,
        step: int,
        parts: dict[str, Any],
        content: dict[str, Any],
        metrics: dict[str, float] | None,
        files: dict[str, bytes],
    ) -> None:
        if self.place(step).exists():
            return
        if paths := self._left_out:
            parts, frozen = _without(parts, paths)
            content |= {'format': SLIM, 'frozen': {'paths': paths, 'digest': digest(frozen)}}
        content['structure'] = _structure(parts)
        new = self._folder / SAVING
        try:
            self._sweep()
            self._check_room(parts)
            make_folder(new)
            with _orbax() as orbax:
                orbax.save(new / 'state', parts)
            for name, data in files.items():
                (new / name).write_bytes(data)
            if self._manifest:
                write_json(new / manifest.NAME, self._manifest, indent=2)
            best = self._best(step, metrics)
            seal_folder(new, content | {'best': best})
            os.rename(new, self.place(step))
            sync(self._folder)
            unwanted = self.steps()[self._config.train.keep :]
            for old in (step for step in unwanted if step != best.get('step')):
                os.rename(self.place(old), self._folder / REMOVING)
                shutil.rmtree(self._folder / REMOVING)
        except (OSError, ValueError) as error:  # ValueError: TensorStore's
            raise RunFailed(
                f'the checkpoint of step {step} cannot be written in {self._folder} '
                f'({_reason(error)}); make room, and rerun the same command to resume from the '
                'one before'
            ) from error

    @functools.cached_property
    def _left_out(self) -> list[str]:
        return [*self._frozen()]

    @functools.cached_property
    def _manifest(self) -> dict[str, Any] | None:
        return manifest.stored(self._folder.parent)

    def _best(self, step: int, metrics: dict[str, float] | None) -> dict[str, Any]:
        """The step and the score of the best checkpoint, with that of a new step; {}: of none."""
        steps = self.steps()
        best = read_json(self.place(steps[0]) / SEAL)['content']['best'] if steps else {}
        if not metrics:
            return best
        score = score_of(self._config, metrics)
        score = -math.inf if math.isnan(score) else score
        return {'step': step, 'score': score} if score >= best.get('score', -math.inf) else best

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
        import orbax.checkpoint as ocp

        content, frozen = self.check(step), {}
        if facts := content.get('frozen'):
            shapes, _ = _without(shapes, facts['paths'])
            frozen = self._given(step, facts)
        try:
            for name, structure in _structure(shapes).items():  # which Orbax need not check
                if content['structure'].get(name) != structure:
                    raise ValueError(f'its {name} are arranged otherwise')
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
            options: Any = {
                'restore_args': ocp.checkpoint_utils.construct_restore_args(target),
                'partial_restore': True,
            }
            with _orbax() as orbax:
                arrays = orbax.restore(self.place(step) / 'state', target, **options)
        except (ValueError, KeyError, OSError) as error:
            raise self._unusable(step, error) from error
        if frozen:
            arrays['params'] = params.merge(params.flatten(arrays['params']), frozen)
        return arrays, content['progress']

    def _given(self, step: int, facts: dict[str, Any]) -> params.Flat:
        """The parameters that a checkpoint left out; UserError if they are no longer the same."""
        given = self._frozen()
        found = {path: np.array(given[path]) for path in facts['paths'] if path in given}
        if (now := digest(found)) != facts['digest']:
            raise UserError(
                f'the frozen weights of the run in {self._folder.parent} have the digest '
                f'{facts["digest"][:12]}… at step {step}, and those of config.model.weights='
                f'{self._config.model.weights} have {now[:12]}…; put the file that it was trained '
                'with back'
            )
        return found

    def _unusable(self, step: int, error: Exception) -> UserError:
        mend = 'rerun launch.train with the same command to go back to the one before'
        if step != max(self.steps(), default=None):
            mend = 'restore it, or take the latest (--checkpoint=latest)'
        return UserError(
            f'the checkpoint of step {step} in {self._folder} cannot be used ({_reason(error)}); '
            f'{mend}'
        )

    def _content(self, step: int) -> dict[str, Any]:
        """Return what was sealed into a checkpoint that is whole (else `Corrupt`) and the run's."""
        content = read_sealed_folder(self.place(step))
        if content['format'] not in (FORMAT, SLIM):
            raise UserError(
                f'another version of cnn_jax wrote the checkpoints in {self._folder} (format '
                f'{content["format"]}; this one reads {FORMAT} and {SLIM}); use that version, or '
                'start again in another --workdir'
            )
        copy = self.place(step) / manifest.NAME
        saved = read_json(copy) if copy.exists() else None
        if manifest.origin(saved) != manifest.origin(self._manifest):
            raise UserError(
                f'{self._folder.parent / manifest.NAME} is not what it was at step {step}: copy '
                f'{copy} to its place, or remove that checkpoint if it is of another run'
            )
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
        new = tempfile.mkdtemp(prefix=f'step_{step}_', dir=folder)
        os.rename(self.place(step), new)
        return Path(new)


def digest(state: Any) -> str:
    """Return the SHA-256 of the values, types, shapes and paths of all leaves of a state."""
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        sha256.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n'.encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


def _orbax():
    """Orbax's reader and writer of a tree of arrays; a call that returns is done.

    A step is tens of milliseconds and a save not much more: an error in it stops the run. Of
    several processes, process 0 does not wait for the others.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint.options import MultiprocessingOptions

    alone = MultiprocessingOptions(0, {0}, 'first')
    alone = alone if mesh.is_multiprocess() else MultiprocessingOptions()
    # Weights are noise to a compressor: 8% less to write for several times the work.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _parts(state: State) -> dict[str, Any]:
    """The state as it is on the disk: without the parts that the run does not use."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {
        name: part
        for name, part in parts.items()
        if part is not None and (name not in OPTIONAL or part)
    }


def _without(parts: dict[str, Any], paths: Collection[str]) -> tuple[dict[str, Any], params.Flat]:
    """The parts without some of the parameters, and these."""
    left_out, kept = params.partition(parts['params'], paths)
    return parts | {'params': params.unflatten(kept)}, left_out


def _structure(parts: dict[str, Any]) -> dict[str, str]:
    """A digest of the paths, shapes and types of the arrays of each part."""

    def arrays(part: Any) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(part)
        return str([(jax.tree_util.keystr(at), leaf.shape, str(leaf.dtype)) for at, leaf in leaves])

    return {name: hashlib.sha256(arrays(part).encode()).hexdigest() for name, part in parts.items()}


def _reason(error: Exception) -> str:
    """The short text of an error of the file system, or of TensorStore, whose report buries it."""
    numbers = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG
    buried = [text for text in map(os.strerror, numbers) if text in str(error)]
    return buried[0] if buried else reason_of(error)
