"""Simulate the rules of `cnn_jax.ablation.statistics`: error, coverage and power, as tables.

  python -m tests.ablation.simulation                              # ten minutes on one core
  python -m tests.ablation.simulation --trials=20000 --write=docs/statistics.md

Every draw has a fixed seed. With t trials a share of 5% has a standard error of 22%/√t: 0.35
points with 4,000.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy import stats

from cnn_jax.ablation import statistics as s

HEAD = """# Simulations of the statistics

Written by `python -m tests.ablation.simulation --trials={trials} --write=docs/statistics.md`:
{trials:,} families per cell, a fifth of that over test images and for power. Differences have
standard deviation 1 unless said otherwise; looks come after 5, 10, 20 and 30 replicates; an arm
stops at the look that decides it. With t families a share of 5% has a standard error of 22/√t
points. `cube`, `obrien_fleming` and `pocock` are error-spending functions, of which ablations use
the first. Variances are shared by raising them towards those of other arms and never lowering them
(raised alone); Smyth (2004) does both.

An arm whose failures are rare can show none in a whole study (the last two rows). No rule on the
differences can know of them: with no failure in n replicates, up to 3/n of all may fail (95%).
If you expect this, take the first look later: `--seeds=20`, then `--seeds=30`.
"""
SIZES = (4, 10)
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def failing(rate: float) -> Draw:
    """An arm that fails in some replicates at a cost of 10, and makes up for it in the others."""
    return lambda r, shape: r.normal(size=shape) - 10 * ((r.random(shape) < rate) - rate)


def unequal(r: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Arms whose variances are spread as 4/χ²₄: the largest of ten is 20 times the smallest."""
    spread = np.sqrt(4 / r.chisquare(4, (*shape[:-1], 1)))
    return r.normal(size=shape) * spread


def one_wild(r: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Arms of which the first varies five times as much."""
    return r.normal(size=shape) * np.where(np.arange(shape[-2]) == 0, 5, 1)[:, None]


def one_control(r: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Arms minus the same control: differences that correlate by a half."""
    return (r.normal(size=shape) - r.normal(size=(*shape[:-2], 1, shape[-1]))) / np.sqrt(2)


def both_fail(r: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An arm and its control that each fail in 10% of replicates at a cost of 10."""
    fails = (r.random((2, *shape)) < 0.1) * 10
    return r.normal(size=shape) - fails[0] + fails[1]


DRAWS: dict[str, Draw] = {  # true mean 0
    'normal': lambda r, shape: r.normal(size=shape),
    'normal, one control for all arms': one_control,
    'normal, variances spread as 4/χ²₄': unequal,
    'normal, one arm 5 times as variable': one_wild,
    't, 3 degrees of freedom': lambda r, shape: r.standard_t(3, shape) / np.sqrt(3),
    'skewed as accuracies: beta(2, 20)': lambda r, shape: (2 / 22 - r.beta(2, 20, shape)) / 0.06,
    'exponential': lambda r, shape: r.exponential(size=shape) - 1,
    'arm and control fail in 10%, −10': both_fail,
    'arm fails in 30%, −10': failing(0.3),
    'arm fails in 10%, −10': failing(0.1),
}

SPREADS = ('normal', 'normal, variances spread as 4/χ²₄', 'normal, one arm 5 times as variable')
# A cost that shows in no replicate of some studies: no rule can know of it.
UNSEEN = ('arm fails in 30%, −10', 'arm fails in 10%, −10')


def stopped(values: np.ndarray, design: s.Design, **rules) -> tuple[np.ndarray, s.Decisions]:
    """Run a study look by look: a decided arm gets no more replicates (NaN)."""
    values = values.copy()
    for n in design.looks:
        found = s.decide(values[..., :n], design, **rules)
        done = (found.decided > 0)[..., None] & (np.arange(values.shape[-1]) >= n)
        values[done & ~np.isnan(values)] = np.nan
    return values, found


def misses(draw: str, design: s.Design, trials: int, effect: float = 0.0) -> float:
    """The share of families, in percent, of which an interval misses its true difference.

    With an effect, every other arm has it, and stops early.
    """
    m, last = design.comparisons, design.looks[-1]
    values = DRAWS[draw](np.random.default_rng(m), (trials, m, last))
    truth = np.where(np.arange(m) % 2, effect, 0.0)
    _, found = stopped(values + truth[:, None], design)
    return 100 * np.mean(((found.low > truth) | (found.high < truth)).any(-1))


def error_table(trials: int, spending: str) -> Iterable[str]:
    """Families of which any interval at any look misses its true difference, by rule."""
    yield (
        f'| {spending} | '
        + ' | '.join(
            f'{m} arms{", shared variances" * shared}' for m in SIZES for shared in (False, True)
        )
        + ' | 10 arms, shared, five act by 1.5 |'
    )
    yield '|---|' + '---:|' * 5
    for draw in DRAWS:
        cells = [
            misses(draw, s.Design(m, spending=spending, moderated=shared), trials)
            for m in SIZES
            for shared in (False, True)
        ]
        cells.append(misses(draw, s.Design(10, spending=spending), trials, 1.5))
        yield f'| {draw} | ' + ' | '.join(f'{cell:.1f}' for cell in cells) + ' |'


def sharing_table(trials: int) -> Iterable[str]:
    """What sharing variances does to the error and to the power of a single look."""
    rules: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
        'each its own': lambda own, df: (own, df),
        'Smyth': smyth,
        'raised alone': s.moderate,
    }
    yield '| error / power, % | ' + ' | '.join(rules) + ' |'
    yield '|---|' + '---:|' * len(rules)
    for (n, effect), m, draw in itertools.product(((5, 2.0), (10, 1.2)), SIZES, SPREADS):
        values = DRAWS[draw](np.random.default_rng(m), (trials, m, n))
        own, mean = values.var(-1, ddof=1), values.mean(-1)
        shift = effect * np.sqrt(np.median(own, axis=-1, keepdims=True))
        cells = []
        for rule in rules.values():
            shared, df = rule(own, np.full(own.shape, n - 1.0))
            critical = stats.t.isf(s.SIGNIFICANCE / m / 2, df) * np.sqrt(shared / n)
            error = np.mean((np.abs(mean) > critical).any(-1))
            cells.append(f'{100 * error:.1f} / {100 * np.mean(mean + shift > critical):.0f}')
        yield f'| n = {n}, {m} arms, {draw} | ' + ' | '.join(cells) + ' |'


def smyth(own: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smyth's posterior variances, which may be lower than a comparison's own."""
    d0, s0 = (each[:, None] for each in s.prior(own, df))
    d0 = np.minimum(d0, df.sum(-1, keepdims=True) - df)
    return (d0 * s0 + df * own) / (d0 + df), d0 + df


def coverage_table(trials: int) -> Iterable[str]:
    """Coverage of one 95% interval of a study of fixed size: Student's, and that of `decide`."""
    sizes = (5, 10, 20, 30)
    yield '| one arm, one look | ' + ' | '.join(f'n = {n}' for n in sizes) + ' |'
    yield '|---|' + '---:|' * len(sizes)
    for draw in (name for name in DRAWS if not name.startswith('normal,')):
        cells = []
        for n in sizes:
            values = DRAWS[draw](np.random.default_rng(n), (trials, 1, n))
            student = np.moveaxis(s.t_interval(values), -1, 0)
            found = s.decide(values, s.Design(1, (n,)))
            cells.append(
                ' / '.join(
                    f'{100 * np.mean((low <= 0) & (high >= 0)):.1f}'
                    for low, high in (student, (found.low, found.high))
                )
            )
        yield f'| {draw} | ' + ' | '.join(cells) + ' |'


def tables_of_bits(
    r: np.random.Generator, trials: int, n: int, images: int, seeds: float, spread: float
) -> np.ndarray:
    """Differences of correctness, −1, 0 or 1, of two arms of equal accuracy.

    Each image, and each replicate of each arm, has its own logit.

    Args:
        r: Random numbers.
        trials, n, images: Tables, replicates, test images.
        seeds: Standard deviation of the replicates' logits.
        spread: Standard deviation over images of the arms' difference in logit.
    """
    level = r.normal(2.5, 2, (trials, 1, images))
    apart = spread * r.normal(size=(trials, 1, images))

    def right(side: float) -> np.ndarray:
        logits = level + side * apart / 2 + r.normal(0, seeds, (trials, n, 1))
        return (r.random((trials, n, images)) < 1 / (1 + np.exp(-logits))).astype(np.float32)

    return right(1) - right(-1)


def crossed_table(trials: int, images: int = 1000) -> Iterable[str]:
    """Coverage of one interval over replicates and images of the difference in accuracy."""
    cases = {'replicates vary most': (0.5, 0.1), 'both vary': (0.2, 1.0), 'images': (0.05, 2.0)}
    yield f'| {images:,} test images | looks | over replicates alone | over replicates and images |'
    yield '|---|---:|---:|---:|'
    for (name, (seeds, spread)), looks in itertools.product(
        cases.items(), ((5,), (10,), (30,), s.LOOKS)
    ):
        r, n, hits = np.random.default_rng(looks), looks[-1], []
        for _ in range(max(trials // 50, 1)):
            bits = tables_of_bits(r, 50, n, images, seeds, spread)[:, None]
            rows = bits.mean(-1, dtype=float)
            for per_image in (None, bits):
                found = s.decide(rows, s.Design(1, looks), per_image=per_image)
                hits.append(np.mean((found.low <= 0) & (found.high >= 0)))
        shares = 100 * np.reshape(hits, (-1, 2)).mean(0)
        yield f'| {name} | {", ".join(map(str, looks))} | {shares[0]:.1f} | {shares[1]:.1f} |'


def power_table(trials: int, effects: Iterable[float], margin: float = 0.0) -> Iterable[str]:
    """Arms decided by 30 replicates, in percent, and the mean number of replicates until then."""
    rules = [(name, m) for m in SIZES for name in s.SPENDING]
    sought = f'equivalent within ±{margin:g}, effect' if margin else 'better, effect'
    yield f'| {sought} | ' + ' | '.join(f'{m} arms, {name}' for name, m in rules) + ' |'
    yield '|---|' + '---:|' * len(rules)
    for effect in effects:
        cells = []
        for name, m in rules:
            values = np.random.default_rng(m).normal(effect, 1, (trials, m, s.LOOKS[-1]))
            values, found = stopped(values, s.Design(m, spending=name), margin=margin)
            share = np.mean(found.verdict == ('equivalent' if margin else 'better'))
            cells.append(f'{100 * share:.0f}% in {np.isfinite(values).sum(-1).mean():.1f}')
        yield f'| {effect:g} | ' + ' | '.join(cells) + ' |'


def report(trials: int) -> Iterable[str]:
    """All tables."""
    few = max(trials // 5, 100)
    default, *others = s.SPENDING
    yield HEAD.format(trials=trials)
    yield '## Families with an interval that misses its true difference, % (5 allowed)\n'
    yield from (*error_table(trials, default), '')
    yield '## Shared variances at one look: families in error (5 allowed) / power, %\n'
    yield from (*sharing_table(trials), '')
    yield '## Coverage of one interval, % (95 wanted): Student’s t / the farther of t and Hall\n'
    yield from (*coverage_table(trials), '')
    yield '## Coverage over test images, % (95 wanted)\n'
    yield from (*crossed_table(few), '')
    yield '## Power: share decided, and mean replicates\n'
    yield from (*power_table(few, (0.5, 0.75, 1, 1.5, 2, 3)), '')
    yield from (*power_table(few, (0, 0.25), margin=1.0), '')
    yield '## Families in error with other spending, % (5 allowed)\n'
    for spending in others:
        yield from (*error_table(trials, spending), '')


if __name__ == '__main__':
    parser = argparse.ArgumentParser('python -m tests.ablation.simulation', description=__doc__)
    parser.add_argument('--trials', type=int, default=2000)
    parser.add_argument('--write', type=Path)
    given = parser.parse_args()
    lines = []
    for line in report(given.trials):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        given.write.write_text('\n'.join(lines) + '\n')
