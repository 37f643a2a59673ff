"""Tiny runs in processes that are killed: while they touch a file, or at any moment.

The processes are forked from one that has imported everything and used nothing, so that a start
takes half a second.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_jax import config as cfg
from experiments import small

PRELOADED = (
    'cnn_jax.data.batches',
    'cnn_jax.train.fit',
    'orbax.checkpoint',
    'tensorboardX',
)
processes: Any = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(list(PRELOADED))

# What changes files. Each event comes before its operation; `open` does for reading, too.
LONGEST = 0.2  # seconds after an operation: a step and a save take less
OPERATIONS = ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.chmod')


@dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Attributes:
        operation: Number of the operation on its run's or its cache's files; 0: never.
        seconds: Time after that operation; 0: before it.
    """

    operation: int = 0
    seconds: float = 0.0


def images(folder: Path) -> Path:
    """A folder of PNG files, 20 for training and 8 for testing of each of three digits."""
    from PIL import Image

    from cnn_jax.data.sources import digits

    source, taken = digits(), collections.Counter()
    for pixels, label in source:
        taken[label] += 1
        if label < 3 and taken[label] <= 28:
            part = 'train' if taken[label] <= 20 else 'test'
            place = folder / part / source.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(place / f'{taken[label]}.png')
    return folder


def tiny(source: Path, **changes: Any) -> cfg.Config:
    """Two epochs in two phases: averaged weights, dropout, batch norm, augmentation."""
    base = {
        'data.source': f'folder:{source}',
        'data.batch': 8,
        'model.widths': (4,),
        'model.hidden': (8,),
        'augment.crop': 1,
        'train.epochs': 1.0,
        'train.ema': 0.9,
        'train.frozen': ('block1_conv1/*',),
        'train.eval_every': 0.25,
        'train.checkpoint_every': 0.14,
        'unfreeze.epochs': 1.0,
    }
    return cfg.validate(cfg.replace(small.get_config(), base | changes))


def start(config: cfg.Config, folder: Path, kill: Kill = Kill()):
    """Start or continue a run in a process of its own; what it prints goes to `FOLDER.log`."""
    process = processes.Process(target=_train, args=(cfg.to_json(config), folder, kill))
    process.start()
    return process


def train(config: cfg.Config, folder: Path, kill: Kill = Kill()) -> int:
    """Start or continue a run and wait for its end; its exit code, −9 for one that was killed."""
    process = start(config, folder, kill)
    process.join()
    return process.exitcode


def survive(config: cfg.Config, folder: Path, draw: random.Random, kills: int, operations: int):
    """Kill a run again and again, let it end, and say how often it was killed.

    Half of the kills come before a file operation, and half in what follows one: in a step, or
    while TensorStore writes.
    """
    done = 0
    while done < kills:
        seconds = draw.choice([0.0, draw.uniform(0.0, LONGEST)])
        code = train(config, folder, Kill(draw.randint(1, operations), seconds))
        if code == 0:
            break
        assert code == -signal.SIGKILL, log(folder)
        done += 1
    else:
        assert train(config, folder) == 0, log(folder)
    return done


@dataclass(frozen=True)
class Ended:
    """What is left of a run that came to its end, and what it took.

    Attributes:
        state: SHA-256 of its last state.
        files: The bytes of what it recorded, by name.
        operations: On files in its folder.
    """

    state: str
    files: dict[str, bytes]
    operations: int

    def result(self) -> tuple:
        """What must not depend on any disturbance."""
        return self.state, self.files


def whole(config: cfg.Config, folder: Path) -> Ended:
    """The end of a run that nobody disturbs, begun or gone on with here."""
    assert train(config, folder) == 0, log(folder)
    return ended(folder)


def ended(folder: Path) -> Ended:
    """The end of a run that has come to it."""
    facts = json.loads(folder.with_suffix('.ended').read_text())
    files = {name: (folder / name).read_bytes() for name in ('metrics.jsonl', 'steps.f32')}
    return Ended(facts['state'], files, facts['operations'])


def log(folder: Path) -> str:
    """What the runs in a folder have printed so far."""
    return folder.with_suffix('.log').read_text()


def _train(config: str, folder: Path, kill: Kill) -> None:
    with folder.with_suffix('.log').open('a') as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ['CNN_JAX_CACHE'] = str(folder / 'cache')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    operations = _count_operations(folder, kill)
    from cnn_jax.train.checkpoint import digest
    from cnn_jax.train.fit import fit
    from cnn_jax.train.run import load_run

    run = fit(cfg.from_json(config), folder)
    count = operations[0]
    state = digest((run.state, load_run(folder).state))
    facts = json.dumps({'state': state, 'operations': count})
    folder.with_suffix('.ended').write_text(facts)
    sys.stdout.flush()
    os._exit(0)


def _count_operations(folder: Path, kill: Kill) -> list[int]:
    """Count this process's operations on files below a folder, and die at one of them."""
    count, below = [0], str(folder) + os.sep

    def notice(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not arguments:
            return
        with contextlib.suppress(TypeError):  # a file descriptor has no path
            if os.fsdecode(arguments[0]).startswith(below):
                count[0] += 1
                if count[0] == kill.operation and kill.seconds:
                    threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
                elif count[0] == kill.operation:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(notice)
    return count
