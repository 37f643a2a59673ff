"""What `python launch/NAME.py` finds in place of the package: says how to start a launcher."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
print(f'error: start it from the checkout as python -m launch.{name}', file=sys.stderr)
sys.exit(2)
