"""What the ``forward`` of a model's own classes shows about maps: who reads a flattened one, of what one is made.

The source is read, never run, along its assignments: ``x = torch.flatten(self.conv(x), 1)`` and then ``self.fc(x)``
say that ``fc`` reads a flattened map, and how many channels it has, whatever the widths of other layers are; and
``self.up(self.fc(z).view(-1, 16, 2, 2))`` says that one is made of its output. Loops over lists of layers, methods,
and modules inside are followed; what else is met (a branch whose sides differ, a permutation, a function that is
not known) is not known from there on. A class without source shows nothing.

Owns no widths and asks nothing: that is for ``_questions``.
"""

import ast
import inspect
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from torch import nn

from ..trees import TorchNode
from ._abstract_value import (
    OWN,
    PLAIN,
    Seen,
    Value,
    agreed,
    all_features,
    flattened,
    part_of,
    pointed,
    together,
    viewed,
)
from ._modules import PER_FEATURE, TAKES_FEATURES, gives_channels, pools_to_a_point, takes_all, takes_channels
from ._source import (
    JOINS,
    KEEPS,
    KEEPS_FEATURES,
    flattens,
    is_a_module_of_functions,
    is_one,
    number,
    reduces_positions,
    source_of,
    turns,
)

__all__ = ["read_forwards"]


# Layers of torch's without tensors that make other channels of what they are given.
_REARRANGE = (
    nn.PixelShuffle, nn.PixelUnshuffle, nn.GLU, nn.Unfold, nn.Fold, nn.Unflatten, nn.ChannelShuffle,
    nn.CosineSimilarity, nn.PairwiseDistance,
)  # fmt: skip
_MAPS = (nn.modules.conv._ConvNd, nn.BatchNorm2d, nn.BatchNorm3d)
_KEEP_MAPS = (*PER_FEATURE, nn.GroupNorm, nn.InstanceNorm2d, nn.InstanceNorm3d)
_READS = (*TAKES_FEATURES, nn.MultiheadAttention, nn.Bilinear)
# Layers that give features on the last axis and no map, or tuples of such.
_GIVE_FEATURES = (nn.Embedding, nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
_DEEPEST = 40


def read_forwards(root: TorchNode) -> tuple[dict[int, int | None], dict[int, int], set[int]]:
    """The layers that read a flattened map, and the Linears of whose output a map is made, by the id of their node.

    Each with the channels of the map: 0 where they are not known, None for one that is read at a single position,
    which has no order to lose. And the layers that read nothing but features that lie as they do in Flax.
    """
    reading = _Reading(root)
    reading.call(root, [None])
    for node in root.walk():
        if id(node) not in reading.visited and _own_forward(node):
            reading.call(node, [None])
    return reading.found, reading.made, {place for place, plain in reading.plain.items() if plain}


def _own_forward(node: TorchNode) -> bool:
    """Whether it is no layer of torch's, nor derived from one that has weights."""
    if node.module is None or isinstance(node.module, (*_MAPS, *_READS)):
        return False
    return not str(getattr(_method(node.module, "forward"), "__module__", "")).startswith("torch.")


def _method(module: nn.Module, name: str) -> object:
    """What a class says a method is, as it stands there; None where the module has one of its own instead."""
    return None if name in vars(module) else inspect.getattr_static(type(module), name, None)


class _Reading:
    """Goes through a model as a call of it would."""

    def __init__(self, root: TorchNode) -> None:
        self.found: dict[int, int | None] = {}
        self.made: dict[int, int] = {}
        self.plain: dict[int, bool] = {}
        self.visited: set[int] = set()
        self._nodes = {id(node.module): node for node in root.walk() if node.module is not None}
        self._running: list[tuple[int, str]] = []
        self._known: dict[Hashable, Value] = {}

    def child(self, node: TorchNode, name: object) -> TorchNode | None:
        modules = node.module._modules if node.module is not None else {}
        return self._nodes.get(id(modules.get(str(name))))

    def children(self, node: TorchNode) -> list[TorchNode | None]:
        modules = node.module._modules.values() if node.module is not None else ()
        return [self._nodes.get(id(module)) for module in modules]

    # --- modules ---------------------------------------------------------------------------------------

    def call(self, node: TorchNode, given: Sequence[Value], named: dict[str, Value] | None = None) -> Value:
        """What a module gives, if it is given this."""
        self.visited.add(id(node))
        module, value = node.module, given[0] if given else None
        if not isinstance(value, Seen):
            value = None
        if _own_forward(node):
            return self.method(node, "forward", given, named or {})
        if isinstance(module, nn.Sequential):
            for child in self.children(node):
                value = self.call(child, [value]) if child is not None else None
            return value
        if isinstance(module, nn.Flatten):
            return flattened(value) if takes_all(module) else None
        if isinstance(module, nn.Unflatten):
            return viewed(value)
        if isinstance(module, _MAPS):
            if value is not None and value.kind == "viewed":
                self.made.update(dict.fromkeys(value.by, takes_channels(module)))
            return Seen("map", gives_channels(module))
        if isinstance(module, _READS):
            plain = value is not None and value.kind == "plain" and value.sure
            self.plain[id(node)] = plain and self.plain.get(id(node), True)
        if value is not None and value.kind == "flat" and isinstance(module, _READS):
            known = None if value.point else value.channels
            if self.found.get(id(node)) is None:  # what reads both has an order to lose
                self.found[id(node)] = known
        if isinstance(module, _KEEP_MAPS):
            return value
        if node.empty and not isinstance(module, _REARRANGE):
            return pointed(value, point=pools_to_a_point(module))
        return _given_by(node)

    def method(self, node: TorchNode, name: str, given: Sequence[Value], named: dict[str, Value]) -> Value:
        """What a method of the caller's own gives."""
        if node.module is None:
            return None
        method = _method(node.module, name)
        function, place = source_of(method), (id(node), name)
        if function is None or place in self._running or len(self._running) > _DEEPEST:
            return None
        parameters = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        holder = [] if isinstance(method, staticmethod) else [node]
        names: dict[str, Value] = {**dict(zip(parameters, [*holder, *given], strict=False)), **named}
        asked = (*place, *names.items())
        # Once for each input: a module in both sides of a branch, and one in it, would double the work.
        if asked not in self._known:
            self._running.append(place)
            frame = _Frame(self, names)
            try:
                frame.run(function.body)
                self._known[asked] = frame.result()
            except RecursionError:  # written too deep to be read
                self._known[asked] = None
            finally:
                self._running.pop()
        return self._known[asked]


def _given_by(node: TorchNode) -> Value:
    if isinstance(node.module, nn.Linear):
        return Seen("plain", by=frozenset({id(node)}))
    return PLAIN if isinstance(node.module, _GIVE_FEATURES) else None


class _Frame:
    """One function: what its names stand for, line after line."""

    def __init__(self, reading: _Reading, names: dict[str, Value]) -> None:
        self._reading = reading
        self._names = names
        self._returned: list[Value] = []

    def result(self) -> Value:
        """What the function returns, if every return gives the same."""
        return agreed(self._returned)

    def run(self, body: Iterable[ast.stmt]) -> None:
        """Read statements in order."""
        for statement in body:
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                seen = self._of(value)
                for target in targets:
                    self._bind(target, seen)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self._of(value))
            case ast.AugAssign(target=target, value=value):
                self._bind(target, together(self._of(target), self._operand(value)))
            case ast.Return(value=value):
                self._returned.append(self._of(value) if value is not None else None)
            case ast.Expr(value=value):
                self._of(value)
            case ast.With(body=body):
                self.run(body)
            case ast.If(test=test, body=body, orelse=other):
                self._of(test)
                self._either(body, other)
            case ast.Try(body=body, handlers=handlers, orelse=other, finalbody=last):
                self._either([*body, *other], *(handler.body for handler in handlers))
                self.run(last)
            case ast.For(target=target, iter=over, body=body):
                items = self._items(over)
                for item in items if items is not None else [None]:
                    self._bind(target, item)
                    if items is None:
                        self._either(body, [])
                    else:
                        self.run(body)
            case ast.While(body=body):
                self._either(body, [])

    def _either(self, *bodies: Sequence[ast.stmt]) -> None:
        """Read alternatives; a name on which they do not agree is not known afterwards."""
        before, after = dict(self._names), []
        for body in bodies:
            self._names = dict(before)
            self.run(body)
            if not (body and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                after.append(self._names)
        self._names = {
            name: agreed([names.get(name) for names in after]) for names in after for name in names
        } or before

    def _bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for one in target.elts:
                self._bind(one, part_of(value))
        elif isinstance(target, ast.Starred):
            self._bind(target.value, part_of(value))

    def _items(self, over: ast.expr) -> list[Value] | None:
        """The modules that a loop is over, if that can be seen."""
        holder = self._of(over)
        if isinstance(holder, TorchNode) and isinstance(holder.module, nn.ModuleList | nn.Sequential):
            return list(self._reading.children(holder))
        return None

    # --- expressions -----------------------------------------------------------------------------------

    def _of(self, expression: ast.expr) -> Value:
        match expression:
            case ast.Name(id=name):
                return self._names.get(name)
            case ast.NamedExpr(target=target, value=value):
                seen = self._of(value)
                self._bind(target, seen)
                return seen
            case ast.Attribute(value=value, attr=name):
                holder = self._of(value)
                if isinstance(holder, TorchNode):
                    return OWN if _is_own(holder, name) else self._reading.child(holder, name)
                return part_of(holder) if name == "values" else None  # of torch.max
            case ast.Subscript(value=value, slice=place):
                holder = self._of(value)
                if isinstance(holder, TorchNode):
                    return (
                        self._reading.child(holder, place.value) if isinstance(place, ast.Constant) else None
                    )
                return part_of(holder)
            case ast.BinOp(left=left, right=right):
                return together(self._operand(left), self._operand(right))
            case ast.ListComp(elt=one, generators=loops) | ast.GeneratorExp(elt=one, generators=loops):
                for loop in loops:
                    self._of(loop.iter)
                    self._bind(loop.target, None)
                self._of(one)
            case ast.IfExp(test=test, body=body, orelse=other):
                self._of(test)
                return agreed([self._of(body), self._of(other)])
            case ast.Call():
                return self._call(expression)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return all_features([self._of(part) for part in parts])
            case ast.Set() | ast.Dict() | ast.BoolOp() | ast.Compare() | ast.Await():
                for part in ast.iter_child_nodes(expression):
                    if isinstance(part, ast.expr):
                        self._of(part)
        return None

    def _operand(self, expression: ast.expr) -> Value:
        """What is known of one side of a sum or a product, which may be a number."""
        return OWN if isinstance(number(expression), int | float) else self._of(expression)

    def _call(self, call: ast.Call) -> Value:
        given = [self._of(value) for value in call.args]
        named = {word.arg: self._of(word.value) for word in call.keywords if word.arg is not None}
        if isinstance(callee := self._of(call.func), TorchNode):
            return self._reading.call(callee, given, named)
        if not isinstance(call.func, ast.Attribute | ast.Name):
            return None
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        arguments = [*call.args, *(word.value for word in call.keywords)]
        if isinstance(call.func, ast.Attribute):
            holder = self._of(call.func.value)
            if isinstance(holder, TorchNode):
                return self._reading.method(holder, name, given, named)
            if holder is not None or not is_a_module_of_functions(call.func.value):
                given, arguments = [holder, *given], [call.func.value, *arguments]
        value = given[0] if given and isinstance(given[0], Seen) else None
        if value == OWN and all(one in (OWN, None) for one in given) and name in _OF_OWN:
            return OWN
        if (value is None or value.kind == "map") and reduces_positions(name, arguments[1:], call.keywords):
            return PLAIN
        if value is not None and value.kind in ("map", "columns") and turns(name, arguments[1:], value.kind):
            return PLAIN
        if (
            value is not None
            and value.kind == "map"
            and name == "flatten"
            and _of_positions(call, arguments[1:])
        ):
            return replace(value, kind="columns")
        of_map = value is not None and value.kind == "map"
        if flattens(name, arguments[1:], call.keywords, of_map=of_map):
            return flattened(value)
        if name in ("view", "reshape", "unflatten"):
            return viewed(value, rows=len(arguments) == 4)
        if name in ("mm", "bmm", "matmul"):
            return part_of(given[1]) if len(given) > 1 and given[1] != OWN else None
        if name in KEEPS_FEATURES or name in JOINS or _swaps_batch(name, arguments[1:]):
            return part_of(given[0]) if given else None
        if name.rstrip("_") not in KEEPS:
            return None
        if name in ("add", "mul", "sub", "div") and len(given) > 1:
            return together(*given[:2])
        return pointed(value, point=name.startswith("adaptive_") and all(map(is_one, arguments[1:2])))


# What makes of a parameter only what is one.
_OF_OWN = frozenset(
    ("expand", "expand_as", "repeat", "unsqueeze", "view", "reshape", "to", "type_as", "float")
)


def _is_own(node: TorchNode, name: str) -> bool:
    """Whether an attribute of a module is a parameter, a buffer or a number."""
    module = node.module
    if module is None:
        return False
    tensors = {**module._parameters, **module._buffers}
    return tensors.get(name) is not None or isinstance(vars(module).get(name), int | float)


def _of_positions(call: ast.Call, places: Sequence[ast.expr]) -> bool:
    """Whether a call flattens all axes behind the channels."""
    said = {word.arg: number(word.value) for word in call.keywords}
    start = said.get("start_dim", number(places[0]) if places else None)
    return start == 2 and said.get("end_dim", -1) == -1 and len(places) < 2


def _swaps_batch(name: str, axes: Sequence[ast.expr]) -> bool:
    """Whether a call turns (N, L, C) into (L, N, C)."""
    return name in ("transpose", "swapaxes") and sorted(map(number, axes), key=str) == [0, 1]
