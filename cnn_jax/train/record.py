"""The record of a run: metrics, TensorBoard events, learning curves.

`metrics.jsonl` holds what the run computed and nothing that depends on the machine's speed, so
that the same run writes the same file; so does `steps.f32`, two little-endian float32 a step: the
objective and the norm of its gradient. Times are in `timing.jsonl`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cnn_jax.files import write_atomically
from cnn_jax.tools.figures import draw_curves
from cnn_jax.train.journal import Journal

STEPS = 'steps.f32'


class Record:
    """Writes the metrics of a run as it goes on.

    Args:
        folder: The work directory.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._metrics = Journal(folder / 'metrics.jsonl')
        self._steps = Journal(folder / STEPS)
        self._waiting: list[tuple[float, float]] = []
        self._events: Any = None

    def fault(self, position: dict[str, Any]) -> str:
        """What is wrong with the files if the run shall go on from a `position`; '' for nothing."""
        for journal in (self._metrics, self._steps):
            if not journal.holds(position[journal.path.name]):
                return f'{journal.path.name} no longer holds what it held then'
        return ''

    def begun(self) -> bool:
        """Whether a run has written metrics here."""
        return bool(read_lines(self._metrics.path))

    def resume(self, step: int, position: dict[str, Any] | None) -> None:
        """Go on after a step, where `position` was taken; with None, start anew.

        What a killed run wrote after that is removed, and will be written again.
        """
        from tensorboardX import SummaryWriter

        for journal in (self._metrics, self._steps):
            journal.resume(position and position[journal.path.name])
        path = self._folder / 'timing.jsonl'
        kept = [line for line in read_lines(path) if line['step'] <= step]
        write_atomically(path, lambda file: file.write(_encode(kept)))
        self._events = SummaryWriter(str(self._folder), purge_step=step + 1)

    def step(self, objective: float, gradient_norm: float) -> None:
        """Keep what one step computed, for `launch.verify`; written at the next `position`."""
        self._waiting.append((objective, gradient_norm))

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append the metrics of one split at one step, to the file and to TensorBoard."""
        self._metrics.append(_encode([{'step': step, 'split': split, **values}]))
        for name, number in values.items():
            if isinstance(number, float):
                self._events.add_scalar(f'{name}/{split}', number, step)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Append speeds and times, which are not part of the result."""
        with (self._folder / 'timing.jsonl').open('ab') as file:
            file.write(_encode([{'step': step, **values}]))
        for name, number in values.items():
            self._events.add_scalar(f'speed/{name}', number, step)

    def position(self) -> dict[str, Any]:
        """Where the files end, once they are on the disk; JSON, for a checkpoint."""
        self._steps.append(np.array(self._waiting, '<f4').tobytes())
        self._waiting = []
        return {each.path.name: each.position() for each in (self._metrics, self._steps)}

    def close(self) -> None:
        """Flush TensorBoard's events and draw the learning curves."""
        self._events.close()
        draw_curves(read_lines(self._folder / 'metrics.jsonl'), self._folder / 'curves.png')


def read_steps(folder: Path) -> Float32[np.ndarray, 'n 2']:
    """Objective and gradient norm of every step that was recorded."""
    path = folder / STEPS
    whole = path.read_bytes() if path.exists() else b''
    return np.frombuffer(whole[: len(whole) // 8 * 8], '<f4').reshape(-1, 2)


def _encode(lines: list[dict[str, Any]]) -> bytes:
    return ''.join(json.dumps(line) + '\n' for line in lines).encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
