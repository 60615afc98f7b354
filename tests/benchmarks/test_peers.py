import sys
from importlib import metadata
from types import ModuleType

import pytest

from benchmarks import _peers
from benchmarks._peers import load_peer


def test_a_peer_that_is_not_installed_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_peers.PEERS, "no-such-peer", "no_such_peer")
    peer = load_peer("no-such-peer")
    assert peer.module is None
    assert peer.status.startswith("not installed")


@pytest.mark.parametrize(
    "error", [ImportError("no chex"), AttributeError("jax.core.Foo"), RuntimeError("boom")]
)
def test_a_peer_that_fails_to_import_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "broken_peer":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.setitem(_peers.PEERS, "broken-peer", "broken_peer")
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    peer = load_peer("broken-peer")
    assert peer.module is None
    assert peer.status == f"1.2.3 is installed but fails to import: {type(error).__name__}: {error}"


def test_a_peer_that_imports_has_its_module_and_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(_peers.PEERS, "fine-peer", "fine_peer")
    monkeypatch.setitem(sys.modules, "fine_peer", ModuleType("fine_peer"))
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    peer = load_peer("fine-peer")
    assert peer.module is sys.modules["fine_peer"]
    assert peer.status == "1.2.3"
