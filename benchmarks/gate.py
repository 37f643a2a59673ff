"""The gate before every timing: the contenders must compute the same losses."""

import numpy as np

TOLERANCE = 5e-4  # of the mean loss; float32 sums in another order, amplified by the steps


class Disagreement(Exception):
    """Two contenders do not do the same work."""


def check(losses: dict[str, list[float]], tolerance: float = TOLERANCE) -> float:
    """The largest difference of any contender's losses from the first one's.

    max |ℓ − ℓ₁| / mean |ℓ₁| over contenders and steps

    Args:
        losses: Of the first steps, for each contender.
        tolerance: The largest difference allowed.

    Errors:
        Disagreement: A loss differs more, or is not finite; nothing may be timed then.
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
