"""How far training on several devices is from training on one: trains both, and prints a table.

python -m tests.scale           # some ten minutes on two cores
python -m tests.scale --write   # puts the table into docs/scaling.md
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from tests.scale import layouts

COLUMNS = {
    'a step': ('objective', 'update'),
    '50 steps': ('free objective', 'free state'),
    'evaluation': ('evaluation loss',),
}


def main() -> None:
    """Train on every layout, and print what differs."""
    parser = argparse.ArgumentParser('python -m tests.scale', description=__doc__)
    parser.add_argument('--write', action='store_true', help='put the table into docs/scaling.md')
    given = parser.parse_args()
    rows = []
    for name, model in {'strided': 'strided net', 'vgg16': 'head on frozen VGG16'}.items():
        with tempfile.TemporaryDirectory() as folder:
            one = layouts.train(name, Path(folder))
            for layout, options in layouts.LAYOUTS.items():
                print(f'{model}, {layout} …', file=sys.stderr)
                several = layouts.train(name, Path(folder), states=one, **options)
                apart = layouts.differences(one, several)
                several.unlink()
                numbers = [f'{max(apart[key] for key in keys):.0e}' for keys in COLUMNS.values()]
                equal = f'{apart["order"] + apart["mask"]:.0f}'
                rows.append([model, layout, equal, *numbers, f'{apart["moved"]:.0f}'])
    header = ['model', 'layout', 'order and masks', *COLUMNS, 'predictions']
    text = f'{results.table(header, rows)}\n\n{results.conditions("jaxlib")}.'
    print(text)
    if given.write:
        results.insert(layouts.ROOT / 'docs' / 'scaling.md', 'equality', text)


if __name__ == '__main__':
    main()
