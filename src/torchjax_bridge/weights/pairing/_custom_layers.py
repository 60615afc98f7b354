"""Layers of the caller's own classes: proposes the `Rule` that fits their shapes, once for all layers of a class.

A class that is not torch's does not say where its tensors go. Shapes often show it: for each tensor, the
leaves and layouts that fit. If several are possible, the fault lists all of them as a question. Decides
nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from math import prod

from torch import nn

from torchjax_bridge.exchange import join_path, split_path

from .._report import Choice, Fault
from ..layouts import Identity, Layout, Permute, Reshape, Then
from ..rules import LayerType, dense_kernel, possible_axes
from ..trees import FlaxNode, TorchNode

__all__ = ["custom_layer_fault", "is_torch_layer", "merge_by_class", "no_rule_fault"]

Shape = tuple[int, ...]


def custom_layer_fault(torch_node: TorchNode, flax_node: FlaxNode) -> Fault | None:
    """The fault of a module whose class has no rule, with the rules that would fit this scope.

    None if no known layout turns its tensors into the leaves.
    """
    kind = torch_node.kind
    if kind is None or torch_node.children or flax_node.children or is_torch_layer(kind) or kind is nn.Module:
        return None
    ours = {name: tuple(leaf.meta.shape) for name, leaf in torch_node.leaves.items() if not leaf.owners}
    theirs = {name: leaf.shape for name, leaf in flax_node.leaves.items() if not leaf.optional}
    buffers = [name for name, _ in torch_node.module.named_buffers()] if torch_node.module is not None else []
    keeps = buffers if len(ours) - len(buffers) == len(theirs) else []
    ours = {name: shape for name, shape in ours.items() if name not in keeps}
    options = _options(ours, theirs)
    if not options:
        return None
    kept = ", keeps=(" + " ".join(f'"{name}",' for name in keeps) + ")" if keeps else ""
    where = join_path(torch_node.origin)
    norm = _norm(ours, theirs)
    lines = tuple(f"Rule({kind.__name__}, [{', '.join(map(_entry, option))}]{kept})" for option in options)
    choice = Choice(kind, lines, norm, _uses(ours, options))
    return Fault("ambiguous", _words(choice, [where], torch_node), where, choice=choice)


def merge_by_class(faults: Iterable[Fault], root: TorchNode) -> list[Fault]:
    """Merge the faults of all layers of a class into one, with the rules that fit all of them."""
    found: list[Fault] = []
    groups: dict[tuple[type, bool], list[tuple[Fault, Choice]]] = {}
    for fault in faults:
        if fault.choice is None:
            found.append(fault)
            continue
        key = (fault.choice.kind, bool(fault.choice.norm))
        if key not in groups:
            found.append(fault)
        groups.setdefault(key, []).append((fault, fault.choice))
    for group in groups.values():
        (first, choice), *others = group
        if others:
            common = tuple(line for line in choice.lines if all(line in other.lines for _, other in others))
            uses = choice.uses if common == choice.lines else ()
            message = _words(
                replace(choice, lines=common, uses=uses), [fault.path for fault, _ in group], root
            )
            found[found.index(first)] = replace(first, message=message)
    return found


def no_rule_fault(node: TorchNode) -> Fault:
    """The fault of a torch layer without a rule."""
    names = ", ".join(node.flat())
    kind = node.kind.__name__ if node.kind else "?"
    return Fault(
        "no rule",
        f"torch.nn.{kind} ({names}) has no counterpart in Flax; pass rules=[Rule({kind}, [Entry(...), ...])] "
        "that says where its tensors go",
        join_path(node.origin),
    )


def is_torch_layer(kind: type | None) -> bool:
    """Whether it is a layer of torch.nn that computes something, and no container."""
    if kind is None or kind is nn.Module or not kind.__module__.startswith("torch.nn.modules."):
        return False
    return kind.__module__.rpartition(".")[2] not in ("container", "transformer")


# --- rules that fit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One entry of a proposed rule."""

    ours: str
    theirs: str
    layout: Layout


_MOST = 6  # tensors of one layer


def _options(ours: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> list[tuple[_Line, ...]]:
    """Every way to turn a layer's tensors into a scope's leaves. Equal names belong together."""
    if not ours or len(ours) != len(theirs) or len(ours) > _MOST:
        return []
    same = [name for name in ours if name in theirs and _layouts(ours[name], theirs[name])]
    rest, left = [one for one in ours if one not in same], [one for one in theirs if one not in same]
    found: list[tuple[_Line, ...]] = []
    for order in permutations(left):
        pairs = dict(zip(rest, order, strict=True)) | {name: name for name in same}
        ways = [
            [_Line(one, pairs[one], way) for way in _layouts(ours[one], theirs[pairs[one]])] for one in ours
        ]
        found += product(*ways)
    return found if len(found) <= _MOST_LINES else []


_MOST_LINES = 4  # more options are too many for a reader


def _layouts(ours: Shape, theirs: Shape) -> list[Layout]:
    """The layouts that turn one shape into the other, with two axes of channels last."""
    rank = len(ours)
    found: dict[Layout, None] = {}
    if rank < 2 or rank != len(theirs):
        if rank == 2 < len(theirs):
            width, out = ours
            found |= {
                dense_kernel(ours, theirs, axes): None for axes in possible_axes(ours, theirs, None)[:1]
            }
            for axes in possible_axes((out, width), theirs, None)[:1]:
                if axes.inputs[0] == 0:
                    found[_reshape(ours, theirs)] = None
        elif _wide(ours) == _wide(theirs) or (rank == 1 and prod(theirs) == ours[0]):
            found[_reshape(ours, theirs)] = None
        return list(found)
    for pair in combinations(range(rank), 2):
        space = tuple(axis for axis in range(rank) if axis not in pair)
        for last in (pair, pair[::-1]):
            order = (*space, *last)
            if tuple(ours[axis] for axis in order) == theirs:
                found[Identity() if order == tuple(range(rank)) else Permute(order)] = None
    return list(found)


def _reshape(ours: Shape, theirs: Shape) -> Layout:
    return Identity() if ours == theirs else Reshape(ours, theirs)


def _wide(shape: Shape) -> list[int]:
    return [size for size in shape if size > 1]


def _norm(ours: Mapping[str, Shape], theirs: Mapping[str, Shape]) -> str:
    """The torch norm with these names and shapes; empty if there is none."""
    if ours != {("weight" if name == "scale" else name): shape for name, shape in theirs.items()}:
        return ""
    return {("scale",): "RMSNorm", ("bias", "scale"): "LayerNorm"}.get(tuple(sorted(theirs)), "")


# --- messages -------------------------------------------------------------------------------------------------


def _words(choice: Choice, paths: Sequence[str], root: TorchNode) -> str:
    kind = choice.kind.__name__
    named = ", ".join(f"'{path}'" if path else "the root" for path in paths[:_MOST_NAMED])
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    lines = [f"rules=[{line}]" for line in choice.lines]
    if not lines:
        how = (
            "and no one list of entries fits all their shapes: pass a Rule with a function, which makes the "
            f"entries of a Layer, rules=[Rule({kind}, <function>)]"
        )
    elif choice.norm:
        hints = ", ".join(f'LayerType("{path}", nn.{choice.norm})' for path in _patterns(paths, root))
        same = f"if it computes what nn.{choice.norm} does"
        how = f"with the tensors of a norm: rules=[{hints}] {same}, else {lines[0]}"
    elif len(lines) == 1:
        how = f"whose tensors fit by their shapes as {lines[0]} says"
    else:
        uses = choice.uses or ("",) * len(lines)
        ways = [f"{line} {use}".strip() for line, use in zip(lines, uses, strict=True)]
        how = f"whose shapes leave open where its tensors go: {', or '.join(ways)}"
    return f"{named}{more} ({kind}): a class of your own without a rule, {how}"


def _patterns(paths: Sequence[str], root: TorchNode) -> list[str]:
    """The paths, with those of numbered blocks as one pattern if it matches nothing else."""
    found: dict[str, None] = {}
    origins = [join_path(node.origin) for node in root.walk()]
    for path in paths:
        pattern = ".".join("*" if step.isdigit() else step for step in path.split("."))
        hint = LayerType(pattern, nn.Module)
        others = [one for one in origins if hint.matches(split_path(one)) and one not in paths]
        found[path if others or len(paths) == 1 else pattern] = None
    return list(found)


_MOST_NAMED = 4


def _uses(ours: Mapping[str, Shape], options: Sequence[tuple[_Line, ...]]) -> tuple[str, ...]:
    """How the layer uses its matrix under each option, if the options differ in nothing else."""
    if len(options) != 2:
        return ()
    differ = [(one, other) for one, other in zip(*options, strict=True) if one != other]
    if len(differ) != 1 or len(ours[differ[0][0].ours]) != 2:
        return ()
    return tuple(f"for x @ {line.ours}{'.T' if _is_transposed(line.layout) else ''}" for line in differ[0])


def _is_transposed(layout: Layout) -> bool:
    """Whether a matrix has its outputs first, as in torch."""
    return layout == Permute((1, 0)) or isinstance(layout, Then)


def _entry(line: _Line) -> str:
    layout = "" if line.layout == Identity() else f", {_layout_source(line.layout)}"
    return f'Entry("{line.ours}", "{line.theirs}"{layout})'


def _layout_source(layout: Layout) -> str:
    """A layout as source code."""
    if isinstance(layout, Permute):
        return f"Permute({layout.axes})"
    if isinstance(layout, Reshape):
        return f"Reshape({layout.torch_shape}, {layout.flax_shape})"
    if isinstance(layout, Then):
        return f"then({_layout_source(layout.first)}, {_layout_source(layout.second)})"
    return f"{layout!r}"
