"""Writes what runs of the torch model show into the torch tree, as if the caller had said it with `Flatten`."""

from math import prod

from torchjax_bridge.exchange import join_path

from .._report import Fault
from ..rules import Flatten
from ..trees import TorchNode, TorchTree
from ._axes import Order
from ._faults import contradicted
from ._questions import can_be_flattened
from ._recorded import Recorded

__all__ = ["tell_orders"]


def tell_orders(tree: TorchTree, recorded: Recorded) -> tuple[list[Flatten], list[Fault]]:
    """Write the orders of features into the tree, where the caller has not.

    Returns:
        The `Flatten` of each layer that reads a flattened map or gives what becomes one, and the faults of those of
        the caller's that name another map.
    """
    _write_calls(tree.root, recorded)
    found: list[Flatten] = []
    faults: list[Fault] = []
    for node in tree.root.walk():
        for orders, output in ((recorded.reads, False), (recorded.gives, True)):
            order = orders.get(id(node.module), Order("unknown"))
            rule = Flatten(join_path(node.origin), order.sizes if order.kind == "map" else None, output)
            word = "output" if output else "features"
            said = getattr(node, word)
            if word in node.told and said and rule.features and _split(said) != _split(rule.features):
                faults.append(contradicted(node, said, rule))
            known = order.kind == "map" or (order.kind == "plain" and not output)
            if known and word not in node.told and can_be_flattened(node, rule):
                node.told |= {word}
                setattr(node, word, rule.features)
                found += [rule] if rule.features else []
    return found, faults


def _write_calls(node: TorchNode, recorded: Recorded) -> int | None:
    """Number the nodes by their first calls; a list of layers goes by the first of its layers."""
    below = [
        place for child in node.children.values() if (place := _write_calls(child, recorded)) is not None
    ]
    node.called = recorded.calls.get(id(node.module), min(below, default=None))
    return node.called


def _split(features: tuple[int, ...]) -> tuple[int, int]:
    return features[0], prod(features[1:])
