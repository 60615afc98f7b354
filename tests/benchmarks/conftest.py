"""Small records to write, compare and draw, without timing anything."""

from collections.abc import Callable

import pytest

from benchmarks._record import Case, Peak, Promise, Row, Suite
from benchmarks._timing import Spread


def spread(median: float, width: float = 0.02) -> Spread:
    values = (median * (1 - width), median, median * (1 + width), median * (1 - 2 * width))
    return Spread(*(float(f"{value:.5g}") for value in values))  # as many figures as a file keeps


def row(name: str, microseconds: float, ratio: float, *, ours: bool = False, limit: bool = False) -> Row:
    return Row(name, ours, spread(microseconds), spread(ratio), 10, 20, True, limit)


def refused(name: str, note: str) -> Row:
    return Row(name, False, None, None, 0, 0, None, False, note)


def make_suite(
    *,
    ratio: float = 0.2,
    scale: float = 1.0,
    device: str = "cpu",
    name: str = "exchange",
    promised: float = 1.5,
) -> Suite:
    """A suite of one headline and one panel of three sizes; ``scale`` is how slow the machine is."""

    def rows(size: int) -> tuple[Row, ...]:
        stock, ours = 100.0 * scale, 100.0 * scale * ratio
        return (
            row("stock DLPack", stock, 1.0),
            row("torchjax-bridge", ours, ratio, ours=True),
            row("memcpy, warm", scale * size / 1000, size / 1e5, limit=True),
            refused("other", "shares memory, which a copy must not"),
        )

    headline = Case("to_jax/headline", "What does one tensor cost?", "stock DLPack", rows(4096))
    panel = [
        Case(
            f"to_jax/share/{size}", f"What do {size} B cost?", "stock DLPack", rows(size), "torch → JAX", size
        )
        for size in (4, 4096, 4**10)
    ]
    promise = Promise("to_jax of one tensor / raw capsules", "at most", 1.6, "x", spread(promised))
    provenance = {
        "date": "2026-01-02T03:04:05+00:00",
        "revision": "0123456789ab",
        "versions": {"python": "3.11.0", "torch": "2.13.0", "jax": "0.10.2"},
        "hardware": {
            "processor": "a processor",
            "cores": 2,
            "memory_gb": 16.0,
            "system": "Linux x86_64",
            "torch_threads": 2,
            "load": 0.1,
        },
    }
    peaks = (
        Peak("convert", True, 1 << 28, 300e6),
        Peak("convert", True, 1 << 30, 300e6),
        Peak("load it whole", False, 1 << 28, 800e6),
        Peak("the imports alone", False, 1 << 30, 250e6, limit=True),
    )
    return Suite(name, device, False, 12.3, provenance, (headline, *panel), (promise,), ("A fact.",), peaks)


@pytest.fixture
def suite_of() -> Callable[..., Suite]:
    return make_suite
