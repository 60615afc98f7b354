"""Parts in processes of their own: killed by the system at every block, and measured."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from torchjax_bridge.weights import compare_checkpoints

from .test_parts import check, source, template, to_dcp, to_orbax

Folder = pathlib.Path
pytestmark = pytest.mark.slow

# Imports once; then a fork for each kill, before any thread is there.
_KILLED = """
import os, pathlib, signal, sys
import orbax.checkpoint
import tests.weights.files.test_parts as parts

folder, run, total = pathlib.Path(sys.argv[1]), getattr(parts, sys.argv[2]), int(sys.argv[3])

def killed_at(block):
    left = [block]
    def tick(_):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return lambda _: tick

for block in range(total):
    for part in (0, 1):
        child = os.fork()
        if not child:
            run(folder, (part, 2), resume=True, progress=killed_at(block))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == signal.SIGKILL, status
        assert not (folder / "out").exists()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("run", [to_orbax, to_dcp])
def test_a_kill_of_any_part_at_any_block_costs_nothing(tmp_path: Folder, root: Folder, run: object) -> None:
    state = source(tmp_path / "dcp")
    blocks = 0

    def count(_: int) -> None:
        nonlocal blocks
        blocks += 1

    run(tmp_path, (0, 2), progress=lambda _: count)  # type: ignore[operator]
    least = min(blocks, 5)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    name = run.__name__  # type: ignore[attr-defined]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), name, str(least)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (0, 1):
        run(tmp_path, (part, 2), resume=True)  # type: ignore[operator]
    check(tmp_path, state)


_MEASURED = """
import json, sys, threading, time
import orbax.checkpoint, torch
from torchjax_bridge.weights import convert

def held():
    text = open("/proc/self/status").read()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024

source, target, to, format = sys.argv[1:]
before, peak, over = held(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, held())

watcher = threading.Thread(target=watch)
watcher.start()
convert(source, target, to=to, format=format, memory=16 << 20)
over.set()
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell")
def test_memory_does_not_grow_with_the_model(tmp_path: Folder) -> None:
    import torch

    from torchjax_bridge.weights import convert, save_state_dict

    grown = {}
    for count in (16, 64):
        values = torch.randn(1024, 1024)  # 4 MiB
        save_state_dict(tmp_path / "one.safetensors", {f"{n}.weight": values + n for n in range(count)})
        convert(tmp_path / "one.safetensors", tmp_path / "dcp", to="torch", format="dcp", overwrite=True)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                _MEASURED,
                str(tmp_path / "dcp"),
                str(tmp_path / f"out-{count}"),
                "torch",
                "dcp",
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        grown[count] = json.loads(done.stdout)
        assert compare_checkpoints(tmp_path / "dcp", tmp_path / f"out-{count}").ok
    assert grown[64] < grown[16] + (8 << 20), grown  # 192 MiB more are converted


def test_the_command_line_converts_in_parts(tmp_path: Folder, root: Folder) -> None:
    state = source(tmp_path / "dcp")
    (tmp_path / "net.py").write_text(
        "from tests.weights.files.test_parts import NnxNet\nmake = lambda: NnxNet()\n"
    )
    said = []
    for part in ("1/2", "0/2"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torchjax_bridge", "convert", "dcp", "out", "--to", "flax"),
                *("--format", "orbax", "--template", "net:make", "--mesh", "x=4", "--part", part),
            ],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "part 1/2 is done; out appears when these are, too: 0/2" in said[0]
    assert "wrote 5 tensors" in said[1]
    (tmp_path / "net.py").unlink()
    assert compare_checkpoints(tmp_path / "dcp", tmp_path / "out", template=template()).same == len(state)
