"""The values that parameters and buffers have in a new model, as constructor trees.

A parameter starts as the author's code says; where that is not read, equal values stay what they are, and any other
are small random numbers of the port's choice. A buffer that ``forward`` never writes starts with its values, if
these are few or follow a rule.
"""

import ast
import math
from collections.abc import Mapping

import torch
from torch import nn

from torchjax_bridge.recording import Parameter

from ._author_numbers import Number
from ._author_starts import ABSENT, author_start, method_of
from ._author_tensors import Reading
from ._constants import constant_text, dtype_text, numbers_of
from ._constructors import Call, Column, Either, Items, Start, Text, Tree
from ._model import Model
from ._placed import Axes, RefusedError
from ._rewrites import may_be_rewritten

__all__ = ["KEY", "buffer_start", "chosen_starts", "parameter_start"]

KEY = "rngs.params()"
_FEW = 32  # elements; a longer list says nothing to a reader
_LARGEST = 2**24  # elements, among which a rule is looked for
_CHOSEN = Reading("normal", {"mean": Number.of(0.0), "std": Number.of(0.02)})


def parameter_start(model: Model, name: str, origin: Parameter, order: Axes) -> Start:
    """The variable of a parameter.

    Args:
        model: The whole translation.
        name: The attribute.
        origin: The parameter.
        order: The order of its axes in Flax.
    """
    tensor = origin.tensor.detach().permute(order)
    chosen = Start("nnx.Param(", [_drawn(_CHOSEN, _shape(tensor, name), name, tensor)], ")", is_chosen=True)
    made = _as_read(_read(model, origin), tensor, name, order)
    if made is None and (number := _only_value(tensor)) is not None:
        if isinstance(number, float):
            number = float(f"{number:.6g}")
        made = Call("jnp.full", [_shape(tensor, name), Column([number], "value", name)])
    return chosen if made is None else Start("nnx.Param(", [made], ")", fallback=chosen)


def buffer_start(model: Model, name: str, origin: Parameter, order: Axes, *, is_statistic: bool) -> Start:
    """The variable of a saved buffer.

    Args:
        model: The whole translation.
        name: The attribute.
        origin: The buffer.
        order: The order of its axes in Flax.
        is_statistic: Whether it belongs to a layer of torch's own.
    """
    tensor = origin.tensor.detach().permute(order)
    start, dtype = f"nnx.{'BatchStat' if is_statistic else 'Variable'}(", Text(dtype_text(tensor.dtype))

    def filled(number: complex) -> Tree:
        return Call("jnp.full", [_shape(tensor, name), Column([number], "value", name), dtype])

    zero: float = 0.0 if tensor.is_floating_point() or tensor.is_complex() else 0
    zeros = Start(start, [filled(zero)], ")", is_chosen=not is_statistic)
    if is_statistic:
        return Start(start, [filled(1.0)], ")", fallback=zeros) if name == "var" else zeros
    reading = _read(model, origin)
    is_unknown = origin.path in model.written_buffers or tensor.device.type == "meta"
    made: Tree | None = None
    if reading is not None and reading.kind == "full" and is_unknown:
        value = reading.numbers["value"].value
        made = filled(float(value) if isinstance(zero, float) else int(value))
    elif reading is not None and reading.kind in ("normal", "uniform"):
        made = _drawn(reading, _shape(tensor, name), name, tensor)
    elif not is_unknown:
        number = _only_value(tensor)
        made = _constant(tensor, name) if number is None else filled(number)
    return zeros if made is None else Start(start, [made], ")", fallback=zeros)


def chosen_starts(fields: Mapping[str, Tree]) -> dict[str, str]:
    """The attributes of a class whose values in a new model are the port's choice: ``parameter`` or ``buffer``."""
    found = {}
    for name, tree in fields.items():
        waiting = [tree]
        while waiting:
            inner = waiting.pop()
            if isinstance(inner, Start):
                if inner.is_chosen:
                    is_parameter = "nnx.Param(" in inner.start or "self.param(" in inner.start
                    found[name] = "parameter" if is_parameter else "buffer"
            elif isinstance(inner, Items):
                waiting += inner.items
            elif isinstance(inner, Either):
                waiting.append(inner.then)
    return found


def _shape(tensor: torch.Tensor, name: str) -> Column:
    return Column([tuple(tensor.shape)], "shape", name)


def _only_value(tensor: torch.Tensor) -> float | complex | None:
    """The number that every element is."""
    values = tensor.reshape(-1)
    if tensor.device.type == "meta" or not len(values) or not bool((values == values[0]).all()):
        return None
    found: float | complex = numbers_of(values[0])
    return found if tensor.dtype != torch.int64 or abs(found) < 2**31 else None


def _read(model: Model, origin: Parameter) -> Reading | None:
    """How the author's code starts a tensor, if nothing else in the model may write it after that."""
    path, kind = origin.path.rpartition(".")[0], type(origin.owner)
    if isinstance(origin.owner, nn.ParameterList):
        holder, _, name = path.rpartition(".")
        reading = author_start(model.modules[holder], name, int(origin.name))
        path = holder
    else:
        name, reading = origin.name, author_start(origin.owner, origin.name)
    if reading is None or may_be_rewritten(model.modules, path, name):
        return None
    if reading is not ABSENT:
        return reading
    if not isinstance(origin.owner, nn.Linear | nn.modules.conv._ConvNd) or method_of(
        kind, "reset_parameters"
    ):
        return None
    if origin.name == "weight":
        return Reading("scaled", {"scale": Number.of(1 / 3)}, ("fan_in", "uniform"))
    bound = 1 / math.sqrt(max(math.prod(origin.owner.weight.shape[1:]), 1))
    return Reading("uniform", {"low": Number.of(-bound), "high": Number.of(bound)})


def _as_read(reading: Reading | None, tensor: torch.Tensor, name: str, order: Axes) -> Tree | None:
    """The values that the author's code makes; None where they are not read."""
    if reading is None or (tensor.is_complex() and reading.kind not in ("full", "normal")):
        return None
    shape, rank = _shape(tensor, name), tensor.dim()
    if reading.kind == "full":
        value = reading.numbers["value"]
        return Call("jnp.full", [shape, Column([float(value.value)], "value", name, value.written)])
    if reading.kind in ("normal", "truncated", "uniform"):
        return _drawn(reading, shape, name, tensor)
    if reading.kind == "made":
        return _made(reading, tensor, name)
    if rank < 2:
        return None
    return _initialized(reading, shape, name, order)


def _drawn(reading: Reading, shape: Column, name: str, tensor: torch.Tensor) -> Tree:
    """Independent draws: ``std * jax.random.normal(key, shape)`` and the like."""

    def number(setting: str) -> Column:
        given = reading.numbers[setting]
        return Column([float(given.value)], setting, name, given.written)

    key, kind = Text(KEY), [Text("jnp.complex64")] if tensor.is_complex() else []
    if reading.kind == "uniform":
        ends: dict[str, Tree] = {"minval": number("low"), "maxval": number("high")}
        return Call("jax.random.uniform", [key, shape], ends, {"minval": 0.0, "maxval": 1.0})
    if reading.kind == "truncated":
        draws = Call("jax.random.truncated_normal", [key, number("lower"), number("upper"), shape])
    else:
        draws = Call("jax.random.normal", [key, shape, *kind])
    return Items(
        "", [number("mean"), Items("", [number("std"), draws], "", between=" * ")], "", between=" + "
    )


def _initialized(reading: Reading, shape: Column, name: str, order: Axes) -> Tree:
    """Draws that depend on the shape: ``initializers.he_uniform()(key, shape)`` and the like."""
    scale, rank = reading.numbers["scale"], len(order)
    column = Column([float(scale.value)], "scale", name, scale.written)
    args: list[Tree] = []
    places: dict[str, Tree] = {}
    if reading.kind == "orthogonal":
        function, args = "initializers.orthogonal", [column] if scale.value != 1 else []
        if rank > 2 and order.index(0) != rank - 1:
            places = {"column_axis": Text(str(order.index(0)))}
    else:
        fan, distribution = reading.words
        known = {(1.0, "fan_avg", "uniform"): "xavier_uniform", (2.0, "fan_in", "uniform"): "he_uniform"}
        function = known.get((float(scale.value), fan, distribution), "variance_scaling")
        function = f"initializers.{function}"
        if function.endswith("variance_scaling"):
            args = [column, Text(f'"{fan}"'), Text(f'"{distribution}"')]
        inner, outer = order.index(1), order.index(0)
        if (inner, outer) != (rank - 2, rank - 1) and (rank > 2 or fan != "fan_avg"):
            places = {"in_axis": Text(str(inner)), "out_axis": Text(str(outer))}
    return Items("", [Call(function, args, places), Items("(", [Text(KEY), shape], ")")], "", between="")


def _made(reading: Reading, tensor: torch.Tensor, name: str) -> Tree | None:
    """A regular table of the author's."""
    [text] = reading.words
    shape = tuple(tensor.shape)
    if not reading.shape:
        text, made_shape = f"{text}({', '.join(map(str, shape))})", shape
    else:
        made_shape = reading.shape
    if math.prod(made_shape) != tensor.numel():
        return None
    table = _tree(text, name)
    if made_shape != shape:
        table = _reshaped(table, _shape(tensor, name))
    scale, offset = (
        Column([n.value], setting, name, n.written)
        for setting, n in (
            (s, reading.numbers.get(s, Number.of(d))) for s, d in (("scale", 1.0), ("offset", 0.0))
        )
    )
    return Items("", [offset, Items("", [scale, table], "", between=" * ")], "", between=" + ")


def _constant(tensor: torch.Tensor, name: str) -> Tree | None:
    """The values of a tensor, if they are few or follow a rule."""
    if not tensor.numel() or (
        tensor.dtype == torch.int64 and tensor.device.type != "meta" and _is_wide(tensor)
    ):
        return None
    try:
        return _tree(constant_text(tensor, name, written_out=_FEW), name)
    except RefusedError:
        return None


def _is_wide(tensor: torch.Tensor) -> bool:
    return bool((tensor.abs() >= 2**31).any())


def _reshaped(tree: Tree, shape: Column) -> Tree:
    return Items("", [tree, Items(".reshape(", [shape], ")")], "", between="")


def _tree(text: str, name: str) -> Tree:
    """A call as a tree in which instances may differ in its numbers."""
    return _node(ast.parse(text, mode="eval").body, name, "size")


def _node(node: ast.expr, name: str, setting: str) -> Tree:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Call() as inner, attr=method), args=args, keywords=[]):
            given: list[Tree] = [_node(arg, name, "shape") for arg in args]
            return Items("", [_node(inner, name, setting), Items(f".{method}(", given, ")")], "", between="")
        case ast.Call(func=function, args=args, keywords=keywords):
            words = {k.arg or "": _node(k.value, name, k.arg or setting) for k in keywords}
            return Call(ast.unparse(function), [_node(arg, name, setting) for arg in args], words)
        case ast.Constant() | ast.Tuple() | ast.UnaryOp(operand=ast.Constant()):
            try:
                return Column([ast.literal_eval(node)], setting, name)
            except ValueError:
                pass
    return Text(ast.unparse(node))
