"""A run of a Flax model, watched: nnx through a copy whose modules record, linen through ``nn.intercept_methods``.

What runs inside a JAX transformation (scan, remat, vmap, jit) is recorded as it runs, by callbacks: effects that
JAX keeps in order. ``flax.linen.scan`` of flax 0.12.12 takes an effect in its body for a broadcast variable that
depends on the loop, and raises; such a model runs once more, with callbacks through which the values pass. The
caller's module and variables are left as they were.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.errors
import flax.linen
import jax
import numpy as np
from flax import nnx

from torchjax_bridge.exchange import Path

from ..settings import flax_layer
from ..trees import FlaxLeaf, linen_path, read_flax, rng_streams
from ._copies import map_arrays
from ._record import MODEL_ERRORS, Call, Record
from ._values import values_in

__all__ = ["record_linen", "record_nnx"]


class _Recorder:
    """Takes calls in, whether their arrays are there or still traced."""

    def __init__(self, watched: frozenset[Path], *, effects: bool = True) -> None:
        self.record = Record()
        self.watched = watched
        self.key = next(_KEYS)
        self._effects = effects
        self._kept: list[tuple[Callable[..., None], list[Any]]] | None = None

    def __enter__(self) -> "_Recorder":
        _RUNNING[self.key] = self
        return self

    def __exit__(self, *exc: object) -> None:
        jax.effects_barrier()
        del _RUNNING[self.key]

    def note(self, path: Path, given: "_Taken", output: Any, module: Any = None) -> Any:
        """Record one call, now or when its values are known; give its output to go on with."""
        gave = _take(output)
        arrays = [*given.arrays, *gave.arrays]
        store = partial(_store, self.key, path, module, given.frame, gave.frame)
        if self._kept is not None:
            self._kept.append((store, arrays))
            return output
        if not any(isinstance(array, jax.core.Tracer) for array in arrays):
            for array in arrays:
                jax.block_until_ready(array)
            jax.effects_barrier()  # so that what was traced before has been recorded before
            store(*arrays)
        elif self._effects:
            jax.debug.callback(store, *arrays, ordered=True)
        else:
            return _through(store, arrays, output)
        return output

    def run(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model; keep what it raises, since what it did until then says why."""
        with jax.default_matmul_precision("highest"):
            try:
                output = model(*args, **kwargs)
            except MODEL_ERRORS as err:
                self.record.error = err
                return None
        return jax.block_until_ready(output)

    def run_whole(self, model: Callable[..., Any], *inputs: Any) -> Any:
        """Call the model as one program, whose results are what its modules took and gave.

        Where it cannot be traced from end to end (it decides by values, or has a part that JAX transforms), the
        error is kept, and nothing else.
        """
        taken = _take(inputs)
        frames: list[Any] = []

        def program(arrays: list[Any]) -> Any:
            self._kept, frames[:] = [], []
            output = _take(model(*_filled(taken.frame, iter(arrays))))
            frames.extend((output.frame, [store for store, _ in self._kept]))
            return [arrays for _, arrays in self._kept], output.arrays

        try:
            with jax.default_matmul_precision("highest"):
                # It runs once: to make it fast would take longer than it runs.
                compiled = jax.jit(program, compiler_options={"xla_backend_optimization_level": 0})
                kept, arrays = jax.block_until_ready(compiled(taken.arrays))
        except (*MODEL_ERRORS, AssertionError, RuntimeError) as err:
            self.record.error = err
            return None
        for store, known in zip(frames[1], kept, strict=True):
            store(*known)
        return _filled(frames[0], iter(arrays))


class _Taken(NamedTuple):
    """A tree with holes in the places of its arrays, and the arrays; containers that are written to later stay."""

    frame: Any
    arrays: list[Any]


def _take(tree: Any) -> _Taken:
    """Keep what a module takes or gives as it is now."""
    arrays: list[Any] = []

    def leaf(_: Path, array: Any) -> Any:
        arrays.append(array.copy() if isinstance(array, np.ndarray) else array)
        return _HOLE

    return _Taken(map_arrays(tree, leaf), arrays)


_HOLE = np.zeros(0)


def _filled(frame: Any, arrays: Iterator[Any]) -> Any:
    return map_arrays(frame, lambda _, hole: next(arrays))


def _through(store: Callable[..., Any], arrays: list[Any], output: Any) -> Any:
    """The output, by way of a callback that stores: it has no effect, and runs because its result is used."""
    gave = _take(output)
    traced = [array for array in gave.arrays if isinstance(array, jax.core.Tracer)]

    def look(passed: list[Any], *arrays: Any) -> list[Any]:
        store(*arrays)
        return passed

    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in traced]
    passed = iter(jax.pure_callback(look, shapes, traced, *arrays, vmap_method="sequential"))
    again = [next(passed) if isinstance(array, jax.core.Tracer) else array for array in gave.arrays]
    return _filled(gave.frame, iter(again))


def _store(key: int, path: Path, module: Any, given: Any, gave: Any, *arrays: Any) -> None:
    running = _RUNNING.get(key)
    if running is None:  # a compiled function has outlived the run that traced it
        return
    known = (
        array if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else np.asarray(array)
        for array in arrays
    )
    took, returned = _filled(given, known), _filled(gave, known)
    running.record.calls.append(Call(path, values_in(took), values_in(returned), took, module))


_KEYS = itertools.count()
_RUNNING: dict[int, _Recorder] = {}


# The shapes of weights from which on one program of a whole model costs less than one of each operation.
_SHAPES = 24


def _is_varied(arrays: Iterable[Any]) -> bool:
    return len({array.shape for array in arrays if isinstance(array, jax.Array)}) >= _SHAPES


def record_nnx(
    module: nnx.Module, watched: frozenset[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Record:
    """Run a copy of an nnx model, in the mode it is in.

    Operation by operation, each is compiled for each shape. A model of many shapes is compiled as a whole instead.
    """
    if _is_varied(leaf.value for leaf in read_flax(module).root.flat().values()):
        with _Recorder(watched) as recorder:
            graph, state = nnx.split(_recorded(module, recorder))
            leaves, structure = jax.tree.flatten(state)
            after: list[Any] = []

            def run(leaves: list[Any], args: Any, kwargs: Any) -> Any:
                model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
                output = model(*args, **kwargs)
                left, now = nnx.split(model)
                changed, shape = jax.tree.flatten(now)
                after[:] = [left, shape]
                return output, changed

            result = recorder.run_whole(run, leaves, args, dict(kwargs))
        if result is not None:
            output, changed = result
            return _finished(recorder, output, nnx.merge(after[0], jax.tree.unflatten(after[1], changed)))
    with _Recorder(watched) as recorder:
        copy = _recorded(module, recorder)
        output = recorder.run(copy, *args, **kwargs)
    return _finished(recorder, output, copy)


def _recorded(module: nnx.Module, recorder: _Recorder) -> Any:
    """A copy of a model whose modules record."""
    copy = nnx.clone(module)
    for node in read_flax(copy).root.walk():
        part = node.module
        if node.path in recorder.watched and callable(part) and not hasattr(part, _WHERE):
            # Past nnx's own __setattr__. The pair is static to nnx, and new in every run, so nothing that was
            # compiled for another run is taken for this one.
            object.__setattr__(part, _WHERE, (recorder.key, node.path))
            object.__setattr__(part, "__class__", _recording(type(part)))
    return copy


def _finished(recorder: _Recorder, output: Any, copy: Any) -> Record:
    recorder.record.output = values_in(output)
    leaves = read_flax(copy).root.flat().values()
    recorder.record.state = {leaf.path: leaf.value for leaf in leaves if leaf.collection == "batch_stats"}
    return recorder.record


_WHERE = "_torchjax_bridge_recorded_as"
_CLASSES: dict[type, type] = {}


def _recording(kind: type) -> type:
    """The class with a ``__call__`` that records; one for each class, since nnx keeps every class it sees."""
    if kind not in _CLASSES:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            key, path = getattr(self, _WHERE)
            running = _RUNNING.get(key)
            given = _take((args, kwargs))
            try:
                output = kind.__call__(self, *args, **kwargs)
            except MODEL_ERRORS:
                if running is not None:
                    running.note(path, given, ())
                raise
            if running is not None:
                running.note(path, given, output)
            return output

        names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _CLASSES[kind] = type(kind)(kind.__name__, (kind,), names)
    return _CLASSES[kind]


def record_linen(
    module: flax.linen.Module,
    variables: Mapping[str, Any],
    watched: frozenset[Path],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    training: bool,
) -> Record:
    """Run a linen model; its dropouts, if any are active, draw from streams of our own.

    Its state can be written to in training alone: a model may take its mode from that
    (``is_mutable_collection``). One that writes to it all the same runs once more, and may.
    """
    state = [name for name in variables if name != "params"]
    writable: list[str] = []
    rngs = rng_streams()
    running: list[Path] = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = linen_path(context.module)
        if context.method_name == "__call__":
            recorder.record.layers.setdefault(path, flax_layer(context.module))
        if context.method_name != "__call__" or path not in watched or path in running:
            return call(*args, **kwargs)
        bare = context.module.clone(parent=None)
        given = _take((args, kwargs))
        running.append(path)  # a subclass calls its parent's __call__, which is no call of the layer's own
        try:
            output = call(*args, **kwargs)
        except MODEL_ERRORS:
            recorder.note(path, given, (), bare)
            raise
        finally:
            running.remove(path)
        return recorder.note(path, given, output, bare)

    def run(variables: Any, args: Any, kwargs: Any) -> Any:
        return module.apply(variables, *args, rngs=rngs, mutable=writable, **kwargs)

    ways = ("whole", "effects", "values") if _is_varied(jax.tree.leaves(variables)) else ("effects", "values")
    for writable, way in itertools.product([state] if training else [[], state], ways):  # noqa: B007
        with (
            _Recorder(watched, effects=way != "values") as recorder,
            flax.linen.intercept_methods(look),
        ):
            start = recorder.run_whole if way == "whole" else recorder.run
            result = start(run, variables, args, dict(kwargs))
        error = recorder.record.error
        if error is None or (
            way != "whole"
            and not isinstance(error, flax.errors.ModifyScopeVariableError)
            and _CONSTANCY not in str(error)
        ):
            break
    if result is not None:
        output, state = result
        recorder.record.output = values_in(output)
        recorder.record.state = {leaf.path: leaf.value for leaf in _changed(state)}
    return recorder.record


_CONSTANCY = "broadcasted variable has a data dependency on the scan body"


def _changed(state: Mapping[str, Any]) -> Iterable[FlaxLeaf]:
    statistics = {name: tree for name, tree in state.items() if name == "batch_stats"}
    return read_flax({"params": {}, **statistics}).root.flat().values()
