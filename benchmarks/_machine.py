"""Where and with what a run was made: versions, hardware, date, git revision."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import torch

from ._rehearsal import MARK, rehearsing

__all__ = ["busy", "provenance"]

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "jax", "jaxlib", "numpy", "flax", "torchjax-bridge")


def provenance(device: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything a reader needs to repeat the run or to distrust it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "versions": {"python": platform.python_version()} | _versions(*_PACKAGES, *packages),
        "hardware": {
            "processor": _processor(),
            "cores": _cores(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "torch_threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2),
        }
        | (_gpu() if device == "cuda" else {}),
    } | ({"rehearsal": MARK} if rehearsing() else {})


def busy(record: dict[str, Any]) -> str:
    """A warning if the machine had other work when the run began; else empty."""
    load, cores = record["hardware"]["load"], record["hardware"]["cores"]
    if load <= cores / 2:
        return ""
    return f"The machine was busy (load {load} on {cores} cores): trust ratios, not times."


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            # A module on the path without metadata (a vendored build) still says its version itself.
            if name in ("torch", "jax"):
                found[name] = str({"torch": torch, "jax": jax}[name].__version__)
    return found


def _revision() -> str | None:
    """The commit, with ``+`` when package or benchmark files differ from it; ``None`` outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py", "benchmarks/*/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name,
        "gpu_memory_gb": round(card.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
    }
