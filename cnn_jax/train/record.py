"""The record of a run: metrics, TensorBoard events, learning curves, images left out.

`metrics.jsonl` holds what the run computed and nothing that depends on the machine's speed, so
that the same run writes the same file; so does `steps.f32`, two little-endian float32 a step: the
objective and the norm of its gradient. Each checkpoint holds a copy of both, from which a resumed
run writes them again: what a killed run wrote after it disappears. Times are in `timing.jsonl`.
"""

import contextlib
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cnn_jax.data.source import count_left_out, remarks
from cnn_jax.errors import FORMULA
from cnn_jax.files import Corrupt, read_bytes, sync, write_bytes
from cnn_jax.tools.figures import draw_curves

METRICS, STEPS, TIMING = 'metrics.jsonl', 'steps.f32', 'timing.jsonl'


class Record:
    """The record of a run in its work directory, written as it goes on."""

    def __init__(self, folder: Path, scalars: Callable[..., object] = lambda *_: None):
        self._folder, self._scalars = folder, scalars  # where else metrics go, by step and name
        self._content = {METRICS: b'', STEPS: b''}
        self._pending: list[tuple[float, float]] = []
        self._events: Any = None

    def resume(self, step: int, checkpoint: Path | None) -> list[str]:
        """Restore the record from a checkpoint's folder, or start anew; return what was damaged."""
        from tensorboardX import SummaryWriter

        damaged = damaged_files(self._folder, checkpoint) if checkpoint else []
        notes = [f'{self._folder / name} was damaged and is restored' for name in damaged]
        if not checkpoint and read_lines(self._folder / METRICS):
            notes.append('no checkpoint had been saved: starting again from step 0')
        for name in self._content:
            self._content[name] = read_bytes(checkpoint / name) if checkpoint else b''
            write_bytes(self._folder / name, self._content[name])
        path = self._folder / TIMING
        lines = read_lines(path)
        if len(lines) < len(_content(path).splitlines()) - 1:  # not only torn at its end
            notes.append(f'{path} was damaged; it goes on after line {len(lines)}')
        write_bytes(path, _encode([line for line in lines if line['step'] <= step]))
        self._events = SummaryWriter(str(self._folder), purge_step=step + 1)
        return notes

    def step(self, objective: float, gradient_norm: float) -> None:
        """Add what one step computed, for `launch.verify`; written at the next `snapshot`."""
        self._pending.append((objective, gradient_norm))

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append the metrics of one split at one step, to the file and to TensorBoard."""
        self._append(METRICS, _encode([{'step': step, 'split': split, **values}]))
        numbers = {name: number for name, number in values.items() if isinstance(number, float)}
        self._scalars(step, {f'{name}/{split}': number for name, number in numbers.items()})
        for name, number in numbers.items():
            self._events.add_scalar(f'{name}/{split}', number, step)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Append speeds and times, which are not part of the result."""
        with (self._folder / TIMING).open('ab') as file:
            file.write(_encode([{'step': step, **values}]))
        for name, number in values.items():
            self._events.add_scalar(f'speed/{name}', number, step)

    def snapshot(self) -> dict[str, bytes]:
        """Return the record's files as they are now, by name, for a checkpoint to hold.

        Whole copies: 8 bytes a step and some hundred an evaluation, a megabyte in 100,000 steps.
        """
        self._append(STEPS, np.array(self._pending, '<f4').tobytes())
        self._pending = []
        return dict(self._content)

    def close(self) -> None:
        """Flush everything to the disk and draw the learning curves."""
        for name in self._content:
            sync(self._folder / name)
        self._events.close()
        draw_curves(read_lines(self._folder / METRICS), self._folder / 'curves.png')

    def _append(self, name: str, data: bytes) -> None:
        self._content[name] += data
        with (self._folder / name).open('ab') as file:
            file.write(data)


class NullRecord:
    """The record of the processes other than the first, which compute the same numbers."""

    def _ignore(self, *_: Any) -> Any:
        return {}  # no notes, and no files

    resume = step = metrics = timing = snapshot = close = _ignore


def damaged_files(folder: Path, checkpoint: Path) -> list[str]:
    """The names of a record's files that do not begin as they were at a checkpoint."""
    return [
        name
        for name in (METRICS, STEPS)
        if not _content(folder / name).startswith(_content(checkpoint / name))
    ]


def read_steps(folder: Path) -> Float32[np.ndarray, 'n 2']:
    """Read objective and gradient norm of every step that was recorded."""
    content = _content(folder / STEPS)
    return np.frombuffer(content[: len(content) // 8 * 8], '<f4').reshape(-1, 2)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a JSONL file up to the first that is damaged or torn by a crash."""
    lines = []
    for text in _content(path).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get('step'), int):
            break
        lines.append(line)
    return lines


def data_notes(folder: Path | None, train: Any, evaluation: Any) -> list[str]:
    """The lines that a run says of both splits; `skipped.csv` in the folder lists what is left out.

    Without a folder, as on all processes but one, nothing is written and nothing said of it.
    """
    notes = [f'note: {line}' for line in remarks(train, evaluation)]
    if folder and write_skipped(folder, {'train': train, 'eval': evaluation}):
        counted = count_left_out([*train.skipped, *evaluation.skipped])
        notes.insert(0, f'left out: {counted} (listed in {folder}/skipped.csv)')
    return notes


def write_skipped(folder: Path, batches: dict[str, Any]) -> int:
    """Write `skipped.csv`: split, path and reason of each image left out; return their number.

    It is CSV as of RFC 4180 in UTF-8; bytes of a name that are not UTF-8 are written as they are
    (`errors='surrogateescape'` reads them back). A path that a spreadsheet would take for a formula
    begins with `./`. Without such images there is no file.
    """
    rows = [
        (split, f'./{path}' if path.startswith(FORMULA) else path, reason)
        for split, opened in batches.items()
        for path, reason in opened.skipped
    ]
    if not rows:
        (folder / 'skipped.csv').unlink(missing_ok=True)
        return 0
    table = io.StringIO(newline='')
    csv.writer(table).writerows([('split', 'path', 'reason'), *rows])
    write_bytes(folder / 'skipped.csv', table.getvalue().encode('utf-8', 'surrogateescape'))
    return len({path for _, path, _ in rows})


def _content(path: Path) -> bytes:
    """The bytes of a file; b'' where there is none that can be read."""
    with contextlib.suppress(OSError, Corrupt):
        return read_bytes(path)
    return b''


def _encode(lines: list[dict[str, Any]]) -> bytes:
    return ''.join(json.dumps(line) + '\n' for line in lines).encode()
