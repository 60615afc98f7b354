"""Runs a suite and puts its provenance beside what it found; what a suite found before its time was up is kept."""

import importlib
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from ._findings import Findings
from ._machine import busy, provenance
from ._names import SUITES
from ._peers import PEERS, load_peer
from ._record import Suite
from ._rehearsal import MARK, rehearsing
from ._setting import OutOfTime, Setting

__all__ = ["SUITES", "run"]


def run(name: str, setting: Setting) -> Suite:
    """Run one suite and put its provenance beside what it found."""
    origin = provenance(setting.device, tuple(PEERS) if setting.peers else ())
    start = time.perf_counter()
    findings = kept = Findings()
    stopped = []
    try:
        with _default_device(setting):
            findings = importlib.import_module(SUITES[name]).run(replace(setting, findings=kept))
    except OutOfTime:
        stopped = ["Its time was up: the questions that are not here were not asked."]
    if rehearsing():
        stopped.append(f"{MARK}.")
    if setting.brisk:
        stopped.append("Measured with --brisk: a quarter of the rounds.")
    facts = [*findings.facts, *stopped, *([warning] if (warning := busy(origin)) else [])]
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
        tuple(findings.peaks),
    )


def _default_device(setting: Setting) -> AbstractContextManager[Any]:
    """Where there is a GPU, JAX puts arrays on it unless told; a run on the CPU has to tell."""
    if jax.devices()[0] == setting.jax_device:
        return nullcontext()
    return jax.default_device(setting.jax_device)
