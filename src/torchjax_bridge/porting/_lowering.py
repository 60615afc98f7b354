"""Turns the calls of one frame into statements of JAX code, and keeps for each value where it stands.

Knows layouts and names of values. ``operations`` knows torch's functions and ``_layers`` its layers.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from torchjax_bridge.recording import (
    Argument,
    Attribute,
    Constant,
    Dim,
    Expression,
    Fault,
    Frame,
    Node,
    Operation,
    Output,
    Parameter,
    Real,
    SizeOf,
    SourceLine,
    Value,
    tensors_of,
)

from ._attributes import attribute_text, is_inside
from ._body import Body, Statement
from ._constants import constant_name, constant_text, dtype_text, number_text, saving_code
from ._parameters import place_of
from ._placed import Axes, FollowsError, Placed, RefusedError, Several, channels_last, torch_order
from ._reserved import argument_name, attribute_name

__all__ = ["Lowering", "standard_order", "transposed"]

# What a translation may raise that does not expect these arguments.
_MISTAKES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    NotImplementedError,
    ArithmeticError,
)


class Lowering:
    """The translation of one frame.

    Attributes:
        body: What has been emitted.
        model: The whole model: other bodies, faults, the settings of the port.
        known: The values by their expressions.
        inside: The path of the module whose calls are translated: the frame's, or that of one that is code in it.
    """

    def __init__(self, model: Any, frame: Frame) -> None:
        self.model = model
        self.frame = frame
        self.inside = frame.path
        self.body = Body(frame, frame.inputs)
        self._places: dict[Value, Placed] = {}
        self.known: dict[str, tuple[Value, Placed]] = {}  # by expression

    # --- values ---------------------------------------------------------------------------------------------

    def at(self, value: Value) -> Placed:
        """Where a value stands."""
        if value not in self._places:
            self.set(value, self._origin(value))
        return self._places[value]

    def set(self, value: Value, placed: Placed) -> None:
        """Say where a value stands."""
        self._places[value] = placed
        self.known[placed.text] = value, placed
        if placed.text.isidentifier():
            self.body.axes[placed.text] = placed.order

    def _origin(self, value: Value) -> Placed:
        rank = len(value.shape)
        if isinstance(value.origin, Parameter):
            if not value.origin.is_saved:
                name = value.origin.name
                saving = saving_code(value.origin.path.rpartition(".")[0], name, f"part.{name}")
                text = self._constant(value.origin.tensor, f"'{value.origin.path}'", saving)
                return Placed(text, torch_order(rank))
            return self.parameter(value.origin)
        if isinstance(value.origin, Constant):
            if value.origin.tensor is None:
                return Placed("REFUSED", torch_order(rank))  # the recording says why
            named = constant_name(value.origin.tensor, self.model.modules)
            return Placed(self._constant(value.origin.tensor, *named), torch_order(rank))
        raise RefusedError("a value is read that no translated call made")

    def _constant(self, tensor: torch.Tensor, name: str, saving: str) -> str:
        """The values of a tensor that no ``state_dict`` holds; where they are spelled out, the port says so."""
        text = constant_text(tensor, name, saving)
        if "jnp.asarray(" in text and tensor.numel() > 1:
            self.model.constants[name] = None
        return text

    def parameter(self, origin: Parameter) -> Placed:
        """Where a parameter or buffer stands in the Flax model."""
        path = origin.path.rpartition(".")[0]
        name, order = place_of(origin)
        if not is_inside(self.frame.path, path):
            return Placed(f"self.{self._shared(origin, name, order)}[...]", order)
        self.model.note_read(origin)
        if isinstance(origin.owner, nn.Linear) and self.model.is_layer(path):
            self.model.flattened.setdefault(path, None)  # its rows are read in torch's order
        held = self.attribute(path)
        if isinstance(origin.owner, nn.ParameterList):
            return Placed(f"{held}[{name}][...]", order)
        if isinstance(origin.owner, nn.ParameterDict):
            return Placed(f"{held}[{name!r}][...]", order)
        return Placed(f"{held}.{attribute_name(name)}[...]", order)

    def _shared(self, origin: Parameter, name: str, order: Axes) -> str:
        """The attribute of this frame's module that is a parameter of a module outside of it."""
        model, base = self.model, self.frame.path
        if model.to == "linen":
            raise RefusedError(
                f"'{origin.path}' is read inside '{base}', which does not hold it, and layers of linen share no "
                "weight; port to nnx"
            )
        names = (full for full, owner in model.tied_parameters.items() if owner == origin.path)
        alias = next((full for full in names if is_inside(base, full)), origin.path)
        own = model.parameters[alias]
        child = alias.rpartition(".")[0].rpartition(".")[2]
        if own.owner is not self.frame.module:
            name = f"{attribute_name(child)}_{name}"
        elif place_of(own) != (name, order):
            name = attribute_name(own.name)
        model.share(base, name, origin.path)
        return name

    def read(self, tree: Any, order: Axes | None = None) -> str:
        """The expression of a value in an order of axes, or of a number.

        Args:
            tree: A value, or a number.
            order: By default the order in which the value stands; a flattened map is brought into torch's order.
        """
        if not isinstance(tree, Value):
            return self.number(tree)
        placed = self.in_torch_map_order(tree)
        if order is None or order == placed.order:
            return placed.text
        if (spread := self._unsqueezed(tree, order)) is not None:
            return spread
        axes = tuple(placed.order.index(axis) for axis in order)
        return transposed(placed.text, axes)

    def _unsqueezed(self, value: Value, order: Axes) -> str | None:
        """A value with a new axis of one element in another order: the axis is put where it is wanted."""
        made = value.origin
        if not isinstance(made, Node) or made.function.rpartition(".")[2] != "unsqueeze" or made.kwargs:
            return None
        whole, dim = made.args
        axis = int(dim) % len(value.shape)
        left = tuple(other - (other > axis) for other in order if other != axis)
        if self.at(whole).order != left or self.at(whole).map_axis is not None:
            return None
        text = f"jnp.expand_dims({self.at(whole).text}, {order.index(axis)})"
        self.set(value, Placed(self.variable(text, made.source), order))
        return self.at(value).text

    def in_torch_order(self, tree: Any) -> str:
        """The expression of a value with torch's order of axes."""
        return self.read(tree, torch_order(len(tree.shape)) if isinstance(tree, Value) else None)

    def in_torch_map_order(self, value: Value) -> Placed:
        """Where a value stands, after a flattened map in Flax's order has been brought into torch's."""
        placed = self.at(value)
        if placed.map_axis is None:
            return placed
        axis, (channels, *space) = placed.map_axis, placed.map_shape
        sizes = [f"{placed.text}.shape[{place}]" for place in range(placed.rank)]
        lead, rest, n = sizes[:axis], sizes[axis + 1 :], len(space)
        axes = (*range(axis), axis + n, *range(axis, axis + n), *range(axis + n + 1, placed.rank + n))
        grouped = f"{placed.text}.reshape({', '.join([*lead, *map(str, space), str(channels), *rest])})"
        count = str(channels * math.prod(space))
        text = f"{transposed(grouped, axes)}.reshape({', '.join([*lead, count, *rest])})"
        name = self.variable(text, SourceLine())
        self.set(value, Placed(name, placed.order))
        return self.at(value)

    def is_computed(self, value: Value) -> bool:
        """Whether a value is no parameter and no constant."""
        return not isinstance(value.origin, Parameter | Constant)

    # --- numbers --------------------------------------------------------------------------------------------

    def number(self, number: Any, kind: str = "an argument") -> str:
        """The expression of a number, a dtype, a string, or a tuple of numbers, which are of this kind."""
        if isinstance(number, Dim | Real):
            return self._expression(number.expression, number)
        if isinstance(number, torch.dtype):
            return dtype_text(number)
        if isinstance(number, Value):
            return self.read(number)
        if isinstance(number, tuple | list):
            items = [self.number(item, kind) for item in number]
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        if number is None or isinstance(number, bool | int | float | complex | str):
            return number_text(number)
        raise RefusedError(f"{kind} of type {type(number).__name__} has no counterpart")

    def _expression(self, expression: Expression, value: Any) -> str:
        plain = float(value) if isinstance(value, float) else int(value)
        match expression:
            case SizeOf(of, axis):
                placed = self.at(of)
                return f"{placed.text}.shape[{placed.place(axis)}]"
            case Argument(name):
                whole, bracket, rest = name.partition("[")
                return argument_name(whole) + bracket + rest
            case Output(of):
                return self.at(of).text
            case Attribute(path, name, index):
                if path != self.frame.path:
                    return self.number(plain)
                held = attribute_name(name)
                self.body.attributes.setdefault(held, _plain(vars(self.frame.module)[name]))
                return f"self.{held}" + ("" if index is None else f"[{index}]")
            case Operation("-", 0, right):
                return f"(-{self._term(right)})"
            case Operation(symbol, left, right):
                return f"({self._term(left)} {symbol} {self._term(right)})"
        return self.number(plain)

    def _term(self, expression: Expression) -> str:
        if isinstance(expression, Attribute) and expression.path != self.frame.path:
            value = vars(self.model.modules[expression.path])[expression.name]
            return self.number(_plain(value if expression.index is None else value[expression.index]))
        if isinstance(expression, int | float):
            return repr(expression)
        return self._expression(expression, 0)

    # --- statements -----------------------------------------------------------------------------------------

    def fresh(self) -> str:
        """A new variable, which gets the author's name later."""
        self.model.variables += 1
        return f"_v{self.model.variables}_"

    def variable(self, text: str, source: SourceLine, kind: str = "") -> str:
        """Bind an expression to a new variable; ``kind`` says what it is if it is no array."""
        name = self.fresh()
        kinds = {name: kind} if kind else {}
        self.body.statements.append(Statement((name,), name, text, source, kinds=kinds))
        return name

    def nowhere(self, rank: int) -> Placed:
        """The place of an array that no code reads, of which something else stands in the code."""
        self.model.variables += 1
        return Placed(f"self.nowhere{self.model.variables}", torch_order(rank))

    def bind(self, node: Node, made: Placed | Several | list[Placed]) -> None:
        """Say what a call became."""
        values = list(tensors_of(node.result))
        if isinstance(made, Placed):
            made = [made]
        if isinstance(made, list):
            for value, placed in zip(values, made, strict=False):
                self._check_rank(node, value, placed.order)
                if not placed.text.isidentifier() and not _is_path(placed.text):
                    placed = placed.with_text(self.variable(placed.text, node.source))
                self.set(value, placed)
            return
        names = [self.fresh() for _ in values]
        for value, name, order in zip(values, names, made.orders, strict=True):
            self._check_rank(node, value, order)
            self.set(value, Placed(name, order))
        target = f"({', '.join(names)},)"
        statement = Statement(tuple(names), target, made.text, node.source, items=made.items)
        self.body.statements.append(statement)

    def _check_rank(self, node: Node, value: Value, order: Axes) -> None:
        if sorted(order) != list(range(len(value.shape))):
            raise RefusedError(
                f"{node.function or node.path} gave {len(value.shape)} axes and its translation {order}"
            )

    # --- the frame ------------------------------------------------------------------------------------------

    def run(self, nodes: list[Node]) -> None:
        """Translate calls; one without translation is noted, and its results are placeholders."""
        for node in nodes:
            try:
                self.model.translate(self, node)
            except FollowsError:
                self._without_results(node)
            except RefusedError as err:
                self._refuse_call(node, str(err))
            except _MISTAKES as err:
                what = f"the translation of {node.function or node.path} fails ({type(err).__name__}: {err})"
                self._refuse_call(node, f"{what}, which is a mistake of the port; please report it")

    def _refuse_call(self, node: Node, reason: str) -> None:
        path = self.inside if node.module is None else node.path
        self.model.fault(Fault(reason, path, node.source))
        self._without_results(node)

    def _without_results(self, node: Node) -> None:
        """Put something in the place of what a call gives that has no translation."""
        for value in tensors_of(node.result):
            self.set(value, Placed(self.variable("REFUSED", node.source), torch_order(len(value.shape))))
            self.model.refused.add(value)

    def returned(self, item: Any) -> str:
        """The expression of what ``forward`` returns beside tensors."""
        if isinstance(item, np.ndarray):
            raise RefusedError(
                "forward returns an array of NumPy: return the tensor, and call numpy() on that"
            )
        return self.number(item, "a result")

    def refuse(self, reason: str, source: SourceLine, *, follows: bool = False) -> None:
        """Note a fault of this frame."""
        self.model.fault(Fault(reason, self.inside, source, follows=follows))

    def add_dropout(self, rate: float, together: tuple[int, ...] = ()) -> str:
        """The attribute of a new dropout layer, for a dropout that the author called as a function."""
        taken = {*self.frame.module._modules, *vars(self.frame.module), *self.body.dropouts}
        name = next(n for n in ("dropout", *(f"dropout{i}" for i in range(2, 1000))) if n not in taken)
        self.body.dropouts[name] = rate, together
        return name

    def attribute(self, path: str) -> str:
        """The expression of a module below this frame, or of the module itself."""
        return attribute_text(self.model, self.frame.path, path)


def transposed(text: str, axes: Axes) -> str:
    """A transposition of the emitted array."""
    moved = [place for place, axis in enumerate(axes) if place != axis]
    if not moved:
        return text
    if len(moved) == 2:
        return f"jnp.swapaxes({text}, {moved[0]}, {moved[1]})"
    return f"jnp.transpose({text}, {axes})"


def standard_order(value: Value) -> Axes:
    """How an input of the model comes in: images with channels last, everything else as in torch."""
    is_image = len(value.shape) == 4 and value.dtype is not None and value.dtype.is_floating_point
    return channels_last(4) if is_image else torch_order(len(value.shape))


def _plain(value: Any) -> Any:
    """A setting without its origin."""
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, Dim):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _is_path(text: str) -> bool:
    """Whether an expression is an attribute, or an item of one, and so costs nothing to repeat."""
    return all(character.isalnum() or character in "._[]'\"" for character in text)
