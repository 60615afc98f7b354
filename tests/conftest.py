"""What every test may rely on: four host devices, one torch thread a worker, and the x64 switch."""

import functools
import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import torch

# Before any backend starts. JAX would take three quarters of a GPU's memory, in every worker, and torch the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Half of the suite was XLA's code generator, at work on programs that run once. Here it takes a fifth of that; the
# lanes and the slow tests compile as users do, and so does `XLA_FLAGS= make test`.
if not torch.cuda.is_available():
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )
# Arrays on several devices and shard_map need more than one host device.
jax.config.update("jax_num_cpu_devices", 4)
torch.set_num_threads(1)
# The collector went through a million objects again and again, for a fifth of the suite's time. Tests of lifetimes
# collect by themselves.
gc.set_threshold(20_000, 20, 100)

ROOT = Path(__file__).resolve().parent.parent


def _shared() -> Path | None:
    """Where the data that is not committed lies, if it lies anywhere."""
    for folder in (os.environ.get("TORCHJAX_BRIDGE_SHARED"), ROOT.parent / "shared"):
        if folder and (Path(folder) / "data").is_dir():
            return Path(folder)
    return None


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-10 images and third-party checkpoints; skips where there is none."""
    found = _shared()
    if found is None:
        pytest.skip("no ../shared/data beside the checkout (set TORCHJAX_BRIDGE_SHARED)")
    return found


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is a GPU, JAX puts arrays on it; a test that is not marked `gpu` is about the CPU."""
    if _no_gpu() or request.node.get_closest_marker("gpu"):
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture
def x64_on() -> Iterator[None]:
    """The test runs with 64-bit types in JAX."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def x64_off() -> Iterator[None]:
    """The test runs without 64-bit types in JAX, as JAX starts."""
    with jax.enable_x64(False):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where torch and jax do not both see a CUDA device; mark what is left out of `every` slow."""
    seen: Counter[str] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("every")) is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1
    reason = _no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@functools.cache
def _no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        jax.devices("gpu")
    except RuntimeError:
        return "jax sees no CUDA device"
    return ""
