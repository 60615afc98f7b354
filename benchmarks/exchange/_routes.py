"""Every conversion, in each direction: ours, the frameworks' own, the raw capsules, numpy, peers.

Makes the candidates and checks that each gives the right bits; times nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge import to_jax, to_torch

from .._case import Candidate, WrongResultError
from .._memory import COLD_FROM, cold_copy, warm_copy
from .._peers import PEERS, load_peer
from .._raw import raw_pair
from .._setting import Setting

__all__ = [
    "COLD",
    "NUMPY",
    "OURS",
    "RAW",
    "STOCK",
    "WARM",
    "Direction",
    "both_directions",
    "check_result",
    "pointer",
]

OURS = "torchjax-bridge"
STOCK = "stock DLPack"
RAW = "raw capsules"
NUMPY = "through numpy"
WARM = "memcpy, warm"
COLD = "memcpy, fresh pages"


@dataclass(frozen=True)
class Direction:
    """One direction: how to make an operand, and every way to convert it."""

    name: str
    """``"to_jax"`` or ``"to_torch"``, after the function."""
    label: str
    """For headings: ``"torch → JAX"``."""
    make_operand: Callable[[tuple[int, ...]], Any]
    """A float32 operand of a given shape, with random values, on the device; nothing else holds its memory."""
    ours: Callable[..., Any]
    routes: dict[str, Callable[[Any], Any]]
    """Name -> conversion that may share memory; the stock one first."""
    copies: dict[str, Callable[[Any], Any]]
    """Name -> conversion into fresh memory; ours first."""

    def sharing(self, operand: Any) -> list[Candidate]:
        """Candidates for one operand, with the stock route as baseline; ours must share.

        The last is a warm memcpy: the least that a copying route can cost.
        """
        source = operand if isinstance(operand, torch.Tensor) else to_torch(operand)
        candidates = [
            Candidate(
                name,
                call,
                operand,
                lambda result, ours=name == OURS: check_result(  # type: ignore[misc]
                    operand, result, must_share=True if ours else None
                ),
                ours=name == OURS,
                limit=name == RAW,
            )
            for name, call in self.routes.items()
        ]
        return [*candidates, Candidate(WARM, warm_copy(source), operand, _copied(source), limit=True)]

    def copying(self, operand: Any) -> list[Candidate]:
        """Candidates for one operand, with a warm memcpy as baseline; none may share."""
        source = operand if isinstance(operand, torch.Tensor) else to_torch(operand)
        copied = _copied(source)
        limits = [Candidate(WARM, warm_copy(source), operand, copied, limit=True)]
        if source.nbytes >= COLD_FROM:
            limits.append(Candidate(COLD, cold_copy(source), operand, copied, limit=True))
        return limits + [
            Candidate(name, call, operand, copied, ours=name == OURS) for name, call in self.copies.items()
        ]


def both_directions(setting: Setting) -> tuple[tuple[Direction, Direction], list[str]]:
    """The two directions on one device, and sentences on what is not available there."""
    raw = raw_pair(setting)
    return (_towards_jax(setting, raw), _towards_torch(setting, raw)), [raw] if isinstance(raw, str) else []


def _towards_jax(setting: Setting, raw: Any) -> Direction:
    where = setting.torch_device

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, device=where)

    def through_numpy(tensor: torch.Tensor) -> jax.Array:
        return jnp.asarray(tensor.numpy())

    def through_host(tensor: torch.Tensor) -> jax.Array:
        return jax.device_put(tensor.cpu().numpy(), setting.jax_device)

    routes: dict[str, Callable[[Any], Any]] = {STOCK: jax.dlpack.from_dlpack}
    if not isinstance(raw, str):
        routes[RAW] = raw[0]
    routes |= {OURS: to_jax, NUMPY: through_numpy if setting.device == "cpu" else through_host}
    routes |= _peer_routes(setting, {"torch-jax-interop": "torch_to_jax", "wrap-torch2jax": "t2j"})
    copies: dict[str, Callable[[Any], Any]] = {
        OURS: lambda tensor: to_jax(tensor, copy=True),
        STOCK: lambda tensor: jax.dlpack.from_dlpack(tensor, copy=True),
        "torch.clone": torch.clone,
    }
    return Direction("to_jax", "torch → JAX", make, to_jax, routes, copies)


def _towards_torch(setting: Setting, raw: Any) -> Direction:
    def make(shape: tuple[int, ...]) -> jax.Array:
        if setting.device == "cuda":  # gigabytes would take seconds to cross from the host
            with jax.default_device(setting.jax_device):
                there = jax.random.uniform(jax.random.key(0), shape)
            return jax.block_until_ready(jax.device_put(there, setting.jax_device))
        values = np.random.default_rng(0).random(shape, dtype=np.float32)
        # A copy, since the result of device_put may still use NumPy's memory.
        return jax.block_until_ready(jnp.array(jax.device_put(values, setting.jax_device), copy=True))

    def through_numpy(array: jax.Array) -> torch.Tensor:
        return torch.tensor(np.asarray(array))

    def through_host(array: jax.Array) -> torch.Tensor:
        # Not np.asarray(array): it caches the host copy, and every later call would reuse it.
        on_host = jax.device_put(array, jax.devices("cpu")[0])
        return torch.tensor(np.asarray(on_host), device=setting.torch_device)

    routes: dict[str, Callable[[Any], Any]] = {STOCK: torch.from_dlpack}
    if not isinstance(raw, str):
        routes[RAW] = raw[1]
    routes |= {OURS: to_torch, NUMPY: through_numpy if setting.device == "cpu" else through_host}
    routes |= _peer_routes(setting, {"torch-jax-interop": "jax_to_torch", "wrap-torch2jax": "j2t"})
    copies: dict[str, Callable[[Any], Any]] = {
        OURS: lambda array: to_torch(array, copy=True),
        STOCK: lambda array: torch.from_dlpack(array, copy=True),
        "jnp.array": lambda array: jnp.array(array, copy=True),
    }
    return Direction("to_torch", "JAX → torch", make, to_torch, routes, copies)


def _peer_routes(setting: Setting, names: dict[str, str]) -> dict[str, Callable[[Any], Any]]:
    if not setting.peers:
        return {}
    found = {name: load_peer(name).module for name in PEERS if name in names}
    return {name: getattr(module, names[name]) for name, module in found.items() if module is not None}


def _copied(source: Any) -> Callable[[Any], bool]:
    return lambda result: check_result(source, result, must_share=False)


def check_result(operand: Any, result: Any, *, must_share: bool | None) -> bool:
    """Raise unless a result has the operand's bits and shares its memory if, and only if, it must."""
    if not isinstance(result, torch.Tensor | jax.Array):
        raise WrongResultError(f"the result is a {type(result).__name__}")
    shares = pointer(result) == pointer(operand)
    if must_share is not None and shares is not must_share:
        raise WrongResultError("shares memory, which a copy must not" if shares else "copied, and must share")
    if tuple(result.shape) != tuple(operand.shape) or str(result.dtype).split(".")[-1] != "float32":
        raise WrongResultError(f"the result is {result.dtype}{tuple(result.shape)}")
    if not shares and not _same_bits(result, operand):
        raise WrongResultError("the values differ")
    return shares


def pointer(thing: Any) -> int:
    """The device address of the first element."""
    return thing.data_ptr() if isinstance(thing, torch.Tensor) else thing.unsafe_buffer_pointer()


def _same_bits(one: Any, other: Any) -> bool:
    """Compared where they are, if both are on a GPU: gigabytes would take seconds to cross to the host."""
    mine, theirs = (
        (thing if isinstance(thing, torch.Tensor) else torch.from_dlpack(thing)).view(torch.int32)
        for thing in (one, other)
    )
    return (
        torch.equal(mine, theirs) if mine.device == theirs.device else torch.equal(mine.cpu(), theirs.cpu())
    )
