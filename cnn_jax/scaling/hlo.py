"""What a compiled program says of itself: communication, padding, transfers, in XLA's HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'
SCATTER = 'all-reduce-scatter'  # how libtpu writes a reduce-scatter: a fusion that holds both
HOST = 'infeed', 'outfeed', 'send', 'recv'
# Their results lie where an operand's or a part's do, or nowhere.
NAMES = {
    'get-tuple-element',
    'tuple',
    'bitcast',
    'constant',
    'while',
    'conditional',
    'call',
    'optimization-barrier',
    'after-all',
    'partition-id',
    'replica-id',
}
HBM, ON_CHIP = 0, 1  # memory spaces; others are for scalars, semaphores and the host
BITS = re.compile(r'(\d+)')
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?')
TILE = re.compile(r'T\(([\d,]+)\)')
SPACE = re.compile(r'S\((\d+)\)')
ASSIGNED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = ')
OPCODE = re.compile(r'\s*([a-z][\w-]*)\(')
OPERAND = re.compile(r'%([\w.-]+)')
BODY = re.compile(r'body=%?([\w.-]+)')
TARGET = re.compile(r'custom_call_target="([^"]*)"')
LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
IOTA = re.compile(r'replica_groups=\[\d+,(\d+)\]')
MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')


@dataclass(frozen=True)
class Array:
    """The type of an array: element type, sizes, layout.

    Attributes:
        dtype: As HLO names it: f32, bf16, pred.
        sizes: Of its axes.
        order: Its axes from the fastest in memory to the slowest.
        tile: The block that it is padded to whole numbers of, () for none; of the axes that are
            fastest in memory, the fastest last.
        space: Memory: `HBM`, `ON_CHIP` or another.
        dynamic: Whether a size is a bound.
    """

    dtype: str
    sizes: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0
    dynamic: bool = False

    @property
    def item(self) -> float:
        """Bytes of an element."""
        digits = BITS.search(self.dtype)
        return int(digits[1]) / 8 if digits else 1 if self.dtype == 'pred' else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.ceil(math.prod(self.sizes) * self.item)

    @property
    def padded(self) -> int:
        """Bytes with what the tiles are filled up with."""
        physical = [self.sizes[axis] for axis in reversed(self.order)]
        physical = [1] * (len(self.tile) - len(physical)) + physical
        for k, side in enumerate(reversed(self.tile), start=1):
            physical[-k] = -(-physical[-k] // side) * side
        return math.ceil(math.prod(physical) * self.item)

    def __str__(self) -> str:
        return f'{self.dtype}[{",".join(map(str, self.sizes))}]'


@dataclass(frozen=True)
class Instruction:
    """One line: its name, the arrays of its result, its operation, what follows, and where it is.

    `place` is the computation, and `entry` says whether that is the program itself.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    rest: str
    place: str
    entry: bool


@dataclass(frozen=True)
class Collective:
    """Communication between chips.

    Attributes:
        kind: One of `KINDS`.
        nbytes: Of the whole array: what an all-reduce, all-to-all or permutation gives each chip,
            what is gathered, or what is reduced before it is scattered.
        group: How many chips take part.
        looped: Whether it stands in a loop and is done more than once.
    """

    kind: str
    nbytes: int
    group: int
    looped: bool = False


@dataclass(frozen=True)
class Padding:
    """Bytes of the arrays that a program reads and makes in one memory.

    Attributes:
        logical: Of their elements.
        tiled: As they lie in memory.
        worst: The types that waste most, with their wasted bytes.
    """

    logical: int
    tiled: int
    worst: tuple[tuple[str, int], ...]


def instructions(text: str) -> Iterator[Instruction]:
    """The lines of a program's HLO text, computation by computation."""
    place, entry = '', False
    for line in text.splitlines():
        if line.endswith('{') and not line.startswith((' ', 'HloModule')):
            entry = line.startswith('ENTRY')
            place = line.removeprefix('ENTRY ').lstrip('%').split(' ', 1)[0]
        elif assigned := ASSIGNED.match(line):
            end = _end_of_type(line, assigned.end())
            if opcode := OPCODE.match(line, end):
                arrays = tuple(map(_array, ARRAY.finditer(line, assigned.end(), end)))
                rest = line[opcode.end() :]
                yield Instruction(assigned[1], arrays, opcode[1], rest, place, entry)


def collectives(text: str, chips: int) -> list[Collective]:
    """Every communication of a program, asynchronous ones once.

    Args:
        text: Its HLO.
        chips: All of them; a communication that names no group is of all.
    """
    lines = list(instructions(text))
    bodies = {body for line in lines if line.opcode == 'while' for body in BODY.findall(line.rest)}
    found = []
    for line in lines:
        kind = line.opcode.removesuffix('-start')
        if kind not in KINDS:
            continue
        arrays = line.arrays
        scattered = line.place.startswith(SCATTER)
        if line.opcode == 'collective-permute-start':  # operand, result, two contexts
            arrays = arrays[1:2]
        elif line.opcode == 'all-gather-start':  # operands, results
            arrays = arrays[len(arrays) // 2 :]
        group = _group(line.rest, chips)
        nbytes = sum(a.nbytes for a in arrays) * (group if kind == 'reduce-scatter' else 1)
        kind = 'reduce-scatter' if scattered else kind
        found.append(Collective(kind, nbytes, group, line.place in bodies))
    return found


def padding(text: str, space: int = HBM) -> Padding:
    """What the tiles of arrays in a memory waste, over all that the program itself reads and makes.

    What its fusions keep to themselves never reaches memory and is not counted.
    """
    logical = tiled = 0
    waste: dict[str, int] = {}
    for line in instructions(text):
        if not line.entry or line.opcode in NAMES or line.opcode.endswith('-start'):
            continue
        for array in line.arrays:
            if array.space == space:
                logical += array.nbytes
                tiled += array.padded
                waste[str(array)] = waste.get(str(array), 0) + array.padded - array.nbytes
    worst = sorted(waste.items(), key=lambda item: -item[1])[:3]
    return Padding(logical, tiled, tuple((name, size) for name, size in worst if size))


def traffic(text: str) -> int:
    """Bytes, padding included, that a program reads from HBM and writes to it.

    Every operation reads all of its operands there and writes its results. What a fusion takes a
    part of counts whole, and the inside of loops not at all. XLA's own count of bytes has those
    of the memory on the chip in it, too, which is ten times as fast and more.
    """
    lines = {line.name: line for line in instructions(text) if line.entry}
    total = 0
    for line in lines.values():
        operands = [lines[name] for name in OPERAND.findall(_operands(line.rest)) if name in lines]
        if line.opcode in NAMES | {'parameter'} or line.opcode.endswith('-start'):
            continue
        made = _in_hbm(line)
        if line.opcode.endswith('-done') and operands:  # a copy, of whole arrays or of slices
            sources = OPERAND.findall(_operands(operands[0].rest))
            read = any(_in_hbm(lines[name]) for name in sources if name in lines)
            total += made + read * sum(array.padded for array in line.arrays)
        else:
            total += made + sum(map(_in_hbm, operands))
    return total


def host_transfers(text: str) -> list[str]:
    """The operations that move data between chip and host, or call the host, in a step."""
    found = []
    for line in instructions(text):
        target = TARGET.search(line.rest)
        called = target and ('callback' in target[1].lower() or target[1].startswith('MoveTo'))
        if line.opcode in HOST or called:
            found.append(target[1] if called and target else line.opcode)
    return found


def unwanted(text: str) -> list[str]:
    """What a TPU does slowly or not at all: float64 and complex128, sizes that are not fixed."""
    arrays = {array for line in instructions(text) for array in line.arrays}
    wide = {str(a) for a in arrays if a.dtype in ('f64', 'c128')}
    return sorted(wide | {f'{a} of dynamic size' for a in arrays if a.dynamic})


def _in_hbm(line: Instruction) -> int:
    return sum(array.padded for array in line.arrays if array.space == HBM)


def _operands(rest: str) -> str:
    return rest[: _end_of_type('(' + rest + ' ', 0) - 1]


def _array(match: re.Match) -> Array:
    dtype, sizes, order, layout = match.groups()
    numbers = tuple(int(size.removeprefix('<=')) for size in sizes.split(',') if size)
    axes = tuple(int(a) for a in (order or '').split(',') if a)
    if len(axes) != len(numbers):  # no layout is given: row-major
        axes = tuple(reversed(range(len(numbers))))
    tile, space = TILE.search(layout or ''), SPACE.search(layout or '')
    return Array(
        dtype,
        numbers,
        axes,
        tuple(map(int, tile[1].split(','))) if tile else (),
        int(space[1]) if space else 0,
        '<=' in sizes,
    )


def _end_of_type(line: str, start: int) -> int:
    """Where the type that begins at `start` ends; tuples and tiles have parentheses, too."""
    depth = 0
    for k in range(start, len(line)):
        if line[k] in '([{':
            depth += 1
        elif line[k] in ')]}':
            depth -= 1
        elif line[k] == ' ' and depth == 0:
            return k
    return len(line)


def _group(rest: str, chips: int) -> int:
    """The size of the groups of a communication, in any of XLA's three ways to write them."""
    if listed := LISTED.search(rest):
        return listed[1].count(',') + 1
    if iota := IOTA.search(rest):
        return int(iota[1])
    if mesh := MESH.search(rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return chips
