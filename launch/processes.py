"""Run training in several processes of this machine, as a cluster would on several machines.

  python -m launch.processes --count=2 -- launch.train --config=experiments/small.py \\
      --workdir=runs/small
  python -m launch.processes --count=4 --devices=2 --restarts=3 -- launch.train …

This is for trying out a multi-process run on CPUs: the accelerators of one machine need one
process alone, plain `launch.train`. Each process gets its share of the cores and `--distributed`;
process 0's output is passed on, and the others' errors with their number in front. If one process
fails, all end; with --restarts they are then started again.
"""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from absl import flags

from cnn_jax.ablation.workers import end_with_parent
from cnn_jax.errors import UserError
from cnn_jax.runtime import cores
from launch import cli

COUNT = flags.DEFINE_integer('count', 2, 'Number of processes.', lower_bound=1)
DEVICES = flags.DEFINE_integer('devices', 1, 'CPU devices of each process.', lower_bound=1)
RESTARTS = flags.DEFINE_integer(
    'restarts',
    0,
    'Number of times that all are restarted after one failed or was killed.',
    lower_bound=0,
)
GRACE = 30.0  # seconds for the others to end by themselves after one has
# Log lines of C++ libraries, and their continuations.
NATIVE = re.compile(
    r'[IWEF]\d{4} |WARNING: All log messages|\[Gloo\]|\[mutex|\s+@ |\*\*\* |'
    r'Additional GRPC|:?UNKNOWN:|The tasks have crashed|Check failed|RPC: /'
)


def main(arguments: list[str]) -> int:
    """Run them; returns the exit code of the first process that failed, or that of all."""
    if len(arguments) < 2:
        raise UserError('no command; give it after --, e.g. -- launch.train --config=… --workdir=…')
    if arguments[1] != 'launch.train':
        raise UserError(f'{arguments[1]} runs in one process; launch.train alone runs in several')
    command = [sys.executable, '-m', *arguments[1:], '--distributed']
    for attempt in range(RESTARTS.value + 1):
        if attempt:
            print(
                f'restarting all {COUNT.value} (restart {attempt} of {RESTARTS.value})', flush=True
            )
        code = Group(command, COUNT.value, DEVICES.value).wait()
        if code in (cli.OK, cli.MISTAKE, cli.STOPPED, cli.INTERRUPTED, cli.TERMINATED):
            break
    return code


class Group:
    """Processes that find each other on this machine; forwards signals to them.

    Args:
        command: Command of each process.
        count: Number of processes.
        devices: CPU devices of each process.
    """

    def __init__(self, command: list[str], count: int, devices: int):
        with socket.socket() as free:
            free.bind(('localhost', 0))
            address = f'localhost:{free.getsockname()[1]}'
        flag = f'--xla_force_host_platform_device_count={devices}'
        shared = {
            'JAX_PLATFORMS': 'cpu',
            'JAX_COORDINATOR_ADDRESS': address,
            'JAX_NUM_PROCESSES': str(count),
            'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip(),
            'NPROC': os.environ.get('NPROC', str(max(1, cores() // count))),
        }
        self._processes, self._readers, self._asked = [], [], 0
        asked = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
        self._handlers = {number: signal.signal(number, self._forward) for number in asked}
        for number in range(count):
            environment = os.environ | shared | {'JAX_PROCESS_ID': str(number)}
            # Not in the terminal's group, from which Ctrl-C would come a second time.
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors='replace',
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )
            self._processes.append(process)
            for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                prefix = f'process {number}: ' if number or out is sys.stderr else ''
                reader = threading.Thread(target=_pass_on, args=(stream, out, prefix), daemon=True)
                reader.start()
                self._readers.append(reader)

    def wait(self) -> int:
        """Wait for all; returns the exit code of the process that failed first, or that of all.

        A process that was killed by a signal is taken for the cause, whichever is seen first.
        """
        failed: dict[int, int] = {}
        deadline = float('inf')
        while True:
            codes = [process.poll() for process in self._processes]
            failed |= {number: code for number, code in enumerate(codes) if code}
            if None not in codes:
                break
            if failed and deadline == float('inf'):
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                for process in self._processes:
                    process.kill()
                break
            time.sleep(0.1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for reader in self._readers:
            reader.join(5)
        number, code = min(failed.items(), key=lambda item: item[1] >= 0, default=(0, 0))
        if code < 0 and self._asked:  # before there was anything to save
            return 128 + self._asked
        if code < 0:
            name = signal.Signals(-code).name
            print(
                f'failed: process {number} was killed by {name}, and the others with it; rerun '
                'the same command to resume from the last checkpoint',
                file=sys.stderr,
            )
            return cli.FAILED
        return code

    def _forward(self, number: int, _) -> None:
        self._asked = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(self._asked)


def _pass_on(stream: IO[str], out: IO[str], prefix: str) -> None:
    for line in stream:
        if not NATIVE.match(line):
            print(prefix + line, end='', file=out, flush=True)


if __name__ == '__main__':
    cli.run(main, takes_words=True)
