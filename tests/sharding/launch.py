"""Starts the processes of a job that torch and JAX share, and gathers what each of them found."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

import pytest

WORKER = pathlib.Path(__file__).with_name("worker.py")
NO_COLLECTIVES = 77


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(count: int, folder: pathlib.Path, timeout: float = 400) -> list[dict[str, str]]:
    """What every rank says of every case: "passed", or a traceback."""
    ports = [free_port(), free_port()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}
    workers, logs = [], []
    for rank in range(count):
        logs.append((folder / f"{rank}.log").open("w+"))
        arguments = [str(rank), str(count), *ports, str(folder)]
        command = [sys.executable, str(WORKER), *arguments]
        workers.append(subprocess.Popen(command, env=environment, stdout=logs[-1], stderr=logs[-1]))
    try:
        for worker in workers:
            worker.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        pass  # what follows shows the tails
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    tails = _tails(logs)
    if any(worker.returncode == NO_COLLECTIVES for worker in workers):
        pytest.skip(f"torch and JAX share no processes on this CPU: {tails}")
    results = [folder / f"{rank}.json" for rank in range(count)]
    assert all(path.exists() for path in results), tails
    return [json.loads(path.read_text()) for path in results]


def _tails(logs: Sequence) -> str:
    found = []
    for rank, log in enumerate(logs):
        log.seek(0)
        found.append(f"--- rank {rank}\n{log.read()[-3000:]}")
        log.close()
    return "\n".join(found)
