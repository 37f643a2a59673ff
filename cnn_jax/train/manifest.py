"""The manifest of a run: its code, packages, machine and data; and what has changed since."""

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.errors import UserError
from cnn_jax.files import write_text
from cnn_jax.mesh import Layout

NAME = 'manifest.json'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain', 'pillow')
# Of the machine's facts, those that the numbers depend on.
DECISIVE = ('devices', 'layout', 'threads', 'xla_flags', 'python')


def manifest(
    config: cfg.Config,
    settings: runtime.Settings,
    data: dict[str, Any],
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The facts that a reader needs to judge or repeat the run.

    Args:
        config: The run's config.
        settings: The runtime settings of this process.
        data: Names, sizes, classes and fingerprints of the splits.
        layout: The layout of batches and state on several devices.
    """
    import jax

    options: Any = jax.config
    machine = runtime.machine(settings)
    if layout:
        machine['layout'] = layout.facts
    return {
        'config_hash': cfg.content_hash(config),
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


def load_config(folder: Path) -> cfg.Config:
    """The config of the run in a work directory.

    Errors:
        UserError: The folder is missing or holds no run.
    """
    path = folder / 'config.json'
    if not path.exists():
        raise UserError(
            f'{folder} is not the work directory of a run (it has no config.json); '
            'give the --workdir that launch.train was given'
        )
    return cfg.from_json(path.read_text())


def read(folder: Path) -> dict[str, Any]:
    """The manifest in a work directory.

    Errors:
        UserError: The folder holds no run, one that never started to train, or a damaged file.
    """
    load_config(folder)
    found = stored(folder)
    if found is None:
        raise UserError(f'{folder} has no {NAME}: its run never started; run launch.train')
    return found


def stored(folder: Path) -> dict[str, Any] | None:
    """The manifest in a work directory, if there is one.

    Errors:
        UserError: It is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        # What every reader relies on.
        _ = found['config_hash'], found['machine']['threads'], found['data']['train']['fingerprint']
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path} is damaged ({error}); restore it') from error
    return found


def threads(folder: Path, config: cfg.Config) -> int:
    """The threads to compute with: the config's, else those that the run in a folder began with.

    XLA on a CPU computes the same bits with the same number of threads, on any number of cores.
    """
    before = stored(folder)
    return config.train.threads or (before['machine']['threads'] if before else 0)


def check_data(folder: Path, description: dict[str, Any]) -> None:
    """Check that a run that is continued still has the data it began with.

    Args:
        folder: The work directory.
        description: The data as they are now, from `setup.describe`.

    Errors:
        UserError: The images, the labels, their order, their preprocessing or the pretrained
            weights have changed.
    """
    found = stored(folder)
    if found is None:
        return
    before = found['data']
    for name, called in (('weights', 'pretrained weights'), ('kind', 'preprocessing')):
        old, new = (facts['preprocessing'].get(name) for facts in (before, description))
        if old != new:
            raise UserError(
                f'the {called} of the run in {folder} were others when it began ({old} then, {new} '
                'now); restore them or choose another --workdir'
            )
    for split in ('train', 'eval'):
        if before[split] != description[split]:
            raise UserError(
                f'the {split} images of {description["source"]} have changed since the run in '
                f'{folder} began ({before[split]["count"]} images then, '
                f'{description[split]["count"]} now); restore them or choose another --workdir'
            )


def begin(folder: Path, now: dict[str, Any]) -> list[str]:
    """Write the manifest of a run that starts; of one that goes on, keep what has changed.

    Returns:
        A sentence about the changes, if they may change the numbers from here on.
    """
    before = stored(folder)
    if before is None:
        write_text(folder / NAME, json.dumps(now, indent=2) + '\n')
        return []
    changed = differences(before, now)
    if not changed:
        return []
    told = [f'{name}: {old} → {new}' for name, (old, new) in changed.items()]
    before.setdefault('resumed', []).append(told)
    write_text(folder / NAME, json.dumps(before, indent=2) + '\n')
    return [
        f'this run began under other conditions ({"; ".join(told)}): from here on its numbers may '
        'differ in the last digits from those of an undisturbed run'
    ]


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The differences between two manifests that can change the numbers: by name, old and new."""
    a, b = map(_decisive, (before, now))
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


def _decisive(manifest: dict[str, Any]) -> dict[str, Any]:
    code, data = manifest['code'], manifest['data']
    return {
        **{name: manifest['machine'].get(name) for name in DECISIVE},
        **manifest['packages'],
        **{f'code ({name})': value for name, value in code.items()},
        **{f'{split} data': data[split]['fingerprint'][:12] for split in ('train', 'eval')},
    }
