"""Takes in the calls of a Flax model while it runs, or while JAX traces it.

What runs inside a JAX transformation (scan, remat, vmap, jit) is recorded as it runs, by callbacks whose
effects JAX keeps in order. ``flax.linen.scan`` of flax 0.12.12 mistakes an effect in its body for a broadcast
variable that depends on the loop, and raises. So without ``effects`` the values pass through the callbacks
instead. Knows nothing about nnx or linen.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from torchjax_bridge.exchange import Path

from ._copies import map_arrays
from ._record import MODEL_ERRORS, Call, Record
from ._values import values_in

__all__ = ["RUNNING", "Frame", "Recorder", "take_apart"]


class Recorder:
    """Records calls, with concrete arrays or with traced ones."""

    def __init__(self, watched: frozenset[Path], *, effects: bool = True) -> None:
        self.record = Record()
        self.watched = watched
        self.key = next(_KEYS)
        self._effects = effects
        self._pending: list[tuple[Callable[..., None], list[Any]]] | None = None

    def __enter__(self) -> "Recorder":
        RUNNING[self.key] = self
        return self

    def __exit__(self, *exc: object) -> None:
        jax.effects_barrier()
        del RUNNING[self.key]

    def record_call(self, path: Path, given: "Frame", output: Any, module: Any = None) -> Any:
        """Record one call, now or once its values are known. Returns the output that the model must go on with."""
        gave = take_apart(output)
        arrays = [*given.arrays, *gave.arrays]
        store = partial(_store, self.key, path, module, given.frame, gave.frame)
        if self._pending is not None:
            self._pending.append((store, arrays))
            return output
        if not any(isinstance(array, jax.core.Tracer) for array in arrays):
            for array in arrays:
                jax.block_until_ready(array)
            jax.effects_barrier()  # so that earlier traced calls are recorded earlier
            store(*arrays)
        elif self._effects:
            jax.debug.callback(store, *arrays, ordered=True)
        else:
            return _by_value(store, arrays, output)
        return output

    def run(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model; keep its error, since the calls before the error may explain it."""
        with jax.default_matmul_precision("highest"):
            try:
                output = model(*args, **kwargs)
            except MODEL_ERRORS as err:
                self.record.error = err
                return None
        return jax.block_until_ready(output)

    def run_whole(self, model: Callable[..., Any], *inputs: Any) -> Any:
        """Call the model as one compiled program that also returns what its modules took and gave.

        If the model cannot be traced from end to end (it branches on values, or has a part that JAX
        transforms), only the error is kept.
        """
        taken = take_apart(inputs)
        frames: list[Any] = []

        def program(arrays: list[Any]) -> Any:
            self._pending, frames[:] = [], []
            output = take_apart(model(*fill(taken.frame, iter(arrays))))
            frames.extend((output.frame, [store for store, _ in self._pending]))
            return [arrays for _, arrays in self._pending], output.arrays

        try:
            with jax.default_matmul_precision("highest"):
                # It runs only once: optimizing would take longer than the run.
                compiled = jax.jit(program, compiler_options={"xla_backend_optimization_level": 0})
                kept, arrays = jax.block_until_ready(compiled(taken.arrays))
        except (*MODEL_ERRORS, AssertionError, RuntimeError) as err:
            self.record.error = err
            return None
        for store, known in zip(frames[1], kept, strict=True):
            store(*known)
        return fill(frames[0], iter(arrays))


class Frame(NamedTuple):
    """A tree with holes instead of arrays, and its arrays. Its containers are copies: later writes do not show."""

    frame: Any
    arrays: list[Any]


def take_apart(tree: Any) -> Frame:
    """Take a tree apart into a frame and its arrays, as they are now."""
    arrays: list[Any] = []

    def leaf(_: Path, array: Any) -> Any:
        arrays.append(array.copy() if isinstance(array, np.ndarray) else array)
        return _HOLE

    return Frame(map_arrays(tree, leaf), arrays)


_HOLE = np.zeros(0)


def fill(frame: Any, arrays: Iterator[Any]) -> Any:
    return map_arrays(frame, lambda _, hole: next(arrays))


def _by_value(store: Callable[..., Any], arrays: list[Any], output: Any) -> Any:
    """Pass the output through a callback that stores. It has no effect, and runs because its result is used."""
    gave = take_apart(output)
    traced = [array for array in gave.arrays if isinstance(array, jax.core.Tracer)]

    def look(passed: list[Any], *arrays: Any) -> list[Any]:
        store(*arrays)
        return passed

    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in traced]
    passed = iter(jax.pure_callback(look, shapes, traced, *arrays, vmap_method="sequential"))
    again = [next(passed) if isinstance(array, jax.core.Tracer) else array for array in gave.arrays]
    return fill(gave.frame, iter(again))


def _store(key: int, path: Path, module: Any, given: Any, gave: Any, *arrays: Any) -> None:
    running = RUNNING.get(key)
    if running is None:  # a compiled function may outlive the run that traced it
        return
    known = (
        array if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)
        for array in arrays
    )
    took, returned = fill(given, known), fill(gave, known)
    running.record.calls.append(Call(path, values_in(took), values_in(returned), took, module))


_KEYS = itertools.count()
RUNNING: dict[int, Recorder] = {}
