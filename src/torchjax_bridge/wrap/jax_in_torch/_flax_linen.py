"""The definition of a linen module with its variables.

The collection ``params`` holds the parameters. All other collections in the variables are buffers, and
mutable in every call. A name is the path within the collection: ``batch_stats/bn1/mean`` is ``bn1.mean``.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta, unfreeze
from flax.errors import InvalidRngError

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError, TransformError
from torchjax_bridge.exchange import from_jax_keypath, join_path

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

__all__ = ["open_linen"]


@dataclass(frozen=True)
class _Slot:
    path: tuple[Any, ...]
    name: str
    is_parameter: bool
    dtype: Any

    def widen(self, buffer: Any) -> Any:
        """The buffer for Flax: running statistics in the dtype in which they began, where linen computes them.

        ``module.to`` may have left the buffer fewer bits. The new value is rounded to those again.
        """
        narrower = buffer.dtype != self.dtype and jnp.promote_types(buffer.dtype, self.dtype) == self.dtype
        return buffer.astype(self.dtype) if narrower and self.path[0] == "batch_stats" else buffer


def open_linen(
    module: linen.Module, variables: Any, method: str, streams: Sequence[str]
) -> tuple[Definition, dict[str, jax.Array], dict[str, jax.Array]]:
    """The definition, the parameters and the buffers of a module with its variables."""
    title = type(module).__name__
    check_method(module, method)
    if variables is None:
        if module.scope is None:
            raise ArgumentError(
                f"{title} is a linen module, which holds no values. Pass its variables, for one those of "
                "module.init: as_torch_module(module, variables)."
            )
        module, variables = module.unbind()
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            f"the variables of {title} are {what_kind(variables)}; pass the dict of collections that "
            "module.init returns: {'params': ..., 'batch_stats': ...}."
        )
    tree = meta.unbox(unfreeze(dict(variables)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    slots: list[_Slot] = []
    parameters: dict[str, jax.Array] = {}
    buffers: dict[str, jax.Array] = {}
    for keypath, leaf in leaves:
        path = from_jax_keypath(keypath)
        collection, *rest = path
        if not rest:
            raise ArgumentError(
                f"'{collection}' of the variables is no collection of variables. Pass the dict of collections that "
                "module.init returns: {'params': ..., 'batch_stats': ...}."
            )
        name = join_path(split_name(str(part), title) for part in rest)
        if not isinstance(leaf, jax.Array) and not hasattr(leaf, "__array__"):
            raise ArgumentError(
                f"'{join_path(path)}' of the variables is {what_kind(leaf)}, not an array. Pass the "
                "variables themselves, not those of jax.eval_shape."
            )
        if name in parameters or name in buffers:
            raise ArgumentError(
                f"two collections of the variables hold '{name}', and torch knows one variable of a name. Leave "
                f"out '{collection}', or rename the variable."
            )
        array = jnp.asarray(leaf)
        (parameters if collection == "params" else buffers)[name] = array
        slots.append(_Slot(path, name, collection == "params", array.dtype))
    definition = _LinenDefinition(module, method, structure, tuple(slots), tuple(streams))
    return definition, parameters, buffers


class _LinenDefinition(Definition):
    def __init__(
        self,
        module: linen.Module,
        method: str,
        structure: Any,
        slots: tuple[_Slot, ...],
        streams: tuple[str, ...],
    ) -> None:
        self.title = type(module).__name__
        self.parameters = tuple(slot.name for slot in slots if slot.is_parameter)
        self.buffers = tuple(slot.name for slot in slots if not slot.is_parameter)
        self._module, self._method, self._slots = module, method, slots
        # Nested dicts, which can be pickled; a tree structure cannot.
        self._template = jax.tree_util.tree_unflatten(structure, range(len(slots)))
        self._collections = tuple(dict.fromkeys(str(s.path[0]) for s in slots if not s.is_parameter))
        self._stream_names = streams
        data = jax.random.key_data(jax.random.key(0)).shape
        self._streams = [(data, str(jax.random.key_impl(jax.random.key(0))))] * len(streams)
        self.words = len(streams) * data[0]

    def pure(self, training: bool, apart: frozenset[str] = frozenset()) -> Pure:
        if apart:
            raise TransformError(
                f"{self.title} is a linen module: its mode is an argument of its method and the same for "
                f"all its parts, but '{min(apart)}' is in another mode. Call train() or eval() on the whole "
                "module, or give the method an argument for that part."
            )
        module, slots = self._module, self._slots
        function = getattr(type(module), self._method)

        def call(
            words: Any, buffers: Arrays, parameters: Arrays, args: Any, kwargs: Any
        ) -> tuple[Any, dict[str, Any]]:
            given = {slot.name: slot.widen(buffers[slot.name]) for slot in slots if not slot.is_parameter}
            variables = self.restore(parameters, given)
            streams = keys_from_words(words, self._streams)
            switches: dict[str, Any] = mode_keywords(function, training, (module, *args), kwargs)
            apply = functools.partial(
                module.apply,
                variables,
                *args,
                mutable=list(self._collections) or False,
                method=function,
                **kwargs,
                **switches,
            )
            rngs = dict(zip(self._stream_names, streams, strict=True))
            try:
                result = apply(rngs=rngs)
            except InvalidRngError as err:
                raise _without_stream(self.title, apply, rngs, err) from err
            if not self._collections:
                return result, {}
            result, after = result
            changed = {}
            for slot in slots:
                if not slot.is_parameter:
                    new = _lookup(after, slot.path)
                    if new is not None and new is not given[slot.name]:
                        new = check_changed(slot.name, given[slot.name], new)
                        changed[slot.name] = new.astype(buffers[slot.name].dtype)
            return result, changed

        return call

    def restore(self, parameters: Arrays, buffers: Arrays) -> Any:
        def value(index: int) -> Any:
            slot = self._slots[index]
            return (parameters if slot.is_parameter else buffers)[slot.name]

        return jax.tree_util.tree_map(value, self._template)


def _without_stream(
    title: str, apply: Callable[..., Any], rngs: Mapping[str, Any], err: InvalidRngError
) -> ArgumentError:
    """The error for a module that draws from streams it was not given; it lists all that it needs."""
    given, names, last = ", ".join(map(repr, rngs)) or "none", list(rngs), str(err)
    while last and (missing := re.search(r'needs PRNG for "([^"]+)"', last)) and missing[1] not in names:
        names.append(missing[1])
        try:
            apply(rngs=dict.fromkeys(names, jax.random.key(0)))
        except InvalidRngError as another:
            last = str(another)
        else:
            last = ""
    if last:  # flax words its error differently, or a stream that was given is not passed on to a part
        return ArgumentError(
            f"{title} lacks a stream of random numbers: {err} It was given {given}. Pass the names of all its "
            "streams: as_torch_module(..., rngs=[...])."
        )
    wanted = " and ".join(map(repr, names[len(rngs) :]))
    return ArgumentError(
        f"{title} draws random numbers from {wanted}, and its streams are {given}. Pass the names of all: "
        f"as_torch_module(..., rngs={names!r})."
    )


def _lookup(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree
