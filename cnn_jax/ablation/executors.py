"""Where the workers of an ablation run: processes of this machine, or tasks of a Ray cluster.

A worker is a command; it takes cells from the ledger in the work directory until none is left.
Both kinds start it with `--worker=N` and are used alike: `running`, `outputs`, `stop`. When a
worker dies the others take over its cell; only the death of all is an error.
"""

import os
import socket
import subprocess
from pathlib import Path

from cnn_jax.errors import UserError

RETRIES = 10  # of a Ray worker, for nodes that die
MISTAKE = 2  # a worker's exit code when the user must mend something


class WorkerFailed(RuntimeError):
    """All workers ended with errors of their own (a failed cell is not one)."""


def _check(ended: list[tuple[int, str]], still: bool) -> None:
    """Raise what the exit codes and outputs of ended workers ask for."""
    for code, text in ended:
        if code == MISTAKE:
            raise UserError(_last_line(text).removeprefix('error: '))
    if not still and all(code for code, _ in ended):
        code, text = ended[-1]
        reason = _last_line(text).removeprefix('failed: ').removesuffix(' (--debug shows where)')
        raise WorkerFailed(f'every worker died, the last one with {code}: {reason}')


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ['nothing on its standard error'])[-1]


class LocalWorkers:
    """Processes of this machine; what they print is kept in `logs/`.

    Args:
        command: What a worker runs.
        workers: How many.
        folder: The work directory, for the logs.
    """

    def __init__(self, command: list[str], workers: int, folder: Path):
        place = folder / 'logs'
        place.mkdir(exist_ok=True)
        name = f'{socket.gethostname()}-{os.getpid()}'  # another launcher may use the folder
        self._logs = [place / f'{name}-{number}.log' for number in range(workers)]
        self._processes = []
        for number, log in enumerate(self._logs):
            with log.open('w') as file:
                process = subprocess.Popen(
                    [*command, f'--worker={number}'], stdout=file, stderr=subprocess.STDOUT
                )
            self._processes.append(process)

    def running(self) -> bool:
        """Whether any worker is at work.

        Errors:
            UserError: A worker cannot work, for a reason that the user must mend.
            WorkerFailed: All have ended with errors.
        """
        codes = [process.poll() for process in self._processes]
        still = None in codes
        ended = [(code, log) for code, log in zip(codes, self._logs) if code is not None]
        _check([(code, log.read_text()) for code, log in ended], still)
        return still

    def outputs(self) -> list[str]:
        """What the workers that came to their end printed."""
        ended = zip(self._processes, self._logs)
        return [log.read_text() for process, log in ended if process.returncode == 0]

    def stop(self) -> None:
        """End the workers; their unfinished cells are free again."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()


class RayWorkers:
    """Ray tasks. All nodes must see the work directory and this checkout under the same paths.

    Ray starts a worker again when its process or its node dies; the cell it had claimed is free
    again then, and finished ones are not repeated.

    Args:
        command: What a worker runs, in the current folder.
        workers: How many.
        address: Of a cluster, as `ray.init` takes it; '' starts one here.
        cpus, gpus, tpus: What each worker reserves.
    """

    def __init__(
        self,
        command: list[str],
        workers: int,
        *,
        address: str = '',
        cpus: float = 1,
        gpus: float = 0,
        tpus: float = 0,
    ):
        import ray

        self._ray = ray
        ray.init(address=address or None, log_to_driver=False, include_dashboard=False)
        place = str(Path.cwd())

        @ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            resources={'TPU': tpus} if tpus else {},
            max_retries=RETRIES,
        )
        def work(number: int) -> tuple[int, str]:
            line = [*command, f'--worker={number}']
            done = subprocess.run(line, cwd=place, capture_output=True, text=True)
            return done.returncode, done.stdout if done.returncode == 0 else done.stderr

        self._tasks = [work.remote(number) for number in range(workers)]

    def running(self) -> bool:
        """Whether any worker is at work; errors as those of `LocalWorkers`."""
        ready, waiting = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        _check(self._ray.get(ready), bool(waiting))
        return bool(waiting)

    def outputs(self) -> list[str]:
        """What the workers that came to their end printed."""
        return [text for code, text in self._ray.get(self._tasks) if code == 0]

    def stop(self) -> None:
        """End the workers and leave the cluster."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()
