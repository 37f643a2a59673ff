"""What runs survive, tried here and now: runs the tests of each kind of fault and prints a table.

python -m tests.faults                        # about an hour on two cores
python -m tests.faults --only=killed --write  # --write writes docs/reliability.md
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks import results
from tests.environments import ROOT

# Kind of fault, what must come out, and the tests that try it.
KINDS = [
    (
        'killed (SIGKILL) while training, fine-tuning, saving or filling a cache, at random file '
        'operations and random moments',
        'same state, metrics and steps, bit for bit',
        ['tests/faults/test_killed.py', '-k', 'killed_at'],
    ),
    (
        'power cut: the disk as it was at a random moment (ext4 in a file, as root)',
        'goes on from the newest checkpoint whose save had returned, with the same bits',
        ['tests/faults/test_killed.py', '-k', 'power_cut'],
    ),
    (
        'a file of a finished run flipped, cut, longer or deleted, each in turn, then opened and '
        'verified; every bit of the manifest flipped',
        'found before anything is printed, or the answer is the same',
        ['tests/tools/test_verify.py'],
    ),
    (
        'stopped after each step of a short run, in either phase',
        'same tail, bit for bit',
        ['tests/train/test_loop.py', '-k', 'killed'],
    ),
    (
        'ablation, its launcher or a worker killed, also on Ray; several launchers at once',
        'same summary; no cell lost, none twice',
        ['tests/launch/test_ablate_killed.py'],
    ),
    (
        'checkpoint truncated, bit-flipped, incomplete, empty, of another run or version; '
        'record or manifest altered or torn; killed before any file operation of a save',
        'found by its digest; the one before is used, and a warning is printed',
        ['tests/train/test_checkpoint.py', 'tests/test_files.py'],
    ),
    ('result of an ablation altered', 'found', ['tests/ablation/test_results.py', '-k', 'damaged']),
    (
        'disk full, file too large, folder read-only',
        'plain error; goes on when there is room',
        [
            'tests/launch/test_survival.py',
            'tests/pretrained/test_weights.py',
            '-k',
            'write or full',
        ],
    ),
    (
        'a second process on the work directory, also after a crash of the first',
        'refused, or waits',
        ['tests/launch/test_survival.py', '-k', 'second_process'],
    ),
    (
        'SIGTERM, a second signal, preemption under Slurm',
        'saved at the next step, exit 75, queued again',
        ['tests/launch', 'tests/train', '-k', 'stopped_or_killed or second_signal or slurm_job'],
    ),
    (
        'clock set back, fewer cores, other logging, streaming or profiling',
        'same bits',
        ['tests/launch/test_survival.py', '-k', 'clock or fewer_cores or changes_no_bit'],
    ),
    (
        'data, config, code, flags or threads changed',
        'refused or told',
        ['tests/launch', '-k', 'verify or another_config or changed'],
    ),
    (
        'images, IDX, HDF5, ONNX and safetensors files damaged or hostile',
        'skipped and listed, or a plain error; nothing is executed',
        ['tests/data', 'tests/pretrained', 'tests/test_no_pickle.py'],
    ),
    (
        'numbers that are not finite',
        'step, layer and examples named',
        ['tests/tools/test_nonfinite.py'],
    ),
    (
        'wrong arithmetic (also jaxlib 0.10 as it comes)',
        'stopped before the first step',
        ['tests/tools/test_selfcheck.py'],
    ),
]


def main() -> int:
    """Run the tests and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        'python -m tests.faults',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--only', default='', help='kinds that contain this word')
    parser.add_argument(
        '--write', action='store_true', help='put the table into docs/reliability.md'
    )
    given = parser.parse_args()
    rows, all_survived = [], True
    for fault, outcome, selection in KINDS:
        if given.only in fault:
            print(fault, file=sys.stderr)
            count, failed = run(selection)
            all_survived = all_survived and not failed
            rows.append([fault, f'{count:,}', f'FAILED {failed}' if failed else outcome])
    table = results.table(('fault', 'times tried', 'what came out'), rows)
    text = f'{table}\n\n{results.conditions("jaxlib")}.'
    print(text)
    if given.write:
        results.insert(ROOT / 'docs' / 'reliability.md', 'survived', text)
    return 0 if all_survived else 1


def run(selection: list[str]) -> tuple[int, int]:
    """How many faults the selected tests tried, and how many of the tests failed.

    A test that tries more than one says so with `record_property('tried', n)`.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-n2', '--dist=loadfile']
        marks = ['-m', 'slow or not slow', f'--junitxml={report}']  # the exhaustive ones, too
        subprocess.run([*command, *marks, *selection], cwd=ROOT, stdout=sys.stderr)
        cases = list(ET.parse(report).iter('testcase'))
    if not cases:
        raise ValueError(f'no test matches {" ".join(selection)}')
    failed = sum(any(part.tag in ('failure', 'error') for part in case) for case in cases)
    return sum(map(tried, cases)), failed


def tried(case: ET.Element) -> int:
    """How many faults a test tried."""
    found = case.find('.//property[@name="tried"]')
    return 1 if found is None else int(found.attrib['value'])


if __name__ == '__main__':
    sys.exit(main())
