"""Every workload in turn, and then the figure.

  bash benchmarks/setup_peers.sh            # once: an environment for each peer, in .bench
  python -m benchmarks                      # all, an hour or two; leave the machine alone
  python -m benchmarks --only=small28,start

Each workload is a command of its own with more options, which --help tells:

  strided96, small28   python -m benchmarks.step --workload=NAME    a training step
  …_one_core           … --cores=1                                  the same, kept to one core
  features             python -m benchmarks.features                VGG16's frozen convolutions
  finetune             python -m benchmarks.finetune                a fine-tuning, whole processes
  ablation             python -m benchmarks.ablation                an ablation, whole processes
  start                python -m benchmarks.start                   start to the first step
                       python -m benchmarks.plot                    the figure of what is kept

All but start first check that all contenders compute the same. A section of the results is replaced
when it has run to its end; one that fails leaves the old section, and the others still run.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks import cli

WORKLOADS = {
    'strided96': ('benchmarks.step', '--workload=strided96'),
    'small28': ('benchmarks.step', '--workload=small28'),
    'strided96_one_core': ('benchmarks.step', '--workload=strided96', '--cores=1'),
    'small28_one_core': ('benchmarks.step', '--workload=small28', '--cores=1'),
    'features': ('benchmarks.features',),
    'finetune': ('benchmarks.finetune',),
    'ablation': ('benchmarks.ablation',),
    'start': ('benchmarks.start',),
}


def main() -> int:
    """Measure, draw, and return the exit code."""
    parser = cli.parser('benchmarks', __doc__)
    parser.add_argument('--only', type=cli.words, default=[*WORKLOADS], help='some of them (all)')
    parser.add_argument('--rounds', type=int, help="of each (each workload's own number)")
    parser.add_argument('--peers', type=Path, default=Path('.bench'), help='of setup_peers.sh')
    parser.add_argument('--figure', type=Path, default=Path('docs/speed.png'), help='.png or .svg')
    parser.set_defaults(out=Path('benchmarks/RESULTS.md'))
    given = parser.parse_args()
    chosen = given.only
    if unknown := [name for name in chosen if name not in WORKLOADS]:
        parser.error(f'there is no workload {unknown[0]!r}; there are {", ".join(WORKLOADS)}')
    failed = []
    for name in chosen:
        print(f'{name}:', file=sys.stderr)
        options = [f'--peers={given.peers}', f'--out={given.out}']
        options += [f'--rounds={given.rounds}'] * (given.rounds is not None)
        if run(*WORKLOADS[name], *options):
            failed.append(name)
    if run('benchmarks.plot', f'--results={given.out}', f'--out={given.figure}'):
        failed.append('plot')
    if failed:
        print(f'failed: {", ".join(failed)}; the errors are above', file=sys.stderr)
    return 1 if failed else 0


def run(module: str, *options: str) -> int:
    """The exit code of a command of this folder."""
    return subprocess.run([sys.executable, '-m', module, *options]).returncode


if __name__ == '__main__':
    sys.exit(main())
