"""Asks for the class of layers of a bare ``state_dict``, once for all layers with the same question.

Every square kernel of a model raises the same question. The advice covers all of them, by patterns that match
no other layer. Kernels that are not square may show their layout, and serve as a hint.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from torchjax_bridge.exchange import Path, join_path, split_path

from .._report import Fault, Series
from ..rules import LOOKALIKES, LayerType, Rule
from ..trees import TorchNode, TorchTree
from ._bind import Move

__all__ = ["class_fault", "merge_class_faults"]

_INPUT_MAJOR = frozenset(rule.name for rule in LOOKALIKES)


def class_fault(node: TorchNode, rules: list[Rule]) -> Fault:
    """The fault of a layer that fits several rules with different results."""
    tensors = node.flat() | node.moved
    shapes = ", ".join(f"{name} {tuple(leaf.meta.shape)}" for name, leaf in tensors.items())
    known = sorted(rules, key=lambda rule: not rule.types)
    options = tuple(rule.name for rule in known)
    kind = next((kind.__name__ for rule in known for kind in rule.types), "Linear")
    path = join_path(node.origin)
    message = f"{node.where} ({shapes}) could be {' or '.join(options)}, which convert differently; "
    advice = f'rules=[LayerType("{path}", nn.{kind})]'
    return Fault(
        "ambiguous",
        f"{message}pass the nn.Module instead of its state_dict, or {advice}",
        path,
        series=Series(kind, "", options, (), what="layers"),
    )


def merge_class_faults(faults: Sequence[Fault], tree: TorchTree, moves: Iterable[Move]) -> list[Fault]:
    """The faults. Those about a class get the rules that settle all equal ones."""
    equal: dict[Series, list[Path]] = {}
    for fault in faults:
        if fault.series and fault.series.what == "layers":
            equal.setdefault(fault.series, []).append(split_path(fault.path))
    if not equal:
        return list(faults)
    layers = {node.origin for node in tree.root.walk() if node.leaves or node.moved}
    input_major = any(move.rule in _INPUT_MAJOR and not _is_square(tree, move) for move in moves)
    answers: dict[Series, Series | None] = {}
    for series, paths in equal.items():
        if input_major and _INPUT_MAJOR & set(series.torch):
            answers[series] = None  # it is probably none of torch.nn's classes
        else:
            patterns = _patterns(paths, layers)
            rule = ", ".join(f'LayerType("{join_path(one)}", nn.{series.rule})' for one in patterns)
            answers[series] = replace(series, rule=rule)
    return [_answered(fault, answers) for fault in faults]


def _answered(fault: Fault, answers: dict[Series, Series | None]) -> Fault:
    if fault.series is None or fault.series not in answers:
        return fault
    answer = answers[fault.series]
    if answer is not None:
        return replace(fault, series=answer)
    question = fault.message.partition("; pass the nn.Module")[0]
    hint = (
        "; the weights here that are not square lie input-major, so it is likely one that does: pass the nn.Module "
        "instead of its state_dict, or the LayerType of its class and a Rule for that class"
    )
    return replace(fault, message=question + hint, series=replace(fault.series, rule=""))


def _is_square(tree: TorchTree, move: Move) -> bool:
    shapes = [tuple(tree.state[key].shape) for key in move.torch_keys]
    return all(len(shape) != 2 or shape[0] == shape[1] for shape in shapes)


def _patterns(paths: Sequence[Path], layers: set[Path]) -> list[Path]:
    """As few patterns as possible that match all these layers and no other."""
    found: list[tuple[str, ...]] = [tuple(map(str, path)) for path in paths]
    depths = range(max(map(len, found)))
    for depth in sorted(depths, key=lambda depth: not _has_numbers(paths, depth)):
        groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for path in found:
            if depth < len(path):
                groups.setdefault((*path[:depth], "*", *path[depth + 1 :]), []).append(path)
        for pattern, members in groups.items():
            if len(members) > 1 and _reaches_only(pattern, paths, layers):
                place = found.index(members[0])
                found = [path for path in found if path not in members]
                found.insert(place, pattern)
    return [tuple(path) for path in found]


def _has_numbers(paths: Sequence[Path], depth: int) -> bool:
    return any(len(path) > depth and isinstance(path[depth], int) for path in paths)


def _reaches_only(pattern: Path, asked: Sequence[Path], layers: set[Path]) -> bool:
    rule = LayerType(join_path(pattern), nn.Module)
    return all(path in asked for path in layers if rule.matches(path))
