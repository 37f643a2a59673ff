"""Where the workers of an ablation run: processes of this machine, or tasks of a Ray cluster.

A worker is a command; it takes cells from the ledger in the work directory until none is left.
Both kinds start it with `--worker=N` and are used alike: `running`, `outputs`, `stop`.
"""

import subprocess
from pathlib import Path

RETRIES = 10  # of a Ray worker, for nodes that die


class WorkerFailed(RuntimeError):
    """A worker ended with an error of its own (a failed cell is not one)."""


class LocalWorkers:
    """Processes of this machine; what they print is kept in `worker-N.log`.

    Args:
        command: What a worker runs.
        workers: How many.
        folder: The work directory, for the logs.
    """

    def __init__(self, command: list[str], workers: int, folder: Path):
        self._logs = [folder / f'worker-{number}.log' for number in range(workers)]
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
            WorkerFailed: One has ended with an error.
        """
        for process, log in zip(self._processes, self._logs):
            if process.poll():
                last = log.read_text().strip().splitlines()[-1:]
                raise WorkerFailed(f'a worker failed ({"".join(last)}); {log} has the rest')
        return any(process.poll() is None for process in self._processes)

    def outputs(self) -> list[str]:
        """What the workers printed."""
        return [log.read_text() for log in self._logs]

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
        def work(number: int) -> str:
            line = [*command, f'--worker={number}']
            done = subprocess.run(line, cwd=place, capture_output=True, text=True)
            if done.returncode:
                raise WorkerFailed(
                    f'a worker failed: {(done.stderr or done.stdout)[-500:].strip()}'
                )
            return done.stdout

        self._tasks = [work.remote(number) for number in range(workers)]

    def running(self) -> bool:
        """Whether any worker is at work; one that failed for good raises its error here."""
        ready, waiting = self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)
        self._ray.get(ready)
        return bool(waiting)

    def outputs(self) -> list[str]:
        """What the workers printed."""
        return self._ray.get(self._tasks)

    def stop(self) -> None:
        """End the workers and leave the cluster."""
        for task in self._tasks:
            self._ray.cancel(task, force=True)
        self._ray.shutdown()
