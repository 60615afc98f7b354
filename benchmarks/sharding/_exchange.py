"""Exchange of a sharded tensor in a job of two processes, beside what one does without it: gather, then cross."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

from .._case import Findings, WrongResultError
from .._record import Case, Promise, Row
from .._setting import Setting
from .._timing import Rounds, Spread
from ._job import COPY, FULL, OURS, OURS_BACK, SHAPE

__all__ = ["exchange"]

_PROCESSES = 2


def exchange(setting: Setting) -> Findings:
    """Microseconds for each `DTensor`, and whether any byte is moved."""
    size = math.prod(SHAPE) * 4 >> 20
    question = f"How long does a DTensor of {size} MiB over {_PROCESSES} processes take to cross?"
    setting.progress(question)
    found = json.loads(_run(5 if setting.quick else 40, 20 if setting.quick else 200))
    rounds = Rounds(found["seconds"], found["calls"])

    def row(name: str) -> Row:
        ratio = Spread(1.0, 1.0, 1.0, 1.0) if name == FULL else rounds.ratio(name, FULL)
        ours = name in (OURS, OURS_BACK)
        shares = found["shares"][name]
        return Row(
            name,
            ours,
            rounds.microseconds(name),
            ratio,
            rounds.calls[name],
            len(rounds.seconds[name]),
            shares,
        )

    rows = tuple(map(row, (FULL, COPY, OURS, OURS_BACK)))
    case = Case("sharding/exchange", question, FULL, rows, nbytes=math.prod(SHAPE) * 4)
    moved = 0.0 if found["shares"][OURS] and found["shares"][OURS_BACK] else float(math.prod(SHAPE) * 4)
    return Findings(
        [case],
        [
            Promise(
                "bytes that an exchange of a DTensor copies", "at most", 0.0, "bytes", Spread(*[moved] * 4)
            ),
            Promise(
                "to_jax of a DTensor / gathering it first", "at most", 0.1, "x", rounds.ratio(OURS, FULL)
            ),
        ],
    )


def _run(rounds: int, calls: int) -> str:
    """What rank 0 prints."""
    ports = [_free_port(), _free_port()]
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.sharding._job", str(rank), str(_PROCESSES)),
                *(*ports, str(rounds), str(calls)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        for rank in range(_PROCESSES)
    ]
    try:
        said = [worker.communicate(timeout=600) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, said, strict=True):
        if worker.returncode:
            raise WrongResultError(
                f"sharding/exchange: a process ended with {worker.returncode}: {errors[-800:]}"
            )
    return said[0][0].strip().splitlines()[-1]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
