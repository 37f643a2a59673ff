"""TPU chips: what one computes, holds and moves.

Sources: peak, HBM and links a chip: Google Cloud's pages "TPU v5e", "TPU v6e", "TPU v5p"
(https://docs.cloud.google.com/tpu/docs/v5e and so on). One-way bandwidth of a link, which sides of
a slice close to a ring, and the latency of a hop: Austin et al. 2025, "How to Scale Your Model",
part 2, "How to Think About TPUs" (https://jax-ml.github.io/scaling-book/tpus).
"""

from dataclasses import dataclass

from cnn_jax.errors import UserError

HOP = 1e-6  # seconds from one chip to the next


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        name: As topologies are named by it.
        kind: As JAX calls the device.
        peak: FLOP/s of matrix products in bfloat16. In JAX's default precision those of float32
            arrays are computed in bfloat16, too, and added up in float32.
        memory: Bytes of HBM.
        bandwidth: Bytes/s between HBM and chip.
        link: Bytes/s of one link between chips, one way.
        links: Links of a chip: two for each side of the torus.
        cube: Sides of a slice close to a ring if they are multiples of this.
    """

    name: str
    kind: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    links: int
    cube: int

    def closes(self, side: int) -> bool:
        """Whether the chips along a side of a slice form a ring instead of a line."""
        return side % self.cube == 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v5e', 'TPU v5 lite', 197e12, 16e9, 819e9, 45e9, 4, 16),
        Chip('v5p', 'TPU v5', 459e12, 95e9, 2.765e12, 90e9, 6, 4),
        Chip('v6e', 'TPU v6 lite', 918e12, 32e9, 1.638e12, 90e9, 4, 16),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind, so many along each side.

    Attributes:
        chip: Its kind.
        sides: Chips along each side, in the order of the name.
    """

    chip: Chip
    sides: tuple[int, ...]

    def __str__(self) -> str:
        return f'{self.chip.name}:{"x".join(map(str, self.sides))}'


def topology(name: str) -> Topology:
    """The slice of a name such as `v5e:2x4`.

    Errors:
        UserError: It is no such name, or the chip is not in the table.
    """
    kind, _, sides = name.strip().partition(':')
    if kind not in CHIPS:
        raise UserError(
            f'--topology={name}: the chip must be one of {", ".join(CHIPS)}, and its slice follows '
            'a colon, e.g. v5e:2x4'
        )
    numbers = sides.split('x')
    most = CHIPS[kind].links // 2
    valid = all(n.isascii() and n.isdigit() and int(n) for n in numbers)
    if not valid or not 2 <= len(numbers) <= most:
        example = f'{kind}:{"2x4" if most == 2 else "2x2x1"}'
        raise UserError(
            f'--topology={name}: after the colon go the numbers of chips along the '
            f'{most} sides, e.g. {example}'
        )
    return Topology(CHIPS[kind], tuple(map(int, numbers)))
