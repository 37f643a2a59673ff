"""Whole processes, one by one or several at a time, and the turns that contenders take."""

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.worker import plain_environment


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Seconds, peak resident MB and the output of a whole process.

    Args:
        command: What is run.
        environment: Variables set besides the shell's.

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
        commands: What is run.
        environment: Variables set besides the shell's.
        at_once: How many run at any time while there are as many left.
        pinned: Whether each runs on a core of its own; libraries then start one thread.

    Errors:
        RuntimeError: One failed; those that had not begun are not run.
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


def rotated(names: Iterable[str], number: int) -> list[str]:
    """The order of a round: each begins as often as any other."""
    names = list(names)
    return names[number % len(names) :] + names[: number % len(names)]
