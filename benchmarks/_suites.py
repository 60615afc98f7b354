"""The suites there are. To add one: one module with ``run(setting) -> Findings``, one entry in `SUITES`."""

import importlib
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from ._machine import busy, provenance
from ._peers import PEERS, load_peer
from ._record import Suite
from ._setting import Setting

__all__ = ["GROUPS", "SUITES", "run"]

# Name on the command line -> module; imported when run, so that a suite may need flax and another not.
SUITES = {
    "exchange": "benchmarks.exchange",
    "files": "benchmarks.files",
    "weights": "benchmarks.weights",
    "wrap-jax": "benchmarks.wrap_jax",
    "wrap-torch": "benchmarks.wrap_torch",
}

# Names that stand for several suites; "all" stands for every one.
GROUPS = {"wrap": ("wrap-jax", "wrap-torch")}


def run(name: str, setting: Setting) -> Suite:
    """Run one suite and put its provenance beside what it found."""
    origin = provenance(setting.device, tuple(PEERS) if setting.peers else ())
    start = time.perf_counter()
    with _default_device(setting):
        findings = importlib.import_module(SUITES[name]).run(setting)
    facts = [*findings.facts, *([warning] if (warning := busy(origin)) else [])]
    if setting.peers:
        facts += [f"{peer.name}: {peer.status}." for peer in map(load_peer, PEERS) if peer.module is None]
    return Suite(
        name,
        setting.device,
        setting.quick,
        round(time.perf_counter() - start, 1),
        origin,
        tuple(findings.cases),
        tuple(findings.promises),
        tuple(facts),
    )


def _default_device(setting: Setting) -> AbstractContextManager[Any]:
    """Where there is a GPU, JAX puts arrays on it unless told; a run on the CPU has to tell."""
    if jax.devices()[0] == setting.jax_device:
        return nullcontext()
    return jax.default_device(setting.jax_device)
