"""Numbers and verdicts in plain words."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        name: Its key in the cells.
        scale: What its value is multiplied with.
        unit: Of a difference.
        suffix: Of a value.
        sign: 1 where more is better, −1 where less is.
        most: The largest possible value; the smallest is 0.
    """

    name: str
    scale: float
    unit: str
    suffix: str
    sign: int
    most: float

    @property
    def title(self) -> str:
        """The name as a reader sees it."""
        return self.name.replace('_', ' ')


METRICS = {
    'accuracy': Metric('accuracy', 100, 'points', '%', 1, 1.0),
    'top5': Metric('top5', 100, 'points', '%', 1, 1.0),
    'calibration_error': Metric('calibration_error', 100, 'points', '%', -1, 1.0),
    'loss': Metric('loss', 1, 'nats', '', -1, math.inf),
}


def number(value: float | None, decimals: int, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return '–'
    text = f'{value:+.{decimals}f}' if signed else f'{value:.{decimals}f}'
    if float(text) == 0:
        text = text.lstrip('+-')
    return text.replace('-', '−')


def decimals(half_width: float, scale: float = 1) -> int:
    """Decimals at which an uncertainty of this half-width shows its first digit, 1 to 4."""
    width = abs(half_width) * scale
    if not (math.isfinite(width) and width > 0):
        return 2
    return min(max(-math.floor(math.log10(width)), 1), 4)


def p_value(p: float | None) -> str:
    """`= 0.012`, `= 0.61`, `< 0.001`; empty where there is none."""
    if p is None:
        return ''
    if p < 0.001:
        return '< 0.001'
    rounded = p + 1e-9  # so that 0.0625 is rounded up
    return f'= {rounded:.3f}' if p < 0.1 else f'= {rounded:.2f}'


def interval(low: float, high: float, metric: Metric) -> str:
    """`0.3 to 1.3`, in the metric's unit."""
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(low * metric.scale, places)} to {number(high * metric.scale, places)}'


def estimate(found: dict[str, Any], metric: Metric, signed: bool = False) -> str:
    """`97.1 (96.8 to 97.4)`, in the metric's unit; without an interval the mean alone."""
    if found['mean'] is None:
        return '–'
    if found['interval'] is None:
        return number(found['mean'] * metric.scale, 2, signed)
    low, high = found['interval']
    places = decimals((high - low) / 2, metric.scale)
    return f'{number(found["mean"] * metric.scale, places, signed)} ({interval(low, high, metric)})'


def verdict(
    arm: str, baseline: str, compared: dict[str, Any] | None, metric: Metric, planned: int
) -> dict[str, str]:
    """What may be said of an arm against the baseline.

    Args:
        compared: The entry `against_baseline` of the summary; `None` without two pairs of seeds.
        planned: Seeds of the experiment.

    Returns:
        `kind` (better | worse | inconclusive | no claim) and `sentence`.
    """
    if compared is None:
        return {
            'kind': 'no claim',
            'sentence': f'{arm}: no claim can be made, since fewer than 2 seeds finished both '
            f'here and in {baseline}; one run says nothing about the next.',
        }
    low, high = compared['interval']
    places = decimals((high - low) / 2, metric.scale)
    n = compared['n']
    of = f' of {planned}' if n < planned else ''
    start = (
        f'{arm}: {number(compared["mean"] * metric.scale, places, signed=True)} {metric.unit}, '
        f'95% CI {interval(low, high, metric)}, '
        f'p {p_value(compared["p_corrected"])} corrected, n = {n}{of}'
    )
    if compared['significant']:
        better = compared['mean'] * metric.sign > 0
        kind = 'better' if better else 'worse'
        return {'kind': kind, 'sentence': f'{start}: {kind} than {baseline}.'}
    return {
        'kind': 'inconclusive',
        'sentence': f'{start}: inconclusive; {_limit(compared["detectable_corrected"], metric)}.',
    }


def _limit(detectable: float, metric: Metric) -> str:
    """What the seeds of an inconclusive comparison could have found."""
    if detectable == 0:
        return 'all seeds differ by the same amount, which tells nothing about the next seed'
    if detectable > metric.most:
        return 'these seeds are too few and too different to find any possible difference'
    size = number(detectable * metric.scale, decimals(detectable, metric.scale))
    return f'these seeds would have found a difference of {size} {metric.unit} with 80% power'
