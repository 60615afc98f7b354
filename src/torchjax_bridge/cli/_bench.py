"""``torchjax-bridge bench``: time a crossing here, beside the way through NumPy."""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ._options import Debug, as_bytes
from ._terminal import columns, fail, human, say

HELP = """Time how long a tensor takes to cross on this machine, beside the way through NumPy.

A quick look in a few seconds; the project's repository holds the full benchmark (python -m benchmarks).

\b
Example:
  torchjax-bridge bench --size 1MB --size 64MB

Exit codes: 0 measured; 1 a value came out wrong; 2 usage."""


def bench(
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="SIZE", help="How large; may be given again.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="How often to time each.")] = 30,
    debug: Debug = False,
) -> None:
    """Time each route in turn, so that a busy machine is busy for all."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torchjax_bridge.exchange import to_jax, to_torch

    sizes = [as_bytes(text) for text in size or ["4kB", "1MB", "64MB"]]
    rows = [["size", "route", "median", "against NumPy"]]
    for count in sizes:
        try:
            tensor = torch.arange(max(count // 4, 1), dtype=torch.float32)
            array = jnp.asarray(tensor.numpy().copy())
        except (RuntimeError, MemoryError) as err:
            if debug:
                raise
            raise fail(f"there is no memory for tensors of {human(count)}.") from err
        for verb, value, ours, theirs in (
            ("torch to jax", tensor, to_jax, lambda t: jnp.array(t.numpy())),
            ("jax to torch", array, to_torch, lambda a: torch.tensor(np.asarray(a))),
        ):
            if not np.array_equal(np.asarray(ours(value)), np.asarray(value)):
                say(f"error: {verb} gives wrong values")
                raise typer.Exit(1)
            fast, slow = _interleaved([ours, theirs], value, rounds)
            rows.append([human(count), verb, f"{fast * 1e6:.1f} us", f"{slow / fast:.1f}x faster"])
    for line in columns(rows):
        say(line)
    say(f"medians of {rounds}, on {jax.devices()[0].platform} with {torch.get_num_threads()} torch threads")


def _interleaved(calls: list[Callable[[Any], Any]], value: Any, rounds: int) -> list[float]:
    """The median seconds of each call."""
    import jax

    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 3):
        for call, found in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call(value))
            if turn >= 3:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]
