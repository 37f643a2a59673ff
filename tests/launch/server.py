"""Runs launchers in forks of one process that has imported what they need, which takes 2 seconds.

Each line of standard input is a request in JSON, `[launcher, arguments, folder]`; the answer is the
exit code, and the folder then has what the launcher printed in `out` and `err`.
"""

import importlib
import json
import os
import runpy
import signal
import sys

USED = (
    'absl.logging flax.linen jax matplotlib.pyplot optax orbax.checkpoint '
    'PIL.Image scipy.stats tensorboardX'
)
LONGEST = 300  # seconds

for module in USED.split():
    importlib.import_module(module)
for line in sys.stdin:
    name, arguments, folder = json.loads(line)
    if not os.fork():
        break
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    sys.exit()

os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for stream, kept in ((1, 'out'), (2, 'err')):
    os.dup2(os.open(f'{folder}/{kept}', os.O_WRONLY | os.O_CREAT), stream)
signal.alarm(LONGEST)
sys.argv = [name, *arguments]
runpy.run_module(f'launch.{name}', run_name='__main__', alter_sys=True)
