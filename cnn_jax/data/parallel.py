"""The same work for many items, on all cores, with a progress bar on a terminal."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cnn_jax.cores import cores

T = TypeVar('T')
CHUNK = 32  # items a task: large enough to hide the cost of handing it over


def parallel_map(function: Callable[[int], T], n: int, label: str) -> list[T]:
    """`[function(0), …, function(n − 1)]`, by threads: Pillow decodes without holding the GIL.

    The first error ends the work and is raised here. `label` stands before the progress bar.
    """
    chunks = [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    with ThreadPoolExecutor(cores()) as pool:
        done = pool.map(lambda chunk: [function(i) for i in chunk], chunks)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            done = track(done, label, len(chunks), console=Console(stderr=True), transient=True)
        return [result for chunk in done for result in chunk]
