"""What the commands of this folder have in common."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import contest, results
from cnn_jax.errors import UserError
from cnn_jax.files import cache_folder
from cnn_jax.nn.native import build


def parser(module: str, doc: str | None, rounds: int = 0) -> argparse.ArgumentParser:
    """A command's options: its docstring is the help; with `rounds`, contenders take turns."""
    made = argparse.ArgumentParser(
        f'python -m {module}', description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument('--out', type=Path, help='file whose section or figure is replaced')
    if rounds:
        made.add_argument('--rounds', type=int, default=rounds, help=f'turns of each ({rounds})')
        made.add_argument(
            '--peers', type=Path, default=Path('.bench'), help='folder of setup_peers.sh (.bench)'
        )
        made.add_argument(
            '--contenders',
            type=words,
            default=[],
            help='those whose names contain one of these, e.g. cnn_jax,PyTorch (all)',
        )
    return made


def words(given: str) -> list[str]:
    """The parts of a list with commas."""
    return [word.strip() for word in given.split(',') if word.strip()]


def publish(title: str, body: str, out: Path | None) -> None:
    """Print a section, and keep it if there is a file for it."""
    print(body)
    if out:
        results.write_section(out, title, body)


def run(main: Callable[[], None]) -> None:
    """Run a command; what its user can mend is one sentence.

    The native library is built before, once a machine, as the peers' wheels bring their kernels.
    """
    try:
        os.environ.setdefault(build.SWITCH, str(cache_folder() / 'native'))
        build.library()
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except contest.Disagreement as error:
        sys.exit(f'failed: {error}')
