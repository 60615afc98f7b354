"""The definition of an nnx module: a graph for training, a graph for evaluation, and a slot for each value.

A value is a parameter if its Variable is an ``nnx.Param``, a stream of random numbers if it is an
``nnx.RngKey`` or ``nnx.RngCount``, and a buffer otherwise. Streams are given new keys at each call.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import join_path

from ._flax_definition import (
    Arrays,
    Definition,
    Pure,
    check_changed,
    check_method,
    keys_from_words,
    mode_keywords,
    split_name,
)

__all__ = ["open_nnx"]


@dataclass(frozen=True)
class _Slot:
    """One value of the module, and its place."""

    path: tuple[Any, ...]
    name: str
    kind: str
    """``"parameter"``, ``"buffer"``, ``"key"`` or ``"count"``."""
    variable: Any
    """The Variable, with a shape for its value; None for an array that is in no Variable."""
    shape: tuple[int, ...]
    """For a key, the shape of its data."""
    dtype: Any
    impl: Any = None
    """For a key, the name of its implementation; None for raw data."""

    def fill(self, value: Any) -> Any:
        if self.variable is None:
            return value
        variable = self.variable.replace(value)
        if self.kind == "buffer" and value.dtype != self.dtype:
            # module.to left the buffer fewer bits, so round what the module sets.
            hooks = variable.get_metadata().get("on_set_value", ())
            variable.set_metadata(on_set_value=(*(hooks if isinstance(hooks, tuple) else (hooks,)), _rounded))
        return variable


def open_nnx(
    module: nnx.Module, method: str
) -> tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]:
    """The definition, the parameters and the buffers of a module, which is not changed."""
    check_method(module, method)
    copy = nnx.clone(module)
    graphs = {}
    for training in (True, False):
        copy.train() if training else copy.eval()
        graphs[training], state = nnx.split(copy)
    values: dict[str, dict[str, jax.Array]] = {"parameter": {}, "buffer": {}}
    slots = []
    for path, variable in nnx.to_flat_state(state):
        slot, value = _slot(type(module).__name__, path, variable)
        slots.append(slot)
        if slot.kind in values:
            values[slot.kind][slot.name] = value
    return _NnxDefinition(type(module), method, graphs, tuple(slots)), values["parameter"], values["buffer"]


class _NnxDefinition(Definition):
    def __init__(self, kind: type, method: str, graphs: dict[bool, Any], slots: tuple[_Slot, ...]) -> None:
        self.title = kind.__name__
        self.parameters = tuple(slot.name for slot in slots if slot.kind == "parameter")
        self.buffers = tuple(slot.name for slot in slots if slot.kind == "buffer")
        self._method, self._graphs, self._slots = method, graphs, slots
        held = [slot.path for slot in slots if slot.kind in ("parameter", "buffer")]
        # The names of the torch modules: each holds a variable, or a module that does.
        self._parts = {join_path(map(str, path[:n])) for path in held for n in range(1, len(path))}
        self._streams = [(slot.shape, slot.impl) for slot in slots if slot.kind == "key"]
        self.words = sum(_size(shape) for shape, _ in self._streams)

    def pure(self, training: bool, apart: frozenset[str] = frozenset()) -> Pure:
        graph, slots, method = self._graphs[training], self._slots, self._method

        def call(
            words: Any, buffers: Arrays, parameters: Arrays, args: Any, kwargs: Any
        ) -> tuple[Any, dict[str, Any]]:
            keys = iter(keys_from_words(words, self._streams))
            flat = []
            for slot in slots:
                if slot.kind == "key":
                    value = next(keys)
                elif slot.kind == "count":
                    value = jnp.zeros(slot.shape, slot.dtype)
                else:
                    value = (parameters if slot.kind == "parameter" else buffers)[slot.name]
                flat.append((slot.path, slot.fill(value)))
            module = nnx.merge(graph, nnx.from_flat_state(flat))
            if apart:
                self._set_modes(module, training, apart)
            function = getattr(module, method)
            result = function(*args, **kwargs, **mode_keywords(function, training, args, kwargs))
            after = dict(nnx.to_flat_state(nnx.state(module)))
            changed = {}
            for slot in slots:
                if slot.kind == "buffer" and slot.path in after:
                    new = _value(after[slot.path])
                    if new is not buffers[slot.name]:
                        changed[slot.name] = check_changed(slot.name, buffers[slot.name], new)
            return result, changed

        return call

    def _set_modes(self, module: nnx.Module, training: bool, apart: frozenset[str]) -> None:
        """Give each part the mode of the torch module of its name, or of the nearest parent that torch has."""
        # Parents first, because setting a part sets its children.
        for path, part in sorted(nnx.iter_modules(module), key=lambda found: len(found[0])):
            names = [join_path(map(str, path[:depth])) for depth in range(len(path), 0, -1)]
            name = next((name for name in names if name in self._parts), None)
            part.train() if training is (name not in apart) else part.eval()

    def restore(self, parameters: Arrays, buffers: Arrays) -> Any:
        flat = []
        for slot in self._slots:
            if slot.kind == "key":
                data = jnp.zeros(slot.shape, jnp.uint32)
                value = data if slot.impl is None else jax.random.wrap_key_data(data, impl=slot.impl)
            elif slot.kind == "count":
                value = jnp.zeros(slot.shape, slot.dtype)
            else:
                value = (parameters if slot.kind == "parameter" else buffers)[slot.name]
            flat.append((slot.path, slot.fill(value)))
        return nnx.merge(self._graphs[False], nnx.from_flat_state(flat))


def _slot(title: str, path: tuple[Any, ...], variable: Any) -> tuple[_Slot, Any]:
    name = join_path(split_name(str(part), title) for part in path)
    value = _value(variable)
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ArgumentError(
            f"'{name}' of {title} has a shape and no value: the module is abstract. Pass one with values, for "
            "one from torchjax_bridge.to_flax."
        )
    if not isinstance(value, jax.Array | int | float | complex) and not hasattr(value, "__array__"):
        raise ArgumentError(
            f"'{name}' of {title} holds {what_kind(value)}, and only arrays become torch parameters "
            "and buffers. Keep other values in plain attributes; what sow left in the module, take out with "
            "nnx.pop(module, nnx.Intermediate)."
        )
    kept = None
    if isinstance(variable, nnx.Variable):
        kept = variable.replace(jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)))
    if isinstance(variable, nnx.RngKey):
        if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return _Slot(path, name, "key", kept, value.shape, value.dtype), value
        data, impl = jax.random.key_data(value), str(jax.random.key_impl(value))
        return _Slot(path, name, "key", kept, data.shape, data.dtype, impl), value
    if isinstance(variable, nnx.RngCount):
        return _Slot(path, name, "count", kept, jnp.shape(value), jnp.result_type(value)), value
    value = jnp.asarray(value)
    kind = "parameter" if isinstance(variable, nnx.Param) else "buffer"
    return _Slot(path, name, kind, kept, value.shape, value.dtype), value


def _rounded(variable: Any, value: Any) -> Any:
    """The value that the module sets, in the dtype of the variable."""
    return jnp.asarray(value, variable.get_raw_value().dtype)


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
