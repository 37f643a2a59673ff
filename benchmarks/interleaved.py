"""One run of all contenders: the gate first, then rounds in which each has its turn."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.entrants import Entrant
from benchmarks.process import rotated

WARM_STEPS = 2  # not timed: another process has had the caches
TURN_SECONDS = 1.0


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


def measure(
    entrants: dict[str, Entrant],
    problem: Path,
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
        problem: A file of `benchmarks.problem`; its folder takes what is compiled.
        peers: The folder of the peers' environments.
        rounds: How often each has its turn.
        numbers: How many losses or outputs are compared.
        check: Of these, by name; those who give none are left out. It raises if they differ.
        least: Steps of a turn; more if they take less than `TURN_SECONDS`.
        warm: Steps before each turn.
    """
    workers = {}
    try:
        for name, entrant in entrants.items():
            # A cache of its own, so that every first step is a cold one.
            cache = problem.with_name(f'cache{len(workers)}')
            workers[name] = entrant.worker(problem, peers, cache)
            print(f'{name}: first step after {workers[name].first_step:.1f} s', file=sys.stderr)
        answers = {name: worker.ask(losses=numbers)['losses'] for name, worker in workers.items()}
        checked = check({name: answer for name, answer in answers.items() if answer})
        counts = {}
        for name, worker in workers.items():
            once = worker.ask(run=max(1, warm))['seconds'] / max(1, warm)
            counts[name] = max(least, round(TURN_SECONDS / once))
        seconds = {name: [] for name in workers}
        for number in range(rounds):
            for name in rotated(workers, number):
                if warm:
                    workers[name].ask(run=warm)
                taken = workers[name].ask(run=counts[name])['seconds']
                seconds[name].append(taken / counts[name])
            print(f'round {number + 1} of {rounds}', file=sys.stderr)
    finally:
        peak = {name: worker.close() / 1e6 for name, worker in workers.items()}
    return Measured(
        checked,
        seconds,
        {name: worker.first_step for name, worker in workers.items()},
        peak,
        list(dict.fromkeys(worker.version for worker in workers.values())),
    )


def best(seconds: dict[str, list[float]], among: list[str]) -> str:
    """The name of the smallest median."""
    return min(among, key=lambda name: np.median(seconds[name]))


def ratios(seconds: list[float], reference: list[float]) -> list[float]:
    """Of two contenders, round by round."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]
