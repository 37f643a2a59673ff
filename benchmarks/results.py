"""What was measured, as Markdown: tables, the machine, and the file that keeps them."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HEAD = """# Results

Written by the tools in this folder; each section is replaced whole when its command is run again.
Ratios are taken within one interleaved run on the same cores; training steps, features, fine-tuning
and the ablation are preceded by a check that all contenders compute the same. What loses is
printed, too.
"""

OF_BEST = 'of the best peer'  # the column of ratios


def of_best(reference: str) -> str:
    """Which peer that is, in a sentence."""
    return f'The best peer is {reference}; ratios are taken within a round.'


def left_out(names: Sequence[str]) -> str:
    """A line about contenders that compile where there is no compiler, or nothing."""
    return f'Left out for want of a C++ compiler: {", ".join(names)}.\n' if names else ''


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def insert(page: Path, name: str, text: str) -> None:
    """Put a text between a page's `<!-- name -->` and `<!-- /name -->`."""
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    before, _, rest = page.read_text().partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f'{page} has no {start} … {end}')
    page.write_text(f'{before}{start}\n{text}\n{end}{after}')


def quartiles(values: Sequence[float], digits: int = 1) -> str:
    """`median [first quartile–third quartile]`."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f'{middle:.{digits}f} [{low:.{digits}f}–{high:.{digits}f}]'


def conditions(*packages: str) -> str:
    """When, with which versions and on which machine, in one line."""
    now = datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)
    python = f'Python {platform.python_version()}'
    cores = f'{cores} core{"s" * (cores != 1)}'
    return f'{now} · {cores}, {processor()} · {python}, {versions}'


def processor() -> str:
    """The processor's name and family; hypervisors shorten the name."""
    info = Path('/proc/cpuinfo')
    facts = re.findall(
        r'(.+?)\s*: (.+)', info.read_text().split('\n\n')[0] if info.exists() else ''
    )
    found = dict(facts)
    if 'model name' not in found:
        return platform.processor() or platform.machine()
    return f'{found["model name"]} (family {found["cpu family"]}, model {found["model"]})'


def write_section(path: Path, title: str, body: str) -> None:
    """Put a section into a results file, in place of the one with that title, or last."""
    text = path.read_text() if path.exists() else HEAD
    head, *sections = re.split(r'(?m)^(?=## )', text)
    new = f'## {title}\n\n{body.strip()}\n'
    titles = [section.splitlines()[0] for section in sections]
    if f'## {title}' in titles:
        sections[titles.index(f'## {title}')] = new
    else:
        sections.append(new)
    path.write_text('\n'.join(part.strip() + '\n' for part in (head, *sections)))
