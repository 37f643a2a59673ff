"""The images that a run leaves out, as a table that a person can act on."""

import csv
import io
from pathlib import Path
from typing import Any

from cnn_jax.files import write_atomically

FORMULA = ('=', '+', '-', '@', '\t', '\r')  # a spreadsheet would run what begins so


def write_skipped(folder: Path, batches: dict[str, Any]) -> int:
    """Write `skipped.csv` into `folder`: a row of split, path and reason for each image left out.

    It is CSV as of RFC 4180 in UTF-8, so a name with a newline stands in quotes; bytes of a name
    that are not UTF-8 are kept as they are (`errors='surrogateescape'` reads them back). A path
    that a spreadsheet would take for a formula begins with `./`. Nothing left out leaves no file.

    Args:
        folder: The run's.
        batches: The opened batches of each split, by name.

    Returns:
        The number of images left out; one that is listed for several splits counts once.

    Errors:
        OSError: The folder cannot be written.
    """
    rows = [
        (split, f'./{path}' if path.startswith(FORMULA) else path, reason)
        for split, opened in batches.items()
        for path, reason in opened.skipped
    ]
    where = folder / 'skipped.csv'
    if not rows:
        where.unlink(missing_ok=True)
        return 0
    table = io.StringIO(newline='')
    csv.writer(table).writerows([('split', 'path', 'reason'), *rows])
    content = table.getvalue().encode('utf-8', 'surrogateescape')
    write_atomically(where, lambda file: file.write(content))
    return len({path for _, path, _ in rows})
