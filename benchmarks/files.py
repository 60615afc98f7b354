"""The ``files`` suite: converting a sharded checkpoint on disk against copying its files, and the memory it takes.

Both write the same number of bytes to fresh files in a temporary folder (``TMPDIR`` chooses the disk), from a
source that the page cache holds. ``TORCHJAX_BRIDGE_FILES_GB`` sets the size of the checkpoint.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flax import nnx

from torchjax_bridge.weights import compare_checkpoints, convert, save_state_dict

from ._case import Candidate, Findings, WrongResultError, ask
from ._record import Promise
from ._setting import Setting
from ._timing import Spread

__all__ = ["run", "template"]

_SHARDS = 8

# What a user would see: a process of its own, with the imports of torch, JAX and flax in its memory.
_CHILD = """
import sys
from benchmarks.files import convert, template
source, target, count, width = sys.argv[1:]
convert(source, target, to="flax", template=template(int(count), int(width)))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run(setting: Setting) -> Findings:
    """Throughput there, and peak memory; files know no device."""
    if setting.device != "cpu":
        return Findings()
    width = 512 if setting.quick else 4096
    size = 64e6 if setting.quick else 1e9 * float(os.environ.get("TORCHJAX_BRIDGE_FILES_GB", "1"))
    count = max(int(size / (2 * width * width)), _SHARDS)
    with _checkpoint(count, width) as folder:
        found = _throughput(folder, count, width, setting)
        if Path("/proc/self/status").exists():
            found += _memory(folder, count, width, setting)
    return found


def template(count: int, width: int) -> nnx.Module:
    """The Flax side: so many square layers without biases, abstract."""

    class Net(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List(
                [nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(count)]
            )

    return nnx.eval_shape(Net)


@contextmanager
def _checkpoint(count: int, width: int) -> Iterator[Path]:
    """A folder with a bf16 checkpoint in it, in eight shards; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="torchjax-bridge-bench-") as name:
        values = torch.randn(width, width).bfloat16()
        # One tensor under many names would be written as often, so no more memory than one is needed.
        state = {f"layers.{n}.weight": values.roll(n, 0) if count <= 64 else values for n in range(count)}
        each = -(-count // _SHARDS) * values.nbytes
        save_state_dict(Path(name) / "source", state, shard_size=each)
        yield Path(name)


def _throughput(folder: Path, count: int, width: int, setting: Setting) -> Findings:
    structs = template(count, width)

    def fresh(act: Callable[[Path, Path], Any]) -> Callable[[Path], Path]:
        def call(source: Path) -> Path:
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            act(source, target)
            return target

        return call

    def copied(target: Path) -> None:
        if not compare_checkpoints(folder / "source", target).ok:
            raise WrongResultError("the copy differs")

    def converted(target: Path) -> None:
        if not compare_checkpoints(folder / "source", target, template=structs).ok:
            raise WrongResultError("the converted checkpoint differs from its source")

    source = folder / "source"
    nbytes = count * width * width * 2
    candidates = [
        Candidate("copy the files", fresh(shutil.copytree), source, copied),
        Candidate(
            "convert, torch to flax",
            fresh(lambda since, to: convert(since, to, to="flax", template=structs)),
            source,
            converted,
            ours=True,
        ),
    ]
    key = f"files/convert/{nbytes}"
    case, rounds = ask(
        key,
        f"How long does it take to convert a sharded bf16 checkpoint of {nbytes / 1e9:.2f} GB on disk?",
        candidates,
        setting,
        nbytes=nbytes,
    )
    speed = rounds.combine(
        lambda seconds: seconds["copy the files"] / seconds["convert, torch to flax"],
    )
    text = f"throughput of converting a {nbytes / 1e9:.2f} GB checkpoint / copying its files"
    return Findings([case], [Promise(text, "at least", 0.6, "x", speed)])


def _memory(folder: Path, count: int, width: int, setting: Setting) -> Findings:
    shutil.rmtree(folder / "target", ignore_errors=True)
    setting.progress("How much memory does a conversion take?")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _CHILD,
            str(folder / "source"),
            str(folder / "target"),
            str(count),
            str(width),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parent.parent,
    )
    peak = int(done.stdout) * 1024 / 1e9
    text = f"peak resident memory of a process that converts {count * width * width * 2 / 1e9:.2f} GB"
    return Findings(promises=[Promise(text, "at most", 1.5, "GB", Spread(peak, peak, peak, peak))])
