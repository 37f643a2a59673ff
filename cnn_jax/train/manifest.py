"""The manifest of a run: its code, packages, machine and data; and its hold on a work directory.

Predictions depend on it (classes, preprocessing), so no bit of it may change unnoticed: the file
carries its digest, each checkpoint a copy, and the digest of the config is in it.
"""

import contextlib
import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from cnn_jax import runtime
from cnn_jax.errors import UserError, reason_of
from cnn_jax.files import (
    Corrupt,
    lock,
    lock_holder,
    make_writable,
    read_json,
    read_text,
    write_json,
    write_text,
)
from cnn_jax.mesh import Layout

NAME = 'manifest.json'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'grain', 'pillow')
# Of the machine's facts, those that the numbers depend on.
DECISIVE = ('devices', 'layout', 'threads', 'xla_flags', 'python')
# Of the data's, those that predictions depend on, as messages call them.
DATA = {
    'class_names': 'class names',
    'image_shape': 'shape of the images',
    'kind': 'preprocessing',
    'weights': 'pretrained weights',
    'mean': 'means of the channels',
    'std': 'standard deviations of the channels',
    'channels': 'number of prepared channels',
}


def manifest(
    config: cfg.Config,
    settings: runtime.Settings,
    data: dict[str, Any],
    layout: Layout | None = None,
) -> dict[str, Any]:
    """The facts that a reader needs to judge or repeat the run; `data` from `setup.describe`."""
    machine = runtime.machine(settings)
    if layout:
        machine['layout'] = layout.facts
    return {
        'config_hash': cfg.content_hash(config),
        'steps_hash': cfg.content_hash(cfg.without_length(config)),
        'code': code_version(),
        'packages': packages(),
        'machine': machine,
        'data': data,
    }


def packages() -> dict[str, str]:
    """The versions of the packages that compute."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def code_version() -> dict[str, Any]:
    """The version of this package; in a git checkout also its commit and the changed files."""
    version: dict[str, Any] = {'cnn_jax': importlib.import_module('cnn_jax').__version__}
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        command = ['git', '-C', str(root), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors='replace', timeout=10, check=True
            )
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


def read(folder: Path) -> tuple[cfg.Config, dict[str, Any]]:
    """The config and the manifest of the run in a work directory; UserError if there is none.

    What the run tuned is in the config as it was chosen.
    """
    found, path = stored(folder), folder / 'config.json'
    if found is None:
        if not path.exists():
            raise UserError(
                f'{folder} is not the work directory of a run (it has no config.json); '
                'give the --workdir that launch.train was given'
            )
        raise UserError(f'{folder} has no {NAME}: its run never started; run launch.train')
    mend = 'run launch.train again with the same command, which restores it'
    try:
        config = cfg.from_json(read_text(path))
    except (FileNotFoundError, Corrupt, UserError) as error:
        raise UserError(f'{path} is missing or damaged ({error}); {mend}') from error
    if cfg.content_hash(config) != found['config_hash']:
        raise UserError(f'{path} is not the config that the run began with; {mend}')
    return cfg.replace(config, found.get('tuned', {})), found


def stored(folder: Path) -> dict[str, Any] | None:
    """The manifest in a work directory; None if there is none yet, UserError if it is damaged."""
    path = folder / NAME
    try:
        found = read_json(path)
        # What every reader relies on.
        _ = found['config_hash'], found['machine']['threads'], found['data']['train']['fingerprint']
    except FileNotFoundError:
        if any(folder.glob('checkpoints/step_*')):
            raise UserError(f'{path} is missing; {_way_on(folder)}') from None
        return None
    except (Corrupt, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({error}); {_way_on(folder)}') from error
    return found


def _way_on(folder: Path) -> str:
    copy = max(folder.glob(f'checkpoints/step_*/{NAME}'), default=None, key=os.path.getmtime)
    return f'copy {copy} to its place' if copy else 'restore it, or choose another --workdir'


def origin(manifest: dict[str, Any] | None) -> dict[str, Any]:
    """The part of a manifest that is written once, at the start of a run."""
    later = 'resumed', 'config_hash'  # which a larger number of epochs changes
    return {name: value for name, value in (manifest or {}).items() if name not in later}


def threads(folder: Path, config: cfg.Config) -> int:
    """The threads to compute with: the config's, else those that the run in a folder began with."""
    before = stored(folder)
    return config.train.threads or (before['machine']['threads'] if before else 0)


def check_data(folder: Path, description: dict[str, Any]) -> None:
    """Compare the data (`setup.describe`) with those the run began with; UserError if changed."""
    before = (stored(folder) or {}).get('data', description)
    for split in ('train', 'eval'):
        if before[split] != description[split]:
            raise UserError(
                f'the {split} images of {description["source"]} have changed since the run in '
                f'{folder} began ({before[split]["count"]} images then, '
                f'{description[split]["count"]} now); restore them or choose another --workdir'
            )
    for called, (old, new) in _changes(_data_facts(before), _data_facts(description)).items():
        raise UserError(
            f'the {called} of the run in {folder} were others when it began ({old} then, {new} '
            'now); restore them or choose another --workdir'
        )


def begin(folder: Path, now: dict[str, Any]) -> list[str]:
    """Write a new run's manifest; of one that goes on, keep and say what may change the numbers."""
    before = stored(folder)
    if before is None:
        write_json(folder / NAME, now, indent=2)
        return []
    changed = differences(before, now)
    if not changed:
        return []
    told = [f'{name}: {old} → {new}' for name, (old, new) in changed.items()]
    before.setdefault('resumed', []).append(told)
    write_json(folder / NAME, before, indent=2)
    return [
        f'this run began under other conditions ({"; ".join(told)}): from here on its numbers may '
        'differ in the last digits from those of an undisturbed run'
    ]


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The differences between two manifests that can change the numbers: by name, old and new."""
    return _changes(_decisive(before), _decisive(now))


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ, by name."""
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


def _data_facts(data: dict[str, Any]) -> dict[str, Any]:
    facts = data | data['preprocessing']
    return {called: facts.get(name) for name, called in DATA.items()}


def _decisive(manifest: dict[str, Any]) -> dict[str, Any]:
    code, data = manifest['code'], manifest['data']
    return {
        **_data_facts(data),
        **{name: manifest['machine'].get(name) for name in DECISIVE},
        'convolutions': manifest['machine'].get('convolutions', 'XLA'),
        **manifest['packages'],
        **{f'code ({name})': value for name, value in code.items()},
        **{f'{split} data': data[split]['fingerprint'][:12] for split in ('train', 'eval')},
    }


@contextlib.contextmanager
def lock_workdir(
    folder: Path, wait: bool = False, say: Callable[[str], object] = print
) -> Iterator[None]:
    """Hold an exclusive lock on a work directory, created if missing; UserError if another does."""
    make_writable(folder)
    path = folder / 'lock'
    if wait and (other := lock_holder(path)):
        say(f'waiting for process {other[1]} on {other[0]}, which trains in {folder}')
    # The folder, too: the lock's file may be removed.
    with lock(folder, wait) as first, lock(path, wait) as second:
        if not first or not second:
            host, process = lock_holder(path) or ('another machine', '?')
            raise UserError(
                f'process {process} on {host} is training in {folder}; give --wait to resume after '
                'it, or choose another --workdir'
            )
        yield


def claim_workdir(folder: Path, config: cfg.Config) -> None:
    """Make the work directory that of a run, or check that it belongs to one of the same config.

    What ended before its first step, by a usage error for one, does not count as a run. A larger
    number of epochs prolongs the run, where no step depends on it.

    Errors:
        UserError: It holds an ablation, or a run of another config (the difference is listed).
    """
    if (folder / 'ablation.json').exists():
        raise UserError(f'{folder} holds an ablation; choose another --workdir')
    for inside in ('profile', 'damaged', 'checkpoints', 'checkpoints/*'):
        if link := next(filter(Path.is_symlink, folder.glob(inside)), None):
            raise UserError(f'{link} is a link, and training writes to no other place; remove it')
    before, digest = stored(folder), cfg.content_hash(config)
    if before and before['config_hash'] != digest:
        try:
            old = cfg.from_json(read_text(folder / 'config.json'))
        except (FileNotFoundError, Corrupt) as error:
            raise UserError(
                f'the work directory {folder} belongs to a run of another config, and its '
                f'config.json is missing or damaged ({reason_of(error)}); choose another --workdir'
            ) from error
        longer = config.train.epochs > old.train.epochs
        steps = {cfg.content_hash(cfg.without_length(each)) for each in (old, config)}
        if not longer or len(steps) > 1:
            raise UserError(_refusal(folder, cfg.differences(old, config), longer))
        write_json(folder / NAME, before | {'config_hash': digest}, indent=2)
    write_text(folder / 'config.json', cfg.to_json(config))


def _refusal(folder: Path, changed: dict[str, tuple[Any, Any]], longer: bool) -> str:
    listed = '; '.join(f'config.{name}: {old!r} → {new!r}' for name, (old, new) in changed.items())
    what, more = f'another config ({listed})', ''
    if list(changed) == ['own']:
        what = 'other code of its own parts'
    if longer and list(changed) == ['train.epochs']:
        more = (
            '; a run can be prolonged where no step depends on its length: without a cosine '
            'schedule, model.drop_ramp, a second phase and own parts'
        )
    return (
        f'the work directory {folder} belongs to a run of {what}; restore it, or choose another '
        f'--workdir{more}'
    )
