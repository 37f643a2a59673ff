"""Who takes part: the contenders' processes, each in the environment where its library lives."""

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.worker import Worker
from cnn_jax.errors import UserError


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
        self, problem: Path, peers: Path, cache: Path, environment: dict[str, str] | None = None
    ) -> Worker:
        """The process, after its first step.

        Args:
            problem: A file of `benchmarks.problem`.
            peers: The folder of the peers' environments.
            cache: Where it keeps what it compiles, if it does.
            environment: More variables.
        """
        own = {'CNN_JAX_CACHE': str(cache), 'TORCHINDUCTOR_CACHE_DIR': str(cache)}
        return Worker(
            self.module,
            problem,
            settings=self.settings,
            python=interpreter(peers, self.home),
            environment=own | self.environment | (environment or {}),
        )


def keras_on(backend: str, module: str) -> Entrant:
    """Keras on `jax`, `tensorflow` or `torch`."""
    home = 'pytorch' if backend == 'torch' else f'keras_{backend}'
    return Entrant(
        module, home, environment={'KERAS_BACKEND': backend, 'TF_CPP_MIN_LOG_LEVEL': '2'}
    )


def interpreter(peers: Path, home: str) -> str:
    """The Python of a peer's environment, or this one for ''.

    Errors:
        UserError: The environment is not there.
    """
    if not home:
        return sys.executable
    python = peers / home / 'bin' / 'python'
    if not python.exists():
        raise UserError(
            f'there is no {python}; run `bash benchmarks/setup_peers.sh {peers}`, say '
            '--peers=FOLDER if the peers are elsewhere, or choose other contenders'
        )
    return str(python.absolute())


def matching(names: Iterable[str], words: list[str]) -> list[str]:
    """The names that contain one of the words; all, if there are none.

    Errors:
        UserError: No name contains a word.
    """
    names = list(names)
    for word in words:
        if not any(word in name for name in names):
            raise UserError(f'no contender is called {word!r}; there are {"; ".join(names)}')
    return [name for name in names if not words or any(word in name for word in words)]


def chosen(
    entrants: dict[str, Entrant], words: list[str], peers: Path
) -> tuple[dict[str, Entrant], list[str]]:
    """Those whose names match, and the names of those that lack a C++ compiler here.

    Args:
        entrants: By name.
        words: Of the names; none for all.
        peers: The folder of the peers' environments.

    Errors:
        UserError: No name contains a word, or an environment is not there.
    """
    compiles = shutil.which(os.environ.get('CXX', 'g++')) is not None
    names = matching(entrants, words)
    out = [name for name in names if entrants[name].compiler and not compiles]
    found = {name: entrants[name] for name in names if name not in out}
    for entrant in found.values():
        interpreter(peers, entrant.home)
    return found, out
