"""``python -m examples.sharded``: starts the processes of the job, and shows what rank 0 says."""

import argparse
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; 0 if every check held in every process."""
    parser = argparse.ArgumentParser(prog="python -m examples.sharded", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="steps of each of the three trainings")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help="for checkpoints; default: one that is deleted")
    chosen = parser.parse_args(arguments)
    if chosen.rank is not None:
        from .job import run, start

        run(start(chosen.rank, chosen.processes, *chosen.ports), chosen.steps, chosen.folder)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return _launch(chosen.processes, chosen.steps, chosen.folder or pathlib.Path(temporary))


def _launch(count: int, steps: int, folder: pathlib.Path) -> int:
    command = [sys.executable, "-m", "examples.sharded", "--processes", str(count), "--steps", str(steps)]
    command += ["--folder", str(folder), "--ports", _free_port(), _free_port()]
    print(f"start   {count} processes, each with torch and JAX", flush=True)
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
    if not any(codes):
        print("done    every check held in every process")
    return int(any(codes))


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
