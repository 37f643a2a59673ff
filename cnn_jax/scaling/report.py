"""What a compiled step costs, as JSON and as text."""

import dataclasses
import math
from typing import Any

from cnn_jax.scaling import hlo, roofline
from cnn_jax.scaling.chips import Chip, Topology

# Slices of a pod whose chips lie on a plane.
SLICES = (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)


def facts(
    text: str,
    flops: float,
    nbytes: float,
    memory: dict[str, int],
    topology: Topology,
    batch: int,
    alone: float | None = None,
) -> dict[str, Any]:
    """All that is known of one chip's program, as JSON; times are estimates.

    Args:
        text: Its HLO.
        flops, nbytes, memory: As `ahead.Program` has them.
        topology: What it was compiled for.
        batch: Examples a step and chip.
        alone: As `roofline.Estimate.efficiency` takes it.
    """
    chips = math.prod(topology.sides)
    collectives, moved = hlo.collectives(text, chips), hlo.traffic(text)
    total = sum(memory.values()) - 2 * memory['place of arguments']
    by_kind = {}
    for kind in hlo.KINDS:
        sizes = [c.nbytes for c in collectives if c.kind == kind and c.group > 1]
        by_kind[kind] = {'count': len(sizes), 'bytes': sum(sizes)}
    time = roofline.estimate(flops, moved, collectives, topology)
    found = {
        'topology': str(topology),
        'batch_per_chip': batch,
        'memory': memory | {'total': total, 'chip': topology.chip.memory},
        'fits': total <= topology.chip.memory,
        'flops': flops,
        'hbm_bytes': moved,
        'bytes_accessed': nbytes,
        'collectives': by_kind,
        'collectives_in_loops': sum(c.looped for c in collectives),
        'padding': {
            'hbm': dataclasses.asdict(hlo.padding(text)),
            'on_chip': dataclasses.asdict(hlo.padding(text, hlo.ON_CHIP)),
        },
        'host_transfers': hlo.host_transfers(text),
        'unwanted': hlo.unwanted(text),
        'estimate': times(time, batch, alone),
    }
    if chips > 1 and all(c.group == chips and c.kind == 'all-reduce' for c in collectives):
        found['estimate']['weak_scaling'] = weak_scaling(flops, moved, collectives, topology, alone)
    return found


def times(time: roofline.Estimate, batch: int, alone: float | None) -> dict[str, Any]:
    """An estimate as JSON, in seconds and shares."""
    serial, overlapped = time.efficiency(alone)
    return {
        'compute': time.compute,
        'hbm': time.memory,
        'ici': time.ici,
        'step_overlapped': time.overlapped,
        'step_serial': time.serial,
        'bound': time.bound,
        'one_chip': alone,
        'efficiency_serial': serial,
        'efficiency_overlapped': overlapped,
        'hiding_batch': time.hiding_batch(batch),
    }


def weak_scaling(
    flops: float,
    nbytes: float,
    collectives: list[hlo.Collective],
    topology: Topology,
    alone: float | None = None,
) -> list[dict[str, Any]]:
    """The estimate of the same batch per chip on each slice of a pod.

    Args:
        flops, nbytes: Per chip; bytes of HBM.
        collectives: Each of all chips of `topology`, or of one.
        topology: What was compiled for.
        alone: As in `facts`.
    """
    rows = []
    for sides in SLICES if topology.chip.links == 4 else ():
        other = Topology(topology.chip, sides)
        communication = roofline.scaled(collectives, topology, other)
        time = roofline.estimate(flops, nbytes, communication, other)
        serial, overlapped = time.efficiency(alone)
        rows.append(
            {
                'chips': math.prod(sides),
                'slice': str(other),
                'ici': time.ici,
                'step_overlapped': time.overlapped,
                'step_serial': time.serial,
                'efficiency_overlapped': overlapped,
                'efficiency_serial': serial,
            }
        )
    return rows


def lines(found: dict[str, Any], chip: Chip) -> list[str]:
    """`facts` for a person; times are called estimates."""
    memory, time = found['memory'], found['estimate']
    parts = ', '.join(
        f'{name} {size(memory[name])}' for name in ('arguments', 'results', 'temporaries', 'code')
    )
    moved = [
        f'{data["count"]} {kind} {size(data["bytes"])}'
        for kind, data in found['collectives'].items()
        if data['count']
    ]
    total = sum(data['bytes'] for data in found['collectives'].values())
    loops = found['collectives_in_loops']
    serial, overlapped = time['efficiency_serial'], time['efficiency_overlapped']
    host = found['host_transfers']
    rows = [
        (
            'memory a chip',
            f'{parts}; {size(memory["place of arguments"])} of the results in the place of '
            f'arguments: {size(memory["total"])} of {size(chip.memory)}, '
            + ('fits' if found['fits'] else 'DOES NOT FIT'),
        ),
        (
            'work a chip',
            f'{found["flops"] / 1e9:.4g} GFLOP, {size(found["hbm_bytes"])} to and from HBM '
            f'({size(found["bytes_accessed"])} with memory on the chip)',
        ),
        (
            'communication',
            (f'{", ".join(moved)}; {size(total)} in all' if moved else 'none')
            + f' ({loops} in loops, counted once)' * bool(loops),
        ),
        ('padding, HBM', padding(found['padding']['hbm'])),
        ('padding, chip', padding(found['padding']['on_chip'])),
        ('host transfers', f'{len(host)}' + f': {", ".join(host)}' * bool(host)),
        ('slow types', ', '.join(found['unwanted']) or 'none: no float64, no dynamic size'),
        (
            'estimate',
            f'step {span(time["step_overlapped"], time["step_serial"])}: compute '
            f'{ms(time["compute"])}, HBM {ms(time["hbm"])}, ICI {ms(time["ici"])}; bound by '
            f'{time["bound"]}',
        ),
    ]
    if time['one_chip'] or 'weak_scaling' in time:  # a divided state has no such program
        rows.append(
            (
                'estimate',
                f'efficiency {serial:.1%} (nothing overlaps) to {overlapped:.1%} against '
                + ('one chip' if time['one_chip'] else 'the same program without communication')
                + f'; communication can hide from {time["hiding_batch"]} examples a chip on',
            )
        )
    rows += [
        (
            'estimate',
            f'{row["chips"]:3} chips: step {span(row["step_overlapped"], row["step_serial"])}, '
            f'efficiency {row["efficiency_serial"]:.1%} to {row["efficiency_overlapped"]:.1%}',
        )
        for row in time.get('weak_scaling', ())
    ]
    return [f'  {name:14}  {value}' for name, value in rows]


def padding(found: dict[str, Any]) -> str:
    """`1 MB of arrays take 2 MB, 100% more`, and which waste most."""
    extra = found['tiled'] / max(found['logical'], 1) - 1
    worst = ', '.join(f'{name} {size(waste)}' for name, waste in found['worst'])
    return (
        f'{size(found["logical"])} of arrays take {size(found["tiled"])}, {extra:.0%} more'
        + f' (most: {worst})' * bool(worst)
    )


def size(nbytes: float) -> str:
    """`3.2 MB`, in powers of ten."""
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if nbytes >= scale:
            return f'{nbytes / scale:.3g} {unit}'
    return f'{nbytes:.0f} B'


def ms(seconds: float) -> str:
    """`1.23 ms`."""
    return f'{seconds * 1e3:.3g} ms'


def span(low: float, high: float) -> str:
    """`1.2 to 1.4 ms`, or one of them where they are the same."""
    return ms(high) if ms(low) == ms(high) else f'{low * 1e3:.3g} to {ms(high)}'
