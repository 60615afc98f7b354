"""A run of a Flax model, recorded: nnx through a copy whose modules record, linen through ``nn.intercept_methods``.

``_recorder`` takes the calls in. The caller's module and variables are left as they were.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.errors
import flax.linen
import jax
from flax import nnx

from torchjax_bridge.exchange import Path

from ..settings import flax_layer
from ..trees import FlaxLeaf, linen_path, read_flax, rng_streams
from ._record import MODEL_ERRORS, Record
from ._recorder import RUNNING, Recorder, take_apart
from ._values import values_in

__all__ = ["record_linen", "record_nnx"]


# With so many shapes of weights, compiling the whole model once costs less than compiling every operation.
_MANY_SHAPES = 24


def _has_many_shapes(arrays: Iterable[Any]) -> bool:
    return len({array.shape for array in arrays if isinstance(array, jax.Array)}) >= _MANY_SHAPES


def record_nnx(
    module: nnx.Module, watched: frozenset[Path], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Record:
    """Run a copy of an nnx model, in the mode it is in.

    Run operation by operation, JAX compiles each operation for each shape. A model of many shapes is compiled
    as one program instead.
    """
    if _has_many_shapes(leaf.value for leaf in read_flax(module).root.flat().values()):
        with Recorder(watched) as recorder:
            graph, state = nnx.split(_recording_copy(module, recorder))
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
            return _record_of(recorder, output, nnx.merge(after[0], jax.tree.unflatten(after[1], changed)))
    with Recorder(watched) as recorder:
        copy = _recording_copy(module, recorder)
        output = recorder.run(copy, *args, **kwargs)
    return _record_of(recorder, output, copy)


def _recording_copy(module: nnx.Module, recorder: Recorder) -> Any:
    """A copy of a model whose modules record."""
    copy = nnx.clone(module)
    for node in read_flax(copy).root.walk():
        part = node.module
        if node.path in recorder.watched and callable(part) and not hasattr(part, _RECORDED_AS):
            # Bypasses nnx's __setattr__. The pair is static to nnx and new in every run, so no program that was
            # compiled for another run is reused.
            object.__setattr__(part, _RECORDED_AS, (recorder.key, node.path))
            object.__setattr__(part, "__class__", _recording_class(type(part)))
    return copy


def _record_of(recorder: Recorder, output: Any, copy: Any) -> Record:
    recorder.record.output = values_in(output)
    leaves = read_flax(copy).root.flat().values()
    recorder.record.state = {leaf.path: leaf.value for leaf in leaves if leaf.collection == "batch_stats"}
    return recorder.record


_RECORDED_AS = "_torchjax_bridge_recorded_as"
_CLASSES: dict[type, type] = {}


def _recording_class(kind: type) -> type:
    """A subclass whose ``__call__`` records; made once for each class, since nnx keeps every class it sees."""
    if kind not in _CLASSES:

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            key, path = getattr(self, _RECORDED_AS)
            running = RUNNING.get(key)
            given = take_apart((args, kwargs))
            try:
                output = kind.__call__(self, *args, **kwargs)
            except MODEL_ERRORS:
                if running is not None:
                    running.record_call(path, given, ())
                raise
            if running is not None:
                running.record_call(path, given, output)
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
    """Run a linen model. Active dropouts draw from random streams of our own.

    The state is mutable in training only: a model may take its mode from that (``is_mutable_collection``). A
    model that writes to it in evaluation runs again, with a mutable state.
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
        given = take_apart((args, kwargs))
        running.append(path)  # a subclass may call its parent's __call__: not a further call
        try:
            output = call(*args, **kwargs)
        except MODEL_ERRORS:
            recorder.record_call(path, given, (), bare)
            raise
        finally:
            running.remove(path)
        return recorder.record_call(path, given, output, bare)

    def run(variables: Any, args: Any, kwargs: Any) -> Any:
        return module.apply(variables, *args, rngs=rngs, mutable=writable, **kwargs)

    ways = (
        ("whole", "effects", "values")
        if _has_many_shapes(jax.tree.leaves(variables))
        else ("effects", "values")
    )
    for writable, way in itertools.product([state] if training else [[], state], ways):  # noqa: B007
        with (
            Recorder(watched, effects=way != "values") as recorder,
            flax.linen.intercept_methods(look),
        ):
            start = recorder.run_whole if way == "whole" else recorder.run
            result = start(run, variables, args, dict(kwargs))
        error = recorder.record.error
        if error is None or (
            way != "whole"
            and not isinstance(error, flax.errors.ModifyScopeVariableError)
            and _SCAN_ERROR not in str(error)
        ):
            break
    if result is not None:
        output, state = result
        recorder.record.output = values_in(output)
        recorder.record.state = {leaf.path: leaf.value for leaf in _statistics_in(state)}
    return recorder.record


_SCAN_ERROR = "broadcasted variable has a data dependency on the scan body"


def _statistics_in(state: Mapping[str, Any]) -> Iterable[FlaxLeaf]:
    statistics = {name: tree for name, tree in state.items() if name == "batch_stats"}
    return read_flax({"params": {}, **statistics}).root.flat().values()
