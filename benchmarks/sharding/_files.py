"""Converting a DCP checkpoint to Orbax: CPU seconds beside a copy, two parts beside one, memory, bytes read.

Every run is a process of its own. Rounds are interleaved, and ratios are taken within a round. CPU seconds count
where they can: the time of a write depends on the pages that the kernel finds for it. ``TMPDIR`` chooses the disk,
and ``TORCHJAX_BRIDGE_SHARDING_MB`` the sizes, such as ``256,1024,4096``.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchjax_bridge.weights import compare_checkpoints

from .._case import WrongResultError
from .._findings import Findings
from .._record import Case, Peak, Promise, Row
from .._setting import Setting
from .._timing import Spread
from ._child import WIDTH, template

__all__ = ["run"]

_ROOT = Path(__file__).resolve().parent.parent.parent
_LAYER_BYTES = WIDTH * WIDTH * 2
_COPY, _COPIES = "copy the files", "copy the files, in two processes"
_RELAY = "copy the files, and transpose on the way"
_STREAM, _PARTS = "convert, in one part", "convert, in two parts"
_IMPORTS = "the imports alone"
_WHOLE, _MERGE = "load whole and save", "dcp_to_torch_save (to one file)"


def run(setting: Setting) -> Findings:
    """CPU seconds and wall time at one size, peak memory at each, bytes that restoring processes read."""
    sizes = [int(size) for size in os.environ.get("TORCHJAX_BRIDGE_SHARDING_MB", "").split(",") if size]
    sizes = sizes or ([64, 128] if setting.quick else [256, 1024, 4096])
    rounds, found = (1 if setting.quick else 5), setting.findings
    with tempfile.TemporaryDirectory(prefix="torchjax-bridge-bench-") as name:
        folder = Path(name)
        found += _memory(folder, sizes, setting)
        found += _times(folder, sizes[:2][-1], rounds, setting)
        found += _bytes_read(folder, sizes[0], 2 if setting.quick else 4, setting)
    return found


def _times(folder: Path, size: int, rounds: int, setting: Setting) -> Findings:
    source, count = _source(folder, size)
    candidates: dict[str, list[tuple[str, ...]]] = {
        _COPY: [("copy",)],
        _COPIES: [("copy", "0/2"), ("copy", "1/2")],
        _RELAY: [("relay",)],
        _STREAM: [("stream", count)],
        _PARTS: [("stream", count, "0/2"), ("stream", count, "1/2")],
        _WHOLE: [("whole", count)],
        _MERGE: [("merge", count)],
    }
    cpu: dict[str, list[float]] = {one: [] for one in candidates}
    wall: dict[str, list[float]] = {one: [] for one in candidates}
    for number in range(rounds):
        for one, tasks in candidates.items():
            setting.progress(f"{one} ({size} MiB, round {number + 1} of {rounds})")
            took = _run([(task, source, folder / "target", *rest) for task, *rest in tasks])
            cpu[one].append(sum(part["cpu"] for part in took))
            wall[one].append(max(part["wall"] for part in took))
            if number == 0 and one in (_STREAM, _PARTS, _WHOLE):
                same = compare_checkpoints(
                    source, folder / "target", template=template(int(count), one_device=True)
                )
                if not same.ok:
                    raise WrongResultError(f"{one}: {same.differences[0]}")
            _remove(folder / "target")
    nbytes = int(count) * _LAYER_BYTES
    cases = [
        _case(
            f"sharding/cpu/{nbytes}", f"How much CPU time does it take to convert {size} MiB?", cpu, nbytes
        ),
        _case(f"sharding/wall/{nbytes}", f"How long does it take to convert {size} MiB?", wall, nbytes),
    ]
    ratio, to_relay = (
        Spread.of([a / b for a, b in zip(cpu[_STREAM], cpu[one], strict=True)]) for one in (_COPY, _RELAY)
    )
    parts, floor = (
        Spread.of([a / b for a, b in zip(wall[two], wall[one], strict=True)])
        for two, one in ((_PARTS, _STREAM), (_COPIES, _COPY))
    )
    return Findings(
        cases,
        [
            Promise(
                "CPU seconds of DCP to Orbax, transposed / of a copy of the files", "at most", 1.4, "x", ratio
            ),
            Promise(
                "CPU seconds of DCP to Orbax, transposed / of a copy that transposes on the way",
                "reported",
                None,
                "x",
                to_relay,
            ),
            Promise("wall time of DCP to Orbax in two parts / in one", "at most", 0.75, "x", parts),
            Promise(
                "wall time of a copy of the files in two processes / in one", "reported", None, "x", floor
            ),
        ],
    )


def _memory(folder: Path, sizes: list[int], setting: Setting) -> Findings:
    promises, peaks = [], []
    (alone,) = _run([("nothing",)])
    for size in sizes:
        source, count = _source(folder, size)
        for task, what in (("stream", _STREAM), ("merge", _MERGE), ("whole", _WHOLE)):
            if task != "stream" and size > 1024:
                continue  # they would need several times as much
            setting.progress(f"memory of: {what} ({size} MiB)")
            (took,) = _run([(task, source, folder / "target", count)])
            _remove(folder / "target")
            peaks.append(Peak(what, task == "stream", size << 20, took["anonymous"]))
            if task == "stream":
                peak = took["anonymous"] / (1 << 20)
                text = f"peak anonymous memory of a process: {what}, {size} MiB"
                promises.append(Promise(text, "at most", 400.0, "MiB", Spread(peak, peak, peak, peak)))
    peaks += [Peak(_IMPORTS, False, size << 20, alone["anonymous"], limit=True) for size in sizes]
    return Findings(promises=promises, peaks=peaks)


def _bytes_read(folder: Path, size: int, world: int, setting: Setting) -> Findings:
    setting.progress(f"How many bytes does each of {world} restoring processes read?")
    source, count = _source(folder, size)
    _run([("stream", source, folder / "orbax", count)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    took = _run([("restore", folder / "orbax", count, str(rank), str(world), port) for rank in range(world)])
    _remove(folder / "orbax")
    ratio = Spread.of([one["read"] / one["share"] for one in took])
    text = f"bytes that each of {world} restoring processes reads / its share of {size} MiB"
    return Findings(promises=[Promise(text, "at most", 1.05, "x", ratio)])


def _source(folder: Path, size: int) -> tuple[Path, str]:
    """A DCP checkpoint of about so many MiB, and the number of its layers."""
    count = str(max(size * (1 << 20) // _LAYER_BYTES, 4))
    source = folder / f"dcp-{size}"
    if not source.exists():
        _run([("make", source, count)])
    return source, count


def _run(tasks: list[tuple[Any, ...]]) -> list[dict[str, float]]:
    """Run tasks at once, each in a process; what each printed."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sharding._child", *map(str, task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=_ROOT,
        )
        for task in tasks
    ]
    try:
        for worker in workers:
            if worker.stdout is not None:
                worker.stdout.readline()  # that it is ready; nothing if it died
        for worker in workers:
            with suppress(BrokenPipeError):
                print(file=worker.stdin, flush=True)
        said = [worker.communicate() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for task, worker, (_, error) in zip(tasks, workers, said, strict=True):
        if worker.returncode:
            raise WrongResultError(f"{task[0]} ended with {worker.returncode}: {error.strip()[-300:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def _case(key: str, question: str, seconds: dict[str, list[float]], nbytes: int) -> Case:
    base = seconds[_COPY]

    def row(name: str, values: list[float]) -> Row:
        ratio = Spread.of([one / other for one, other in zip(values, base, strict=True)])
        ours = name in (_STREAM, _PARTS)
        return Row(name, ours, Spread.of([1e6 * one for one in values]), ratio, 1, len(values), None)

    return Case(key, question, _COPY, tuple(row(*item) for item in seconds.items()), "", nbytes)


def _remove(target: Path) -> None:
    shutil.rmtree(target) if target.is_dir() else target.unlink()
