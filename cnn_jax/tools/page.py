"""Pages that need no network, and the files beside them: HTML, JSON and CSV.

Every name and text in them comes from outside, so it is escaped, and does nothing where it is read.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cnn_jax.errors import csv_cell, printable
from cnn_jax.files import replacing


def template(path: Path, **filters: Callable) -> Any:
    """The Jinja template in a file, which may import the macros of `page.jinja`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)


def _shown(value: Any) -> Any:
    """A value as the page shows it: controls and changes of direction are seen there, too."""
    return printable(value, keep='\n\t') if type(value) is str else value


def number(value: float | None, decimals: int, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return '–'
    text = f'{value:+.{decimals}f}' if signed else f'{value:.{decimals}f}'
    if float(text) == 0:
        text = text.lstrip('+-')
    return text.replace('-', '−')


def to_json(content: Any) -> str:
    """Indented JSON ending in a newline; a number that is not finite is null."""
    return json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + '\n'


def finite(content: Any) -> Any:
    """The content with None in place of numbers that are not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def write_csv(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write a table of at least one row, row by row; what is missing, or not finite, is empty."""
    with (
        replacing(path) as temporary,
        temporary.open('w', encoding='utf-8', newline='') as file,
    ):
        writer = csv.writer(file, lineterminator='\n')
        for number, row in enumerate(rows):
            if not number:
                writer.writerow(map(csv_cell, row))
            writer.writerow(map(csv_cell, finite([*row.values()])))
