"""The runs that are due, and what is decided: trials, choices, replicates, looks.

Every process computes the same from the results on disk, so that none has to tell another.
"""

import itertools
from typing import Any

import numpy as np

from cnn_jax.ablation import statistics
from cnn_jax.ablation.plan import METRICS, Plan
from cnn_jax.ablation.results import AGAIN, FLOOR, Result, Run, Store, value_of, why_failed

OF_IMAGES = 'accuracy', 'loss'  # measures whose value is the mean over images


def due(store: Store) -> list[Run]:
    """All runs that are known to be needed, finished or not.

    They are the trials; for arms whose trials have finished the replicates up to the look that
    decides them, first seed first, so that early results compare all arms; the controls.
    """
    plan, trials = store.plan, [store.trials(arm) for arm in store.plan.configs]
    runs = [run for each in itertools.zip_longest(*trials, fillvalue=()) for t in each for run in t]
    needed = replicates(store)
    for number in range(max(needed.values())):
        for arm in plan.configs:
            runs += store.replicates(arm, number) if number < needed[arm] else []
    return runs + controls(store)


def controls(store: Store) -> list[Run]:
    """The baseline's first replicate once more, and the classifier of pixels."""
    plan, found = store.plan, []
    if choice := store.choice(plan.baseline, plan.judges[0]):
        again = plan.seeds[0], choice.trial, choice.point
        found.append(store.run(AGAIN, plan.baseline, *again))
    if plan.floor:
        found += [store.run(FLOOR, plan.baseline, seed) for seed in plan.seeds[: plan.looks[0]]]
    return found


def waiting(store: Store) -> int:
    """The least number of runs that will be due once those that are due have finished."""
    plan = store.plan
    waiting = [arm for arm in plan.configs if not store.choice(arm, plan.judges[0])]
    further = plan.finalists * (len(plan.tuning) - 1)
    screening = sum(all(len(runs) < 2 for runs in store.trials(arm)) for arm in waiting)
    count = len(waiting) * plan.looks[0] + screening * further
    return count + (plan.baseline in waiting)


def replicates(store: Store) -> dict[str, int]:
    """The replicates of each arm, by the looks that have been taken."""
    plan = store.plan
    needed = dict.fromkeys(plan.configs, plan.looks[0])
    for look, further in zip(plan.looks, plan.looks[1:]):
        present = [store.replicates(arm, k) for arm, n in needed.items() for k in range(n)]
        if not all(runs and all(map(store.result, runs)) for runs in present):
            break
        if look not in store.undecided:
            store.undecided[look] = undecided(store, look)
        for arm in store.undecided[look]:
            for each in (arm, plan.against[arm]):
                needed[each] = further
    return needed


def missing(store: Store) -> list[Run]:
    """The runs without a result that can be trained now."""
    return [run for run in due(store) if store.result(run) is None]


def values(store: Store, arm: str, measure: str) -> np.ndarray:
    """A measure of each replicate of an arm on the test images, [n]: NaN where it has not run.

    A failed one has that of a guess.
    """
    found = np.full(store.plan.looks[-1], np.nan)
    for number in range(len(found)):
        run = store.replicate(arm, number, measure)
        result = run and store.result(run)
        if result:
            value = value_of(result, 'test', measure)
            found[number] = statistics.guess(result['classes'])[measure] if value is None else value
    return found


def per_image(result: Result, measure: str) -> np.ndarray:
    """A measure in `OF_IMAGES` of each test image: whether it is classified correctly, its loss."""
    if why_failed(result):
        guess = statistics.guess(result['classes'])[measure]
        return np.full(result['examples'], guess, np.float32)
    count = result['metrics']['test']['count']
    if measure == 'accuracy':
        packed = np.frombuffer(bytes.fromhex(result['correct']), np.uint8)
        return np.unpackbits(packed, count=count).astype(np.float32)
    return np.frombuffer(bytes.fromhex(result['losses']), '<f2').astype(np.float32)


def design(plan: Plan, comparisons: int = 0) -> statistics.Design:
    """The rules by which the plan's family of comparisons, or another of this size, is decided."""
    size = comparisons or len(plan.against) * len(plan.primaries)
    return statistics.Design(size, plan.looks, overlap=1 / (plan.folds - 1) if plan.folds else 0.0)


def decisions(store: Store, measure: str, look: int = 0) -> statistics.Decisions | None:
    """Decide every arm against its control in a measure, in the order of the plan.

    Args:
        store: The results.
        measure: A primary measure.
        look: Take so many replicates for all there are; 0: all.
    """
    plan = store.plan
    arms = list(plan.against)
    if not arms or plan.looks[0] < 2:
        return None
    everyone = list(plan.configs)
    pairs = np.array([[everyone.index(arm), everyone.index(plan.against[arm])] for arm in arms])
    outcomes = np.array([values(store, arm, measure) for arm in everyone])
    if look:
        outcomes[:, look:] = np.nan
    images = images_of(store, everyone, measure, np.isfinite(outcomes).any(0))
    return statistics.decide(
        outcomes[pairs[:, 0]] - outcomes[pairs[:, 1]],
        design(plan),
        margin=plan.margins[measure],
        sign=METRICS[measure].sign,
        per_image=None if images is None else images[pairs[:, 0]] - images[pairs[:, 1]],
    )


def images_of(store: Store, arms: list[str], measure: str, known: Any) -> np.ndarray | None:
    """A measure of each arm's replicates on each test image, [a, n, e]; zeros where not `known`.

    None for measures that have no value on an image, and where each fold has images of its own.
    """
    if store.plan.folds or measure not in OF_IMAGES or not known.any():
        return None
    counts = {
        result['examples']
        for arm in arms
        for number in np.flatnonzero(known)
        if (run := store.replicate(arm, int(number), measure)) and (result := store.result(run))
    }
    (count,) = counts
    found = np.zeros((len(arms), len(known), count), np.float32)
    for a, n in itertools.product(range(len(arms)), np.flatnonzero(known)):
        run = store.replicate(arms[a], int(n), measure)
        result = run and store.result(run)
        if result:
            found[a, n] = per_image(result, measure)
    return found


def undecided(store: Store, look: int) -> list[str]:
    """The arms that a look after so many replicates has left undecided in a primary measure."""
    arms = list(store.plan.against)
    open_ones = set()
    for measure in store.plan.primaries:
        found = decisions(store, measure, look)
        if found is not None:
            waiting = (found.verdict == 'undecided') & (found.replicates == look)
            open_ones |= {arm for arm, waits in zip(arms, waiting) if waits}
    return [arm for arm in arms if arm in open_ones]
