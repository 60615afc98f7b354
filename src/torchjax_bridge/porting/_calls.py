"""The calls of modules: which become calls of a class, which are code where they stand, which call a part.

An argument or a result changes its order of axes where the class would take it otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from torchjax_bridge.recording import Dim, Frame, Node, Value, tensors_of

from ._argument_trees import has_dict, parts_of, pattern, takes, tree_text
from ._attributes import is_container
from ._body import Body, Statement
from ._constructors import Code
from ._layers import is_layer
from ._lowering import Lowering
from ._names import VARIABLE
from ._parts import Part
from ._placed import Axes, Placed, RefusedError, channels_last, torch_order
from ._reserved import argument_name
from ._sequences import function_text, is_chain
from ._statements import canonical

__all__ = ["call_module", "call_part", "is_function"]


def is_function(module: nn.Module) -> bool:
    """Whether a module is one of torch's own without weights or children, which is code where it is called."""
    return (
        type(module).__module__.startswith("torch.nn")
        and not is_layer(module)
        and next(module.parameters(), None) is None
        and next(module.buffers(), None) is None
        and not module._modules
        and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    )


def call_part(lowering: Lowering, node: Node, part: Part) -> None:
    """Emit the call of a part that is not looked into."""
    lowering.model.called_layers.add(node.path)

    def text(tree: Any) -> str:
        return tree_text(
            tree, lambda value: lowering.read(value, part.order(len(value.shape))), lowering.number
        )

    given = [*map(text, node.args), *(f"{name}={text(tree)}" for name, tree in node.kwargs.items())]
    places = [Placed("", part.order(len(value.shape))) for value in tensors_of(node.result)]
    if not places:
        raise RefusedError(f"'{node.path}' returns no tensor, and is translated or kept as one call")
    _results(lowering, node, places, f"{lowering.attribute(node.path)}({', '.join(given)})")


def call_module(lowering: Lowering, node: Node, frame: Frame) -> None:
    """Emit what the call of a module with a frame of its own becomes.

    Raises:
        RefusedError: The module does something else than in an earlier call, or is given what no argument names.
    """
    model = lowering.model
    inside = [value for _, tree in frame.inputs for value in tensors_of(tree)]
    outside = [value for _, tree in node.named for value in tensors_of(tree)]
    if len(inside) != len(outside):
        raise RefusedError(f"'{node.path}' is given tensors that the signature of its forward does not name")
    model.outer.update(
        (value, model.outer.get(given, given)) for value, given in zip(inside, outside, strict=True)
    )
    is_sequential = is_container(node.module, nn.Sequential)
    passes = frame.path not in model.active and isinstance(frame.result, Value)
    if is_function(frame.module) or (passes and not is_sequential):
        _call_function(lowering, node, frame, inside, outside)
        return
    places = [lowering.at(value) for value in outside]
    if not (is_sequential or is_container(lowering.frame.module, nn.Sequential)):
        places = [lowering.in_torch_map_order(value) for value in outside]
    earlier = _earlier(model, frame)
    orders = [place.order for place in places] if earlier is None else earlier.orders
    if earlier is None:
        orders = [_taken_order(v, order, frame) for v, order in zip(inside, orders, strict=True)]
    texts = {
        value: place.text if place.map_axis is not None else lowering.read(given, order)
        for value, given, place, order in zip(inside, outside, places, orders, strict=True)
    }
    inner = {
        value: Placed("", order, place.map_axis, place.map_shape)
        for value, place, order in zip(inside, places, orders, strict=True)
    }
    body = model.lower(frame, inner)
    if is_sequential and not is_chain(body):
        model.own_sequentials.add(frame.path)
    known = model.bodies.setdefault(frame.path, body)
    if canonical(known) == canonical(body):
        call = f"{lowering.attribute(frame.path)}({', '.join(_arguments(lowering, frame, texts))})"
        _results(lowering, node, body.result_places, call)
    elif _holds_nothing(frame.module):  # as a table of angles for each kind of attention
        _inline(lowering, node, frame, inside, outside)
    else:
        raise RefusedError(f"'{frame.path}' is called again and then does something else")


def _call_function(
    lowering: Lowering, node: Node, frame: Frame, inside: list[Value], outside: list[Value]
) -> None:
    """The code of a module without weights, or the call of one that the class is given."""
    model = lowering.model
    if node.path in model.given_functions and _call_given(lowering, node, frame, inside, outside):
        return
    before = len(lowering.body.statements)
    given = lowering.at(outside[0]).text if len(outside) == 1 else ""
    _inline(lowering, node, frame, inside, outside)
    if is_container(lowering.frame.module, nn.Sequential) and isinstance(node.result, Value):
        made, result = lowering.body.statements[before:], lowering.at(node.result).text
        function = function_text(given, made, result)
        lowering.body.functions[node.path.rpartition(".")[2]] = function, given, result
        if "self." in function:
            model.own_sequentials.add(lowering.frame.path)


def _earlier(model: Any, frame: Frame) -> Body | None:
    """The body of an earlier call of the module, in this mode or in the other, whose orders of axes hold."""
    bodies = [model.bodies.get(frame.path), model.first and model.first.bodies.get(frame.path)]
    ranks = [len(value.shape) for _, tree in frame.inputs for value in tensors_of(tree)]
    return next((body for body in bodies if body and [*map(len, body.orders)] == ranks), None)


def _inline(lowering: Lowering, node: Node, frame: Frame, inside: list[Value], outside: list[Value]) -> None:
    """The code of a module where it is called."""
    for value, given in zip(inside, outside, strict=True):
        lowering.set(value, lowering.at(given))
    for call in frame.nodes:
        call.source = node.source
    around, lowering.inside = lowering.inside, frame.path
    lowering.run(frame.nodes)
    lowering.inside = around
    leaves = Value, Dim
    for value, result in zip(tensors_of(node.result, leaves), tensors_of(frame.result, leaves), strict=True):
        if isinstance(result, Value):
            lowering.set(value, lowering.at(result))
        elif isinstance(value, Value):  # a size, which is a value outside
            lowering.set(value, Placed(lowering.number(result), ()))


def _call_given(
    lowering: Lowering, node: Node, frame: Frame, inside: list[Value], outside: list[Value]
) -> bool:
    """The call of a function that the class is given; False where what it does is code of the class."""
    statements = lowering.body.statements
    before, given = len(statements), lowering.at(outside[0])
    _inline(lowering, node, frame, inside, outside)
    made, result = statements[before:], lowering.at(node.result)
    function = function_text(given.text, made, result.text)
    if "self." in function or not VARIABLE.fullmatch(given.text) or result.order != given.order:
        del statements[before:]
        return False
    del statements[before:]
    lowering.body.callables[node.path.rpartition(".")[2]] = Code(function)
    call = lowering.variable(f"{lowering.attribute(node.path)}({given.text})", node.source)
    lowering.set(node.result, result.with_text(call))
    return True


def _arguments(lowering: Lowering, frame: Frame, texts: Mapping[Value, str]) -> list[str]:
    """The arguments of a call of an emitted class."""

    def text(tree: Any) -> str:
        return tree_text(tree, texts.__getitem__, lowering.number)

    found, by_name = [], False
    for name, tree in frame.inputs:
        if takes(tree):
            found.append(f"{argument_name(name)}={text(tree)}" if by_name else text(tree))
        else:
            by_name = True
    return found


def _results(lowering: Lowering, node: Node, places: Sequence[Placed], call: str) -> None:
    """Bind what a call of an emitted class returns; a number too is a variable."""
    if isinstance(node.result, Value):
        name = lowering.variable(call, node.source)
        lowering.set(node.result, Placed(name, places[0].order, places[0].map_axis, places[0].map_shape))
        return
    values, given = list(tensors_of(node.result)), iter(places)
    # A number is a value outside of the module that returns it, and none inside.
    orders = {value: () if value.dtype is None else next(given).order for value in values}
    if has_dict(node.result):
        for value, item in parts_of(lowering.variable(call, node.source, "dict"), node.result):
            lowering.set(value, Placed(item, orders[value]))
        return
    names = {value: lowering.fresh() for value in values}
    for value in values:
        lowering.set(value, Placed(names[value], orders[value]))
    kinds = {names[value]: "int" for value in values if value.dtype is None}
    lowering.body.statements.append(
        Statement(tuple(names.values()), pattern(node.result, names), call, node.source, kinds=kinds)
    )


def _holds_nothing(module: nn.Module) -> bool:
    """Whether a module has neither weights nor layers, so that what it does can stand anywhere."""
    return not (
        module._modules or module._parameters or set(module._buffers) - module._non_persistent_buffers_set
    )


def _taken_order(value: Value, order: Axes, frame: Frame) -> Axes:
    """The order in which a module takes a sequence: as the layer wants it that reads it first."""
    if len(value.shape) != 3:
        return order
    direct = [node.module for node in frame.nodes if value in tensors_of((node.args, node.kwargs))]
    if any(isinstance(module, nn.Linear | nn.LayerNorm) for module in direct):
        return torch_order(3)
    convolves = any(isinstance(module, nn.Conv1d | nn.ConvTranspose1d) for module in _readers(value, frame))
    return channels_last(3) if convolves else order


def _readers(value: Value, frame: Frame) -> Iterator[nn.Module]:
    """The layers that read a value as it is, also inside of the modules that it is given to."""
    for node in frame.nodes:
        if node.frame is None and node.module is not None and value in tensors_of((node.args, node.kwargs)):
            yield node.module
        elif node.frame is not None:
            inside = [inner for _, tree in node.frame.inputs for inner in tensors_of(tree)]
            outside = [given for _, tree in node.named for given in tensors_of(tree)]
            for inner, given in zip(inside, outside, strict=False):
                if given is value:
                    yield from _readers(inner, node.frame)
