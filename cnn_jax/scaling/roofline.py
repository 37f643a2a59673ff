"""An estimate of a step's time, from what a chip computes and moves at best.

T_chip = max(FLOPs / peak, bytes / bandwidth): a chip does both at once (Williams et al. 2009,
"Roofline"). Communication is `communication`; in the best case all of it hides behind T_chip, in
the worst none does:

T = max(T_chip, T_ici)   or   T = T_chip + T_ici

Nothing here was measured. Real programs reach a part of the peaks; ratios are more to be trusted
than times.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnn_jax.scaling.chips import HOP, Chip, Topology
from cnn_jax.scaling.hlo import Collective


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step.

    Attributes:
        compute: FLOPs at the peak rate.
        memory: Bytes at HBM's bandwidth.
        ici: All communication, one after the other.
    """

    compute: float
    memory: float
    ici: float

    @property
    def chip(self) -> float:
        """T_chip, without communication."""
        return max(self.compute, self.memory)

    @property
    def overlapped(self) -> float:
        """All communication hidden as far as it can be."""
        return max(self.chip, self.ici)

    @property
    def serial(self) -> float:
        """No communication hidden."""
        return self.chip + self.ici

    @property
    def bound(self) -> str:
        """What takes longest: compute, HBM or ICI."""
        times = {'compute': self.compute, 'HBM': self.memory, 'ICI': self.ici}
        return max(times, key=lambda name: times[name])

    def efficiency(self, alone: float | None = None) -> tuple[float, float]:
        """T_1 / T, without and with overlap: of n chips, the share of n times one's images/s.

        Args:
            alone: T_1, seconds of a step of as many examples as a chip has here, compiled for one
                chip. Without it T_chip, which is longer (what is added up among chips is written
                to memory first), so that the efficiency is an upper bound.
        """
        alone = self.chip if alone is None else alone
        return alone / self.serial, alone / self.overlapped

    def hiding_batch(self, batch: int) -> int:
        """A batch per chip from which on T_ici ≤ T_chip, whatever HBM does.

        b* = b · T_ici / T_compute: arithmetic grows with b, communication does not, since gradients
        have the parameters' size. Where HBM takes longer than arithmetic, less may be enough.

        Args:
            batch: b, the batch per chip of this estimate.
        """
        return math.ceil(batch * self.ici / self.compute)


def estimate(
    flops: float, nbytes: float, collectives: Sequence[Collective], topology: Topology
) -> Estimate:
    """The times of one chip's program.

    Args:
        flops: Of a step, per chip.
        nbytes: Between HBM and chip, per chip.
        collectives: Of a step.
        topology: The slice.
    """
    chip = topology.chip
    ici = sum(communication(c, topology) for c in collectives)
    return Estimate(flops / chip.peak, nbytes / chip.bandwidth, ici)


def communication(collective: Collective, topology: Topology) -> float:
    """Seconds of one communication alone on the links.

    Along a side of a chips, each of which has S bytes that all want, in a ring:

    t(S, a) = S/a · (a − 1) / W + (a − 1) · hop

    with W = 2 · link where the side closes to a ring and link where it does not. An all-gather goes
    along one side after the other, the arrays growing; a reduce-scatter is the same backwards; an
    all-reduce is both; an all-to-all moves half of an all-gather's bytes; a permutation one array.
    Groups that are not the whole slice count as a line of their own.

    Args:
        collective: What is communicated.
        topology: The slice.
    """
    if collective.group == 1:
        return 0.0
    chip = topology.chip
    whole = collective.group == math.prod(topology.sides)
    sides = topology.sides if whole else (collective.group,)
    if collective.kind == 'collective-permute':
        return collective.nbytes / chip.link + HOP
    gather, left = 0.0, float(collective.nbytes)
    for side in sides:
        gather += _along(left, side, chip, whole)
        left /= side
    return gather * {'all-reduce': 2, 'all-to-all': 0.5}.get(collective.kind, 1)


def _along(nbytes: float, side: int, chip: Chip, whole: bool) -> float:
    width = chip.link * (2 if whole and chip.closes(side) else 1)
    return nbytes * (side - 1) / side / width + (side - 1) * HOP


def scaled(
    collectives: Sequence[Collective], before: Topology, after: Topology
) -> list[Collective]:
    """The communication of the same batch per chip on another slice: what was of all stays of all.

    Right for data parallelism, whose communication is all-reduces of gradients and statistics,
    which are as large on any slice.
    """
    old, new = math.prod(before.sides), math.prod(after.sides)
    return [dataclasses.replace(c, group=new) if c.group == old else c for c in collectives]
