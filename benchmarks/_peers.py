"""The other libraries: which are installed, which import, and what stopped those that do not."""

import importlib
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

__all__ = ["PEERS", "PEER_ERRORS", "Peer", "load_peer"]

# Distribution -> module.
PEERS = {
    "torch-jax-interop": "torch_jax_interop",
    "wrap-torch2jax": "wrap_torch2jax",
}

# What code we do not own may raise when it is imported or called, short of errors of the machine.
PEER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Peer:
    """One other library, as found here."""

    name: str
    """Its distribution's name."""
    module: ModuleType | None
    status: str
    """Its version; or why it cannot be timed."""


def load_peer(name: str) -> Peer:
    """Import a peer, or say what is in the way."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Peer(name, None, "not installed; the extra torchjax-bridge[bench] brings it")
    try:
        return Peer(name, importlib.import_module(PEERS[name]), version)
    except PEER_ERRORS as err:
        reason = " ".join(str(err).split())
        return Peer(name, None, f"{version} is installed but fails to import: {type(err).__name__}: {reason}")
