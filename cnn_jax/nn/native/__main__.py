"""Build the native convolutions now: `python -m cnn_jax.nn.native`."""

import sys

from cnn_jax.nn.native.build import find

if __name__ == '__main__':
    found = find(again=True)
    print(found if found.path is None else f'{found}, in {found.path}')
    sys.exit(found.path is None)
