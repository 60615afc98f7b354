"""The ``gpu-memory`` suite: what crossing, converting and pushing need on the device beside what is there.

Both allocators are asked for their peaks, since each sees its own memory only. JAX must not have taken most of the
card at its start (``XLA_PYTHON_CLIENT_PREALLOCATE=false``).
"""

import gc
from collections.abc import Callable
from typing import Any

import jax
import torch

from torchjax_bridge import link, to_flax, to_jax, to_torch

from .._case import Findings
from .._record import Promise
from .._rehearsal import rehearsing
from .._setting import Setting
from .._timing import Spread
from ..weights import MODELS, TRANSFORMER, nnx_template, torch_module

__all__ = ["run"]


def run(setting: Setting) -> Findings:
    """Peaks, divided by the bytes that cross."""
    found = setting.findings
    size = (1 << 20) if setting.quick else (1 << 30)
    tensor = torch.ones(size // 4, device=setting.torch_device)
    array = jax.block_until_ready(jax.numpy.ones(size // 4, device=setting.jax_device))
    description = MODELS[TRANSFORMER](setting.quick)
    module = torch_module(description).to(setting.torch_device)
    weights = sum(leaf.nbytes for leaf in module.state_dict().values())
    both = link(module, to_flax(module, nnx_template(description)))
    questions: tuple[tuple[str, float, int, Callable[[], Any]], ...] = (
        ("a shared crossing to JAX", 0.0, size, lambda: to_jax(tensor, copy=False)),
        ("a shared crossing to torch", 0.0, size, lambda: to_torch(array, copy=False)),
        ("a copied crossing to JAX", 1.0, size, lambda: to_jax(tensor, copy=True)),
        ("to_flax, result included", 1.05, weights, lambda: to_flax(module, nnx_template(description))),
        ("push, result included", 1.05, weights, both.push),
        ("pull", 0.05, weights, both.pull),
    )
    for words, limit, nbytes, call in questions:
        setting.progress(f"How much memory does {words} need?")
        found += _peak(words, limit, nbytes, call, setting)
    return found


def _peak(words: str, limit: float, nbytes: int, call: Callable[[], Any], setting: Setting) -> Findings:
    if _held(setting) is None:
        return Findings(facts=[f"JAX does not count its memory here, so the peak of {words} is not known."])
    call()  # caches fill, streams are made
    shares = []
    for _ in range(3):
        gc.collect()
        setting.settle(None)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours, theirs = torch.cuda.memory_allocated(), _held(setting) or 0
        kept = call()
        setting.settle(None)
        # JAX's peak cannot be reset, so its own memory counts as it is while the result is held.
        extra = torch.cuda.max_memory_allocated() - ours + max(0, (_held(setting) or 0) - theirs)
        del kept
        shares.append(extra / nbytes)
    text = f"extra memory of {words} / bytes that cross"
    # An allocator rounds up to its blocks of 2 MB.
    return Findings(promises=[Promise(text, "at most", limit + 4 * 2**20 / nbytes, "x", Spread.of(shares))])


def _held(setting: Setting) -> int | None:
    """Bytes that JAX's allocator has given out; None where it does not count them, as on the CPU."""
    counted = setting.jax_device.memory_stats()
    return counted["bytes_in_use"] if counted else 0 if rehearsing() else None
