"""The record of a run: manifest, metrics, TensorBoard events, learning curves.

`metrics.jsonl` holds what the run computed and nothing that depends on the machine's speed, so
that the same run writes the same file; times are in `timing.jsonl`.
"""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from cnn_jax.cache import write_atomically
from cnn_jax.train.figures import draw_curves
from cnn_jax.train.workdir import write_text

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain', 'pillow')


def manifest(config_hash: str, machine: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to judge or repeat the run.

    Args:
        config_hash: SHA-256 of the config.
        machine: Devices and runtime settings.
        data: Names, sizes, classes and fingerprints of the splits.
    """
    import jax

    options: Any = jax.config
    return {
        'config_hash': config_hash,
        'code': code_version(),
        'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
        'machine': machine,
        'prng': {
            'implementation': 'threefry2x32',
            'partitionable': bool(options.jax_threefry_partitionable),
        },
        'data': data,
    }


def code_version() -> dict[str, Any]:
    """The version of this package; in a git checkout also its commit and the changed files."""
    version: dict[str, Any] = {'cnn_jax': importlib.import_module('cnn_jax').__version__}
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        command = ['git', '-C', str(root), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git('rev-parse', '--show-toplevel') == str(root):
        changed = git('status', '--porcelain', '--untracked-files=no')
        version |= {
            'commit': git('rev-parse', 'HEAD'),
            'changed_files': (changed or '').splitlines(),
        }
    return version


class Record:
    """Writes the metrics of a run as it goes on.

    Args:
        folder: The work directory.
        step: The step the run starts from; lines of later steps, left by a run that was killed
            before its next checkpoint, are removed and will be written again.
    """

    def __init__(self, folder: Path, step: int = 0):
        from tensorboardX import SummaryWriter

        self._folder = folder
        for name in ('metrics.jsonl', 'timing.jsonl'):
            path = folder / name
            kept = [line for line in read_lines(path) if line['step'] <= step]
            write_atomically(path, lambda file, kept=kept: file.write(_encode(kept)))
        self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append the metrics of one split at one step, to the file and to TensorBoard."""
        self._append('metrics.jsonl', {'step': step, 'split': split, **values})
        for name, number in values.items():
            if isinstance(number, float):
                self._events.add_scalar(f'{name}/{split}', number, step)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Append speeds and times, which are not part of the result."""
        self._append('timing.jsonl', {'step': step, **values})
        for name, number in values.items():
            self._events.add_scalar(f'speed/{name}', number, step)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self._folder / name).open('ab') as file:
            file.write(_encode([line]))

    def close(self) -> None:
        """Flush TensorBoard's events and draw the learning curves."""
        self._events.close()
        draw_curves(read_lines(self._folder / 'metrics.jsonl'), self._folder / 'curves.png')


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


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `manifest.json`."""
    write_text(folder / 'manifest.json', json.dumps(content, indent=2) + '\n')
