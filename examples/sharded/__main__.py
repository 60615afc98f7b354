"""``python -m examples.sharded``: starts the processes of the job, and shows what rank 0 says."""

import argparse
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from .checkpoint import convert_in_parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; 0 if every check held in every process."""
    parser = argparse.ArgumentParser(prog="python -m examples.sharded", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="steps of each of the three trainings")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--restore", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help="for checkpoints; default: one that is deleted")
    chosen = parser.parse_args(arguments)
    if chosen.rank is not None:
        _work(chosen.rank, chosen.processes, chosen.ports, chosen.steps, chosen.folder, chosen.restore)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or pathlib.Path(temporary)
        job = ["--processes", str(chosen.processes), "--steps", str(chosen.steps), "--folder", str(folder)]
        print(f"start   {chosen.processes} processes, each with torch and JAX", flush=True)
        if code := _launch(chosen.processes, job, folder):
            return code
        print(f"convert the checkpoint to Orbax, in {chosen.processes} parts that never talk", flush=True)
        convert_in_parts(folder, chosen.processes)
        if code := _launch(chosen.processes, [*job, "--restore"], folder):
            return code
    print("done    every check held in every process")
    return 0


def _work(rank: int, count: int, ports: list[int], steps: int, folder: pathlib.Path, restoring: bool) -> None:
    from .checkpoint import restore
    from .job import run, start

    if restoring:
        restore(rank, count, ports[1], folder)
    else:
        run(start(rank, count, *ports), steps, folder)


def _launch(count: int, job: list[str], folder: pathlib.Path) -> int:
    command = [sys.executable, "-m", "examples.sharded", *job, "--ports", _free_port(), _free_port()]
    logs = [(folder / f"rank-{rank}.log").open("w+") for rank in range(count)]
    workers = [
        subprocess.Popen(
            [*command, "--rank", str(rank)],
            stdout=subprocess.PIPE if rank == 0 else logs[rank],
            stderr=logs[rank],
            text=True,
        )
        for rank in range(count)
    ]
    codes = []
    try:
        for line in workers[0].stdout or ():
            if not line.startswith("[Gloo]"):  # XLA's collectives greet each other there
                print(line, end="", flush=True)
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, code in enumerate(codes):
        if code:
            logs[rank].seek(0)
            print(f"rank {rank} ended with {code}:\n{logs[rank].read()[-2000:]}", file=sys.stderr)
    for log in logs:
        log.close()
    return int(any(codes))


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
