"""Where a live model without example inputs may flatten a map, or make one, though its widths explain every layer.

Reads which names the code of a model uses, such as ``flatten`` or ``view``, and nothing else of it. A doubt is
enough: the plan then asks, and ``inputs=`` answers. A bare ``state_dict`` has no code, so its widths alone decide.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isqrt
from types import CodeType, FunctionType

from torch import nn

from ..trees import TorchNode
from ._modules import takes_all

__all__ = ["Doubts", "Reader", "Widths", "reached"]


@dataclass(eq=False)
class Reader:
    """A layer that reads features: its input width and output widths; ``fixed`` if only torch's order will do."""

    node: TorchNode
    width: int
    gives: set[int] = field(default_factory=set)
    linear: bool = False
    fixed: bool = False
    behind: int = 0  # the number of convolutions and norms of maps defined before it


@dataclass(eq=False)
class Widths:
    """The widths that the shapes of the model show."""

    channels: list[int] = field(default_factory=list)  # of output maps of convolutions and norms
    upwards: list[int] = field(default_factory=list)  # of input maps of transposed convolutions
    known: set[int] = field(default_factory=set)  # of embedding tables, attention and the like
    inward: dict[int, set[int]] = field(
        default_factory=dict
    )  # of input maps of convolutions, with their outputs
    readers: list[Reader] = field(default_factory=list)
    grouped: list[tuple[TorchNode, int]] = field(default_factory=list)  # GroupNorms and their widths


_FLATTENS = frozenset(
    ("flatten", "view", "reshape", "ravel", "rearrange", "unflatten", "view_as", "reshape_as")
)
_VIEWS = _FLATTENS - {"flatten", "ravel"}
_RESIZES = frozenset(("interpolate", "upsample", "pixel_shuffle", "unpool", "fold"))
_IMAGE = 4  # an image has no more channels than this


class Doubts:
    """The doubts about one model; ``asked`` holds the ids of the layers that are asked about anyway."""

    def __init__(self, root: TorchNode, widths: Widths) -> None:
        self._root, self._widths = root, widths
        self.asked: set[int] = set()
        self._trusted: set[int] = set()

    def may_read_a_map(self, reader: Reader) -> bool:
        """Whether code may flatten a map for a layer whose width is explained. Call it in order of definition."""
        if not any(1 < c < reader.width and reader.width % c == 0 for c in self._channels):
            return False
        if self._follows(reader) or self._reads_channels(reader):
            self._trusted.add(id(reader.node))
            return False
        return bool(self._names[id(reader.node)] & _FLATTENS)

    def may_make_a_map(self, reader: Reader, out: int) -> int:
        """The channels of a map that code may make of a Linear's output; 0 where there is no doubt."""
        names = self._names[id(reader.node)]
        if not names & _VIEWS or _has_a_next(self._root, reader.node):
            return 0
        some = [c for c in self._widths.upwards if 1 < c < out and out % c == 0]
        resizes = names & _RESIZES or any(isinstance(n.module, nn.Upsample) for n in self._root.walk())
        wide = self._widths.inward if resizes else [c for c in self._sources if c > _IMAGE]
        some += [c for c in wide if 1 < c < out and out % c == 0 and isqrt(out // c) ** 2 * c == out]
        return some[0] if some else 0

    def _follows(self, reader: Reader) -> bool:
        """Whether it is defined right behind a layer that gives its width, and about which there is no doubt."""
        before = self._widths.readers[: self._widths.readers.index(reader)]
        last = next((one for one in reversed(before) if one.gives), None)
        settled = last is not None and (
            id(last.node) in self.asked | self._trusted or "features" in last.node.told
        )
        return last is not None and settled and reader.width in last.gives and last.behind == reader.behind

    def _reads_channels(self, reader: Reader) -> bool:
        """Whether it reads as many features as the last map in front of it has channels, which is no inner one."""
        channels = self._widths.channels
        if not reader.behind or channels[reader.behind - 1] != reader.width:
            return False
        flow = self._widths.inward
        ends = {c for c in channels if all(c in reached(other, flow) for other in reached(c, flow))}
        return reader.width in ends or not any(1 < c < reader.width and reader.width % c == 0 for c in ends)

    @cached_property
    def _channels(self) -> frozenset[int]:
        return frozenset(self._widths.channels)

    @cached_property
    def _sources(self) -> list[int]:
        """The channels that convolutions take and that no convolution makes of others."""
        flow = self._widths.inward
        return [
            c for c in flow if all(other in reached(c, flow) for other in flow if c in reached(other, flow))
        ]

    @cached_property
    def _names(self) -> Mapping[int, frozenset[str]]:
        """The names that the code of each node and of all around it uses, by its id."""
        return dict(_names_around(self._root, frozenset(), {}))


def _names_around(
    node: TorchNode, outer: frozenset[str], of_classes: dict[type, frozenset[str]]
) -> Iterator[tuple[int, frozenset[str]]]:
    names = outer | _names_of(node, of_classes)
    yield id(node), names
    for child in node.children.values():
        yield from _names_around(child, names, of_classes)


def _names_of(node: TorchNode, of_classes: dict[type, frozenset[str]]) -> frozenset[str]:
    """The names that the methods of a module use, with those of the functions that they call.

    Args:
        node: The module.
        of_classes: The names by class, as far as they are known; is added to.
    """
    module = node.module
    if module is None:
        return frozenset()
    if "forward" in vars(module) or (isinstance(module, nn.Module) and hasattr(module, "_c")):
        return _FLATTENS  # whatever was put in place of its code
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")]
    if type(module) not in of_classes:
        of_classes[type(module)] = frozenset(_used(value for kind in kinds for value in vars(kind).values()))
    found = {*of_classes[type(module)], *_used(value for value in vars(module).values() if callable(value))}
    own = any("forward" in vars(kind) for kind in kinds)
    if own and any(isinstance(child, nn.Flatten) and takes_all(child) for child in module.children()):
        found.add("flatten")
    if own and any(isinstance(child, nn.Unflatten) for child in module.children()):
        found.add("unflatten")
    return frozenset(found)


def _used(values: Iterable[object]) -> Iterator[str]:
    todo, seen = list(values), set[int]()
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        todo += [getattr(function, held, None) for held in ("__func__", "fget", "__wrapped__")]
        if isinstance(function, FunctionType) and not str(function.__module__).startswith("torch."):
            for name in _names_in(function.__code__):
                yield name
                todo.append(function.__globals__.get(name))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _has_a_next(root: TorchNode, node: TorchNode) -> bool:
    """Whether an ``nn.Sequential`` hands the output of a layer to another layer with weights."""
    for parent in root.walk():
        children: Sequence[TorchNode] = list(parent.children.values())
        if node in children and type(parent.module) is nn.Sequential:
            return any(not child.empty for child in children[children.index(node) + 1 :])
    return False


def reached(start: int, edges: Mapping[int, set[int]]) -> set[int]:
    """The numbers that edges lead to."""
    found: set[int] = set()
    todo = [start]
    while todo:
        for width in edges.get(todo.pop(), ()):
            if width not in found:
                found.add(width)
                todo.append(width)
    return found
