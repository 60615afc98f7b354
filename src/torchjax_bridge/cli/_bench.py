"""``torchjax-bridge bench``: times a crossing, compared with a copy through NumPy."""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ._options import Debug, parse_bytes
from ._terminal import align_columns, error_exit, format_bytes, print_line

HELP = """Time how long a tensor takes to cross on this machine, compared with a copy through NumPy.

A quick look in a few seconds; the project's repository holds the full benchmark (python -m benchmarks).

\b
Example:
  torchjax-bridge bench --size 1MB --size 64MB

Exit codes: 0 measured; 1 a value came out wrong; 2 usage."""


def bench(
    size: Annotated[
        list[str] | None, typer.Option("--size", metavar="SIZE", help="The size of a tensor; repeatable.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, help="How often to time each route.")
    ] = 30,
    debug: Debug = False,
) -> None:
    """Time the routes in turn, so that other load on the machine affects them equally."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from torchjax_bridge.exchange import to_jax, to_torch

    sizes = [parse_bytes(text) for text in size or ["4kB", "1MB", "64MB"]]
    rows = [["size", "route", "median", "against NumPy"]]
    for count in sizes:
        try:
            tensor = torch.arange(max(count // 4, 1), dtype=torch.float32)
            array = jnp.asarray(tensor.numpy().copy())
        except (RuntimeError, MemoryError) as err:
            if debug:
                raise
            raise error_exit(f"there is not enough memory for tensors of {format_bytes(count)}.") from err
        for route, value, bridge, numpy in (
            ("torch to jax", tensor, to_jax, lambda t: jnp.array(t.numpy())),
            ("jax to torch", array, to_torch, lambda a: torch.tensor(np.asarray(a))),
        ):
            if not np.array_equal(np.asarray(bridge(value)), np.asarray(value)):
                print_line(f"error: {route} gives wrong values")
                raise typer.Exit(1)
            fast, slow = _interleaved_medians([bridge, numpy], value, rounds)
            rows.append([format_bytes(count), route, f"{fast * 1e6:.1f} us", f"{slow / fast:.1f}x faster"])
    for line in align_columns(rows):
        print_line(line)
    print_line(
        f"medians of {rounds}, on {jax.devices()[0].platform} with {torch.get_num_threads()} torch threads"
    )


def _interleaved_medians(calls: list[Callable[[Any], Any]], value: Any, rounds: int) -> list[float]:
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
