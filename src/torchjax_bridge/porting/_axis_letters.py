"""What the axes of the arrays of a model are called: N, C, L, D, H or W, where that is known.

A layer says what its axes are, and a function which axes are the same before and after it. An axis that nothing
says anything of, or of which two things are said, has no letter.
"""

from collections.abc import Iterable

from torch import nn

from torchjax_bridge.recording import Frame, Node, Recording, Value, layer_class, tensors_of

from ._axis_relations import MAPS, Axis, merged_axes, related_axes
from .operations import table_name

__all__ = ["AxisLetters"]

_MAP = {2: "NC", 3: "NCL", 4: "NCHW", 5: "NCDHW"}
_SPACE = set("LDHW")
_FEATURES = nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding
_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.SyncBatchNorm: (2, 3, 4, 5),
    nn.GroupNorm: (2, 3, 4, 5),
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, nn.InstanceNorm1d), (3,)),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d, nn.BatchNorm2d), (4,)),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d, nn.BatchNorm3d), (5,)),
}


class AxisLetters:
    """The letters of a recording."""

    def __init__(self, recording: Recording) -> None:
        self._same: dict[Axis, Axis] = {}
        self._said: dict[Axis, set[str]] = {}
        inputs = [value for _, tree in recording.top.inputs for value in tensors_of(tree)]
        batch = next((value.shape[0] for value in inputs if value.shape), None)
        for value in inputs:
            if value.shape and value.shape[0] == batch:
                self._say(value, "N")
        frames = list(recording.top.walk())
        for frame in frames:
            self._read(frame)
        for frame in frames:
            for node in frame.nodes:
                for parts, whole in merged_axes(node) if node.function else ():
                    if all(self._letter(part) in _SPACE for part in parts):  # places of a map, in a row
                        self._said.setdefault(self._root(whole), set()).add("L")

    def of(self, value: Value) -> tuple[str | None, ...]:
        """The letters of a value in torch's order of axes, None where one is not known."""
        letters = [self._letter((value, axis)) for axis in range(len(value.shape))]
        if len(letters) == 3 and letters[0] == "N" and letters[1] is None and letters[2] == "C":
            conflict = self._said.get(self._root((value, 1)))
            letters[1] = None if conflict else "L"  # the features of a row of things
        return tuple(letter if letters.count(letter) == 1 else None for letter in letters)

    def _read(self, frame: Frame) -> None:
        for node in frame.nodes:
            if node.function:
                self._function(node)
            elif node.frame is not None:
                outer = [value for _, tree in node.named for value in tensors_of(tree)]
                inner = [value for _, tree in node.frame.inputs for value in tensors_of(tree)]
                self._join(zip(outer, inner, strict=False))
                self._join(zip(tensors_of(node.result), tensors_of(node.frame.result), strict=False))
            elif node.module is not None:
                self._layer(node, node.module)

    def _function(self, node: Node) -> None:
        for one, two in related_axes(node):
            self._unite(one, two)
        name = table_name(node.function)
        values = [*tensors_of(node.args[:1]), *tensors_of(node.result)]
        if (found := MAPS.fullmatch(name)) is not None:
            rank = int(found[3]) + 2 if found[3] else 0
            for value in values:
                if rank in (0, len(value.shape)):
                    self._say(value, _MAP.get(len(value.shape), ""))
            if len(values) > 1 and [len(value.shape) for value in values] == [rank] * len(values):
                self._unite((values[0], 0), (values[1], 0))
        elif name in ("linear", "embedding"):
            for value in values if name == "linear" else values[1:]:
                self._say_last(value, "C")

    def _layer(self, node: Node, module: nn.Module) -> None:
        given = list(tensors_of((node.args, node.kwargs)))
        made = list(tensors_of(node.result))
        if not given or not made:
            return
        kind = layer_class(module)
        first, result = given[0], made[0]
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rows = "NLC" if module.batch_first else "LNC"
            for value in (*given, *made):
                if len(value.shape) == 3 and value.dtype is not None and value.dtype.is_floating_point:
                    of_states = isinstance(module, nn.RNNBase) and value not in (first, result)
                    of_weights = isinstance(module, nn.MultiheadAttention) and value in made[1:]
                    self._say(value, "" if of_states or of_weights else rows)
            mask = node.kwargs.get("key_padding_mask", node.args[3] if len(node.args) > 3 else None)
            if isinstance(mask, Value) and len(mask.shape) == 2:
                self._say(mask, "NL")
        elif isinstance(module, _FEATURES):
            is_one = not isinstance(module, nn.LayerNorm | nn.RMSNorm) or len(module.normalized_shape) == 1
            for axis in range(min(len(first.shape), len(result.shape))):
                if isinstance(module, nn.Embedding) or axis < len(result.shape) - 1:
                    self._unite((first, axis), (result, axis))
            self._say_last(result, "C" if is_one else "")
            if isinstance(module, nn.Embedding):
                self._say_last(first, "L" if len(first.shape) == 2 else "")
            else:
                self._say_last(first, "C" if is_one else "")
        elif kind in _RANKS:
            for value in (first, result):
                if len(value.shape) in _RANKS[kind]:
                    self._say(value, _MAP[len(value.shape)])
        elif len(first.shape) == len(result.shape):  # dropouts, PReLU
            self._join([(first, result)])

    # --- axes -----------------------------------------------------------------------------------------------

    def _say(self, value: Value, letters: str) -> None:
        for axis, letter in enumerate(letters):
            self._said.setdefault(self._root((value, axis)), set()).add(letter)

    def _say_last(self, value: Value, letter: str) -> None:
        if letter and value.shape:
            self._said.setdefault(self._root((value, len(value.shape) - 1)), set()).add(letter)

    def _join(self, pairs: Iterable[tuple[Value, Value]]) -> None:
        for one, two in pairs:
            if len(one.shape) == len(two.shape):
                for axis in range(len(one.shape)):
                    self._unite((one, axis), (two, axis))

    def _unite(self, one: Axis, two: Axis) -> None:
        a, b = self._root(one), self._root(two)
        if a != b:
            self._same[a] = b
            self._said.setdefault(b, set()).update(self._said.pop(a, ()))

    def _root(self, axis: Axis) -> Axis:
        while (above := self._same.get(axis)) is not None:
            further = self._same.get(above)
            if further is not None:
                self._same[axis] = further
            axis = above
        return axis

    def _letter(self, axis: Axis) -> str | None:
        said = self._said.get(self._root(axis), set())
        return next(iter(said)) if len(said) == 1 else None
