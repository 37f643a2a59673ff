"""Who takes part, in which environment, and how all are compared: the gate first, then turns.

In every round each contender has its turn, in a process of its own.
"""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks import problem, results
from benchmarks.worker import Worker, plain_environment
from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder

T = TypeVar('T')
TOLERANCE = 5e-4  # of the mean loss; float32 sums in another order, amplified by the steps
WARM_STEPS = 2  # not timed: another process has had the caches
TURN_SECONDS = 1.0


# What the user's cache holds that was computed here; all else was downloaded, or is the library.
COMPUTED = 'features', 'images', 'index', 'compiled*'


def cold_cache(folder: Path) -> Path:
    """Make a folder a copy of the user's cache without anything that was computed."""
    if not folder.exists():
        shutil.copytree(cache_folder(), folder, ignore=shutil.ignore_patterns(*COMPUTED))
    for part in itertools.chain(*map(folder.glob, COMPUTED)):
        shutil.rmtree(part)
    return folder


class Disagreement(Exception):
    """Two contenders do not do the same work."""


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Seconds, peak resident MiB and the output of a whole process, with variables of its own.

    Errors:
        RuntimeError: It failed; the message ends with what it printed.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile('w+') as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=plain_environment() | environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # else it is waited for again
        seconds = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise RuntimeError(f'{" ".join(command)} ended with {process.returncode}:\n{text[-2000:]}')
    return seconds, usage.ru_maxrss / 1024, text


def pooled(
    commands: Iterable[list[str]],
    environment: dict[str, str],
    *,
    at_once: int,
    pinned: bool = False,
) -> tuple[float, list[str]]:
    """Seconds until all processes have ended, and what each printed, in order.

    Args:
        commands, environment: As in `timed`; after one that fails no other begins.
        at_once: How many run at any time while there are as many left.
        pinned: Whether each runs on a core of its own; libraries then start one thread.
    """
    # macOS cannot pin.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    turn = itertools.cycle(cores)

    def pin() -> None:
        # Of this thread alone; the processes that it starts inherit it.
        os.sched_setaffinity(0, {next(turn)})

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once, initializer=pin if pinned and cores else None) as pool:
        texts = [text for *_, text in pool.map(lambda c: timed(c, environment), commands)]
    return time.perf_counter() - began, texts


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str], T]) -> dict[str, list[T]]:
    """What `run` returns of each name in each round; each begins as often as any other."""
    names = list(names)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(run(name))
            print(f'round {number + 1} of {rounds}: {name}', file=sys.stderr)
    return found


def check(losses: dict[str, list[float]], tolerance: float = TOLERANCE) -> float:
    """The largest difference of any contender's losses from the first one's.

    max |ℓ − ℓ₁| / mean |ℓ₁| over contenders and steps

    Errors:
        Disagreement: A loss differs by more than the tolerance, or is not finite; nothing may be
            timed then.
    """
    (reference, expected), *others = losses.items()
    worst = 0.0
    for name, found in others:
        differences = np.abs(np.subtract(found, expected)) / np.mean(np.abs(expected))
        if not np.all(differences <= tolerance):
            step = int(np.argmax(~(differences <= tolerance)))
            raise Disagreement(
                f'at step {step + 1} the loss of {name} is {found[step]:.6f}, that of {reference} '
                f'{expected[step]:.6f}: they do not train the same network'
            )
        worst = max(worst, float(differences.max()))
    return worst


@dataclass(frozen=True)
class Entrant:
    """How a contender's process is started.

    Attributes:
        module: As `worker.Worker` takes it.
        home: Its environment in the peers' folder; '' is this project's.
        settings: Whether it runs with this project's runtime settings.
        environment: Variables that its user sets.
        compiler: Whether it compiles C++ when it runs.
    """

    module: str
    home: str = ''
    settings: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    compiler: bool = False

    def worker(
        self, made: Path, peers: Path, cache: Path, environment: dict[str, str] | None = None
    ) -> Worker:
        """The process, after its first step.

        Args:
            made: A file of `benchmarks.problem`.
            peers: The folder of the peers' environments.
            cache: Where it keeps what it compiles, if it does.
            environment: More variables.
        """
        own = {'CNN_JAX_CACHE': str(cache), 'TORCHINDUCTOR_CACHE_DIR': str(cache)}
        return Worker(
            self.module,
            made,
            settings=self.settings,
            python=self.interpreter(peers),
            environment=own | self.environment | (environment or {}),
        )

    def interpreter(self, peers: Path) -> str:
        """The Python of its environment; a `UserError` if that is not there."""
        if not self.home:
            return sys.executable
        python = peers / self.home / 'bin' / 'python'
        if not python.exists():
            raise UserError(
                f'there is no {python}; run `bash benchmarks/setup_peers.sh {peers}`, say '
                '--peers=FOLDER if the peers are elsewhere, or choose other contenders'
            )
        return str(python.absolute())


def keras_on(backend: str, module: str) -> Entrant:
    """Keras on `jax`, `tensorflow` or `torch`."""
    home = 'pytorch' if backend == 'torch' else f'keras_{backend}'
    return Entrant(
        module, home, environment={'KERAS_BACKEND': backend, 'TF_CPP_MIN_LOG_LEVEL': '2'}
    )


def matching(names: Iterable[str], words: list[str]) -> list[str]:
    """The names that contain one of the words, each of which must fit; all, if there are none."""
    names = list(names)
    for word in words:
        if not any(word in name for name in names):
            raise UserError(f'no contender is called {word!r}; there are {"; ".join(names)}')
    return [name for name in names if not words or any(word in name for word in words)]


def chosen(
    entrants: dict[str, Entrant], words: list[str], peers: Path
) -> tuple[dict[str, Entrant], list[str]]:
    """Those that match, all of them there, and the names of those that lack a C++ compiler."""
    compiles = shutil.which(os.environ.get('CXX', 'g++')) is not None
    names = matching(entrants, words)
    out = [name for name in names if entrants[name].compiler and not compiles]
    found = {name: entrants[name] for name in names if name not in out}
    for entrant in found.values():
        entrant.interpreter(peers)
    return found, out


def answers_of(
    entrants: dict[str, Entrant], made: problem.Problem, peers: Path, count: int
) -> tuple[dict[str, list[float]], list[str]]:
    """The first losses of each, one after the other, and their versions."""
    losses, versions = {}, []
    with written(made) as path:
        for name, entrant in entrants.items():
            with closing(entrant.worker(path, peers, path.with_name('cache'))) as worker:
                losses[name] = worker.ask(losses=count)['losses']
                versions.append(worker.version)
    return losses, list(dict.fromkeys(versions))


@contextmanager
def written(made: problem.Problem) -> Iterator[Path]:
    """The problem's file, in a folder that takes what is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'problem.npz'
        problem.write(made, path)
        yield path


@dataclass(frozen=True)
class Measured:
    """What a run found, by the contenders' names.

    Attributes:
        checked: What the gate returned.
        seconds: Of a step, one figure a round.
        first_step: Seconds from a process's start to the end of its first step.
        peak: Resident memory, MB.
        versions: Of what the contenders are made of.
    """

    checked: Any
    seconds: dict[str, list[float]]
    first_step: dict[str, float]
    peak: dict[str, float]
    versions: list[str]

    def costs(self, name: str) -> list[str]:
        """First step and peak, as cells of a table."""
        return [f'{self.first_step[name]:.1f}', f'{self.peak[name]:,.0f}']


def measure(
    entrants: dict[str, Entrant],
    made: problem.Problem,
    peers: Path,
    *,
    rounds: int,
    numbers: int,
    check: Callable[[dict[str, list[float]]], Any],
    least: int = 3,
    warm: int = WARM_STEPS,
) -> Measured:
    """Start all contenders, compare their results, and time them in turns.

    Args:
        entrants: By name; the first is the one that the others' results are compared with.
        made: The problem.
        peers: The folder of the peers' environments.
        rounds: How often each has its turn.
        numbers: How many losses or outputs are compared.
        check: Of these, by name; those who give none are left out. It raises if they differ.
        least: Steps of a turn; more if they take less than `TURN_SECONDS`.
        warm: Steps before each turn.
    """
    workers: dict[str, Worker] = {}
    with written(made) as path:
        try:
            for name, entrant in entrants.items():
                # A cache of its own, so that every first step is a cold one.
                cache = path.with_name(f'cache{len(workers)}')
                workers[name] = entrant.worker(path, peers, cache)
                print(f'{name}: first step after {workers[name].first_step:.1f} s', file=sys.stderr)
            answers = {n: worker.ask(losses=numbers)['losses'] for n, worker in workers.items()}
            checked = check({name: answer for name, answer in answers.items() if answer})
            counts = {}
            for name, worker in workers.items():
                once = worker.ask(run=max(1, warm))['seconds'] / max(1, warm)
                counts[name] = max(least, round(TURN_SECONDS / once))

            def turn(name: str) -> float:
                if warm:
                    workers[name].ask(run=warm)
                return workers[name].ask(run=counts[name])['seconds'] / counts[name]

            seconds = take_turns(workers, rounds, turn)
        finally:
            peak = {name: worker.close() / 1e6 for name, worker in workers.items()}
    return Measured(
        checked,
        seconds,
        {name: worker.first_step for name, worker in workers.items()},
        peak,
        list(dict.fromkeys(worker.version for worker in workers.values())),
    )


def best(seconds: dict[str, list[float]], peers: Iterable[str]) -> str:
    """The name of the smallest median, among the peers if one takes part."""
    among = [name for name in seconds if name in set(peers)] or [*seconds]
    return min(among, key=lambda name: np.median(seconds[name]))


def ratio(seconds: list[float], reference: list[float]) -> str:
    """Of two contenders, round by round: a cell of a table."""
    return results.quartiles([a / b for a, b in zip(seconds, reference, strict=True)], digits=2)
