"""A long run: memory and open files over many steps, which must stay flat.

  python -m benchmarks.endurance --steps=100000 --out=benchmarks/RESULTS.md

`launch.train` trains a tiny net on the digits, evaluates and saves
every few hundred steps, and is watched from outside, through /proc (Linux).
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import cli, results
from cnn_jax.train.record import read_lines

FLAGS = (
    '--config=experiments/small.py',
    '--config.data.source=digits',
    '--config.model.widths=(4,)',
    '--config.model.hidden=(16,)',
    '--config.train.eval_every=20',
    '--config.train.checkpoint_every=20',
)
STEPS_PER_EPOCH = 1433 / 64
ROWS = 10  # of the table


def main() -> None:
    """Watch a run, and print and keep what was seen."""
    parser = cli.parser('benchmarks.endurance', __doc__)
    parser.add_argument('--steps', type=int, default=100_000, help='updates (100,000)')
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        seen = np.array(watch(Path(folder) / 'run', given.steps))
        minutes = (time.perf_counter() - began) / 60
    late = seen[seen[:, 0] > seen[-1, 0] / 10]
    slope = np.polyfit(late[:, 0] / 1e5, late[:, 1], 1)[0]
    least, most = late[:, 2].min(), late[:, 2].max()
    rows = [
        [f'{step:,.0f}', f'{memory:,.1f}', f'{files:.0f}']
        for step, memory, files in seen[:: max(1, len(seen) // ROWS)]
    ]
    body = f"""{results.conditions('jaxlib', 'orbax-checkpoint')}

{seen[-1, 0]:,.0f} steps of a tiny net in {minutes:.1f} minutes, with an evaluation and a checkpoint
every 448 steps. After the first tenth, memory grows by {slope:.1f} MB in 100,000 steps (a line
through {len(late)} samples), and open files are between {least:.0f} and {most:.0f}.

{results.table(('step', 'memory, MB', 'open files'), rows)}
"""
    cli.publish('Endurance', body, given.out)


def watch(folder: Path, steps: int) -> list[tuple[float, float, float]]:
    """Step, anonymous memory in MB and open files of a run, once a second."""
    command = [sys.executable, '-m', 'launch.train', *FLAGS, f'--workdir={folder}']
    epochs = f'--config.train.epochs={steps / STEPS_PER_EPOCH}'
    with folder.with_suffix('.log').open('w') as log:
        run = subprocess.Popen([*command, epochs], stdout=log)
        seen, process = [], Path('/proc') / str(run.pid)
        while run.poll() is None:
            time.sleep(1)
            lines = read_lines(folder / 'timing.jsonl')
            if lines and run.poll() is None:
                status = dict(re.findall(r'(\w+):\s*(\d+)', (process / 'status').read_text()))
                # Its own memory: the kernel drops and fetches that of files as it likes.
                kilobytes = int(status['RssAnon']) + int(status['VmSwap'])
                files = len(os.listdir(process / 'fd'))
                seen.append((lines[-1]['step'], kilobytes / 1e3, files))
    if run.returncode:
        sys.exit(f'failed: the run ended with {run.returncode}')
    return [each for each in seen if each[0] < seen[-1][0]]  # training has ended with the last


if __name__ == '__main__':
    cli.run(main)
