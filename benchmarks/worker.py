"""A contender in a process of its own, so that each has its own XLA flags and allocator.

A contender is a module with `start(problem) -> Contender`, or `module:function`. The process reads
one JSON request a line: `{"losses": n}` returns the losses of the first n steps without dropout,
`{"run": n}` the seconds that n more steps take, with dropout.

  python -m benchmarks.worker MODULE[:FUNCTION] PROBLEM.npz [--settings]
"""

import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Without them a process is as it comes, whatever the shell had set.
SETTINGS = ('XLA_FLAGS', 'LD_PRELOAD', 'NPROC', 'JAX_COMPILATION_CACHE_DIR')


@dataclass(frozen=True)
class Contender:
    """What a contender does."""

    # The numbers that must be the others': the losses of the first steps from the problem's
    # weights, without dropout; where nothing is trained, the first outputs.
    losses: Callable[[int], list[float]]
    run: Callable[[int], None]  # some more training steps with dropout; returns when they are done
    version: str  # of what it is made of


def forward(compute: Callable[[Any], Any], batches: list, version: str) -> Contender:
    """A contender that computes outputs, an array, of batches of its own type in turn."""
    endless = itertools.cycle(batches)

    def run(count: int) -> None:
        for batch in itertools.islice(endless, count):
            compute(batch)

    return Contender(lambda count: compute(batches[0]).ravel()[:count].tolist(), run, version)


class Worker:
    """The process, seen from the one that measures.

    Args:
        module: The contender's, `module` or `module:function`.
        problem: A file of `benchmarks.problem`.
        settings: Whether `cnn_jax.runtime.configure` is called first.
        python: The interpreter of the contender's environment.
        environment: Variables set besides the shell's.

    Attributes:
        first_step: Seconds from the process's start to the end of its first step.
        version: The contender's.
    """

    def __init__(
        self,
        module: str,
        problem: Path,
        *,
        settings: bool = False,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ):
        command = [python, '-m', 'benchmarks.worker', module, str(problem)]
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command + ['--settings'] * settings,
            cwd=ROOT,
            env=plain_environment() | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version: str = self.ask(run=1)['version']
        self.first_step = time.perf_counter() - began

    def ask(self, **request: int) -> dict[str, Any]:
        """Send a request and wait for its answer; a `RuntimeError` if the process died."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f'{self._process.args} died; its error is above')
        return json.loads(answer)

    def close(self) -> int:
        """End the process; returns its peak memory in bytes."""
        assert self._process.stdin
        self._process.stdin.close()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss * 1024


def plain_environment() -> dict[str, str]:
    """The shell's environment without the settings that are measured."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS}


def serve(contender: Contender, answers) -> None:
    """Answer the requests on standard input until it is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {'version': contender.version}
        if 'losses' in request:
            answer['losses'] = contender.losses(request['losses'])
        else:
            began = time.perf_counter()
            contender.run(request['run'])
            answer['seconds'] = time.perf_counter() - began
        print(json.dumps(answer), file=answers, flush=True)


def main(module: str, problem: str, *options: str) -> None:
    """Run the contender `module` or `module:function`."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    if '--settings' in options:
        from cnn_jax import runtime

        runtime.configure()
    from benchmarks.problem import read

    name, _, function = module.partition(':')
    start = getattr(importlib.import_module(name), function or 'start')
    serve(start(read(Path(problem))), answers)


if __name__ == '__main__':
    main(*sys.argv[1:])
