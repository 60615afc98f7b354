"""Abstract interpretation of a model's ``forward``: which layers read flattened maps, and which make maps.

The source is read and never run. ``x = torch.flatten(self.conv(x), 1)``, followed by ``self.fc(x)``, shows
that ``fc`` reads a flattened map, and how many channels it has. ``self.up(self.fc(z).view(-1, 16, 2, 2))``
shows that the output of ``fc`` becomes a map. The interpreter follows methods, submodules and loops over
lists of layers. A value becomes unknown after anything else: branches that differ, a permutation, an unknown
function. A class without source shows nothing.

Knows nothing about widths; ``_questions`` asks the questions.
"""

import ast
import inspect
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from torch import nn

from ..trees import TorchNode
from ._abstract_value import (
    CONSTANT,
    PLAIN,
    AbstractTensor,
    AbstractValue,
    concatenated,
    elementwise,
    flattened,
    join,
    part_of,
    pooled,
    viewed,
)
from ._modules import PER_FEATURE, TAKES_FEATURES, gives_channels, pools_to_a_point, takes_all, takes_channels
from ._source import (
    JOINS,
    KEEPS,
    KEEPS_FEATURES,
    flattens,
    is_function_namespace,
    is_one,
    literal,
    moves_channels_last,
    reduces_positions,
    source_of,
)

__all__ = ["interpret_forwards"]


# Torch layers without tensors that change the channels.
_CHANGE_CHANNELS = (
    nn.PixelShuffle, nn.PixelUnshuffle, nn.GLU, nn.Unfold, nn.Fold, nn.Unflatten, nn.ChannelShuffle,
    nn.CosineSimilarity, nn.PairwiseDistance,
)  # fmt: skip
_MAPS = (nn.modules.conv._ConvNd, nn.BatchNorm2d, nn.BatchNorm3d)
_KEEP_MAPS = (*PER_FEATURE, nn.GroupNorm, nn.InstanceNorm2d, nn.InstanceNorm3d)
_READS = (*TAKES_FEATURES, nn.MultiheadAttention, nn.Bilinear)
# Layers whose outputs, or tuples of outputs, are features on the last axis and no maps.
_GIVE_FEATURES = (nn.Embedding, nn.MultiheadAttention, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)
_DEEPEST = 40


def interpret_forwards(root: TorchNode) -> tuple[dict[int, int | None], dict[int, int], set[int]]:
    """Which layers read flattened maps, which Linears' outputs become maps, and which layers read plain features.

    All by the id of the node. The first two give the channels of the map: 0 where they are not known, None for a
    map of a single position, which has no order to lose.
    """
    interpreter = _Interpreter(root)
    interpreter.call_module(root, [None])
    for node in root.walk():
        if id(node) not in interpreter.visited and _has_own_forward(node):
            interpreter.call_module(node, [None])
    plain = {place for place, plain in interpreter.reads_plain.items() if plain}
    return interpreter.flat_readers, interpreter.map_sources, plain


def _has_own_forward(node: TorchNode) -> bool:
    """Whether its class is neither torch's nor derived from a torch layer with weights."""
    if node.module is None or isinstance(node.module, (*_MAPS, *_READS)):
        return False
    return not str(getattr(_method(node.module, "forward"), "__module__", "")).startswith("torch.")


def _method(module: nn.Module, name: str) -> object:
    """The method as its class defines it; None where the instance overrides it."""
    return None if name in vars(module) else inspect.getattr_static(type(module), name, None)


class _Interpreter:
    """Interprets calls of modules and methods, and records which layers read and make maps."""

    def __init__(self, root: TorchNode) -> None:
        self.flat_readers: dict[int, int | None] = {}
        self.map_sources: dict[int, int] = {}
        self.reads_plain: dict[int, bool] = {}
        self.visited: set[int] = set()
        self._nodes = {id(node.module): node for node in root.walk() if node.module is not None}
        self._running: list[tuple[int, str]] = []
        self._results: dict[Hashable, AbstractValue] = {}

    def child(self, node: TorchNode, name: object) -> TorchNode | None:
        modules = node.module._modules if node.module is not None else {}
        return self._nodes.get(id(modules.get(str(name))))

    def children(self, node: TorchNode) -> list[TorchNode | None]:
        modules = node.module._modules.values() if node.module is not None else ()
        return [self._nodes.get(id(module)) for module in modules]

    # --- modules ---------------------------------------------------------------------------------------

    def call_module(
        self, node: TorchNode, args: Sequence[AbstractValue], kwargs: dict[str, AbstractValue] | None = None
    ) -> AbstractValue:
        """The output of a module."""
        self.visited.add(id(node))
        module, value = node.module, args[0] if args else None
        if not isinstance(value, AbstractTensor):
            value = None
        if _has_own_forward(node):
            return self.call_method(node, "forward", args, kwargs or {})
        if isinstance(module, nn.Sequential):
            for child in self.children(node):
                value = self.call_module(child, [value]) if child is not None else None
            return value
        if isinstance(module, nn.Flatten):
            return flattened(value) if takes_all(module) else None
        if isinstance(module, nn.Unflatten):
            return viewed(value)
        if isinstance(module, _MAPS):
            if value is not None and value.kind == "viewed":
                self.map_sources.update(dict.fromkeys(value.linears, takes_channels(module)))
            return AbstractTensor("map", gives_channels(module))
        if isinstance(module, _READS):
            plain = value is not None and value.kind == "plain" and value.sure
            self.reads_plain[id(node)] = plain and self.reads_plain.get(id(node), True)
        if value is not None and value.kind == "flat" and isinstance(module, _READS):
            known = None if value.point else value.channels
            # A layer that reads a larger map as well has an order to lose.
            if self.flat_readers.get(id(node)) is None:
                self.flat_readers[id(node)] = known
        if isinstance(module, _KEEP_MAPS):
            return value
        if node.empty and not isinstance(module, _CHANGE_CHANNELS):
            return pooled(value, point=pools_to_a_point(module))
        return _output_of(node)

    def call_method(
        self, node: TorchNode, name: str, args: Sequence[AbstractValue], kwargs: dict[str, AbstractValue]
    ) -> AbstractValue:
        """The result of a method that the caller wrote."""
        if node.module is None:
            return None
        method = _method(node.module, name)
        function, place = source_of(method), (id(node), name)
        if function is None or place in self._running or len(self._running) > _DEEPEST:
            return None
        parameters = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
        holder = [] if isinstance(method, staticmethod) else [node]
        names: dict[str, AbstractValue] = {**dict(zip(parameters, [*holder, *args], strict=False)), **kwargs}
        call = (*place, *names.items())
        # Cached, because nested modules in both sides of a branch would double the work at each level.
        if call not in self._results:
            self._running.append(place)
            frame = _Frame(self, names)
            try:
                frame.run(function.body)
                self._results[call] = frame.result()
            except RecursionError:  # nested too deeply
                self._results[call] = None
            finally:
                self._running.pop()
        return self._results[call]


def _output_of(node: TorchNode) -> AbstractValue:
    if isinstance(node.module, nn.Linear):
        return AbstractTensor("plain", linears=frozenset({id(node)}))
    return PLAIN if isinstance(node.module, _GIVE_FEATURES) else None


class _Frame:
    """One call of a function: executes its statements on abstract values."""

    def __init__(self, interpreter: _Interpreter, names: dict[str, AbstractValue]) -> None:
        self._interpreter = interpreter
        self._names = names
        self._returned: list[AbstractValue] = []

    def result(self) -> AbstractValue:
        """The join of all returns."""
        return join(self._returned)

    def run(self, body: Iterable[ast.stmt]) -> None:
        """Execute statements in order."""
        for statement in body:
            self._execute(statement)

    def _execute(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                result = self._evaluate(value)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._evaluate(value))
            case ast.AugAssign(target=target, value=value):
                self._assign(target, elementwise(self._evaluate(target), self._operand(value)))
            case ast.Return(value=value):
                self._returned.append(self._evaluate(value) if value is not None else None)
            case ast.Expr(value=value):
                self._evaluate(value)
            case ast.With(body=body):
                self.run(body)
            case ast.If(test=test, body=body, orelse=other):
                self._evaluate(test)
                self._branch(body, other)
            case ast.Try(body=body, handlers=handlers, orelse=other, finalbody=last):
                self._branch([*body, *other], *(handler.body for handler in handlers))
                self.run(last)
            case ast.For(target=target, iter=over, body=body):
                items = self._items(over)
                for item in items if items is not None else [None]:
                    self._assign(target, item)
                    if items is None:
                        self._branch(body, [])
                    else:
                        self.run(body)
            case ast.While(body=body):
                self._branch(body, [])

    def _branch(self, *bodies: Sequence[ast.stmt]) -> None:
        """Execute branches, and join what they leave of each name."""
        before, after = dict(self._names), []
        for body in bodies:
            self._names = dict(before)
            self.run(body)
            if not (body and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                after.append(self._names)
        self._names = {
            name: join([names.get(name) for names in after]) for names in after for name in names
        } or before

    def _assign(self, target: ast.expr, value: AbstractValue) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            for one in target.elts:
                self._assign(one, part_of(value))
        elif isinstance(target, ast.Starred):
            self._assign(target.value, part_of(value))

    def _items(self, over: ast.expr) -> list[AbstractValue] | None:
        """The modules that a loop iterates over; None where they are not known."""
        holder = self._evaluate(over)
        if isinstance(holder, TorchNode) and isinstance(holder.module, nn.ModuleList | nn.Sequential):
            return list(self._interpreter.children(holder))
        return None

    # --- expressions -----------------------------------------------------------------------------------

    def _evaluate(self, expression: ast.expr) -> AbstractValue:
        match expression:
            case ast.Name(id=name):
                return self._names.get(name)
            case ast.NamedExpr(target=target, value=value):
                result = self._evaluate(value)
                self._assign(target, result)
                return result
            case ast.Attribute(value=value, attr=name):
                holder = self._evaluate(value)
                if isinstance(holder, TorchNode):
                    return CONSTANT if _is_constant(holder, name) else self._interpreter.child(holder, name)
                return part_of(holder) if name == "values" else None  # of torch.max
            case ast.Subscript(value=value, slice=place):
                holder = self._evaluate(value)
                if isinstance(holder, TorchNode):
                    return (
                        self._interpreter.child(holder, place.value)
                        if isinstance(place, ast.Constant)
                        else None
                    )
                return part_of(holder)
            case ast.BinOp(left=left, right=right):
                return elementwise(self._operand(left), self._operand(right))
            case ast.ListComp(elt=one, generators=loops) | ast.GeneratorExp(elt=one, generators=loops):
                for loop in loops:
                    self._evaluate(loop.iter)
                    self._assign(loop.target, None)
                self._evaluate(one)
            case ast.IfExp(test=test, body=body, orelse=other):
                self._evaluate(test)
                return join([self._evaluate(body), self._evaluate(other)])
            case ast.Call():
                return self._call(expression)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return concatenated([self._evaluate(part) for part in parts])
            case ast.Set() | ast.Dict() | ast.BoolOp() | ast.Compare() | ast.Await():
                for part in ast.iter_child_nodes(expression):
                    if isinstance(part, ast.expr):
                        self._evaluate(part)
        return None

    def _operand(self, expression: ast.expr) -> AbstractValue:
        """The value of an operand, which may be a number."""
        return CONSTANT if isinstance(literal(expression), int | float) else self._evaluate(expression)

    def _call(self, call: ast.Call) -> AbstractValue:
        args = [self._evaluate(value) for value in call.args]
        kwargs = {word.arg: self._evaluate(word.value) for word in call.keywords if word.arg is not None}
        if isinstance(callee := self._evaluate(call.func), TorchNode):
            return self._interpreter.call_module(callee, args, kwargs)
        if not isinstance(call.func, ast.Attribute | ast.Name):
            return None
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        arguments = [*call.args, *(word.value for word in call.keywords)]
        if isinstance(call.func, ast.Attribute):
            holder = self._evaluate(call.func.value)
            if isinstance(holder, TorchNode):
                return self._interpreter.call_method(holder, name, args, kwargs)
            if holder is not None or not is_function_namespace(call.func.value):
                args, arguments = [holder, *args], [call.func.value, *arguments]
        value = args[0] if args and isinstance(args[0], AbstractTensor) else None
        if value == CONSTANT and all(one in (CONSTANT, None) for one in args) and name in _KEEP_CONSTANTS:
            return CONSTANT
        if (value is None or value.kind == "map") and reduces_positions(name, arguments[1:], call.keywords):
            return PLAIN
        if (
            value is not None
            and value.kind in ("map", "columns")
            and moves_channels_last(name, arguments[1:], value.kind)
        ):
            return PLAIN
        if (
            value is not None
            and value.kind == "map"
            and name == "flatten"
            and _flattens_positions(call, arguments[1:])
        ):
            return replace(value, kind="columns")
        of_map = value is not None and value.kind == "map"
        if flattens(name, arguments[1:], call.keywords, of_map=of_map):
            return flattened(value)
        if name in ("view", "reshape", "unflatten"):
            return viewed(value, rows=len(arguments) == 4)
        if name in ("mm", "bmm", "matmul"):
            return part_of(args[1]) if len(args) > 1 and args[1] != CONSTANT else None
        if name in KEEPS_FEATURES or name in JOINS or _swaps_batch(name, arguments[1:]):
            return part_of(args[0]) if args else None
        if name.rstrip("_") not in KEEPS:
            return None
        if name in ("add", "mul", "sub", "div") and len(args) > 1:
            return elementwise(*args[:2])
        return pooled(value, point=name.startswith("adaptive_") and all(map(is_one, arguments[1:2])))


# Methods of a parameter whose result still counts as one.
_KEEP_CONSTANTS = frozenset(
    ("expand", "expand_as", "repeat", "unsqueeze", "view", "reshape", "to", "type_as", "float")
)


def _is_constant(node: TorchNode, name: str) -> bool:
    """Whether an attribute of a module is a parameter, a buffer or a number."""
    module = node.module
    if module is None:
        return False
    tensors = {**module._parameters, **module._buffers}
    return tensors.get(name) is not None or isinstance(vars(module).get(name), int | float)


def _flattens_positions(call: ast.Call, places: Sequence[ast.expr]) -> bool:
    """Whether a call flattens all axes after the channels."""
    keywords = {word.arg: literal(word.value) for word in call.keywords}
    start = keywords.get("start_dim", literal(places[0]) if places else None)
    return start == 2 and keywords.get("end_dim", -1) == -1 and len(places) < 2


def _swaps_batch(name: str, axes: Sequence[ast.expr]) -> bool:
    """Whether a call turns (N, L, C) into (L, N, C)."""
    return name in ("transpose", "swapaxes") and sorted(map(literal, axes), key=str) == [0, 1]
