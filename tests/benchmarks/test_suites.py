import importlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _suites
from benchmarks._case import Findings
from benchmarks._setting import Setting


@pytest.mark.parametrize("name", _suites.SUITES)
def test_every_suite_on_the_list_is_a_module_with_a_run(name: str):
    assert callable(importlib.import_module(_suites.SUITES[name]).run)


def test_a_run_on_the_cpu_keeps_jax_off_another_default_device(monkeypatch: pytest.MonkeyPatch):
    host = jax.devices("cpu")
    seen = []

    def run(setting: Setting) -> Findings:
        seen.append(jnp.ones(1).devices())
        return Findings()

    monkeypatch.setitem(sys.modules, "a_tiny_suite", SimpleNamespace(run=run))
    monkeypatch.setitem(_suites.SUITES, "tiny", "a_tiny_suite")
    _suites.run("tiny", Setting("cpu"))
    # As on a machine where JAX's first device is not the CPU that was asked for.
    monkeypatch.setattr(jax, "devices", lambda backend=None: host if backend is None else [host[1]])
    _suites.run("tiny", Setting("cpu"))
    assert seen == [{host[0]}, {host[1]}]


def test_the_parts_of_a_suite_are_joined_in_order():
    whole = Findings(facts=["a"])
    whole += Findings(facts=["b", "c"])
    assert whole.facts == ["a", "b", "c"]
    assert whole.cases == []
    assert whole.promises == []
