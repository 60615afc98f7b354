"""Matches the leaves of a Flax checkpoint to those of a template, by name.

A file may lack the template's ``params`` collection, or have strings for its integers. Both are ignored. Everything
else must agree; one error lists all that does not.
"""

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, join_path

from ..trees import FlaxTree
from ._leaf import Checkpoint, Leaf

__all__ = ["match_template"]


def match_template(checkpoint: Checkpoint, tree: FlaxTree) -> dict[Path, Leaf]:
    """The leaf of the checkpoint for every path of the template that it fills.

    The template keeps its random streams and caches, and an array outside of variables that the checkpoint lacks.

    Raises:
        CheckpointError: Leaves are missing, left over, or of another shape; the message lists them all.
    """
    wanted = {join_path(leaf.path): leaf for leaf in tree.root.flat().values()}
    given = dict(checkpoint.leaves)
    if tree.flavour == "linen" and not any(name in wanted for name in given):
        given = {f"params.{name}": leaf for name, leaf in given.items()}
    kept = {join_path(leaf.path) for leaf in tree.kept}
    faults = [
        f"missing: {leaf.shape} @ {name}"
        for name, leaf in wanted.items()
        if name not in given and not leaf.optional
    ]
    faults += [
        f"unexpected: {leaf.shape} @ {leaf.name}"
        for name, leaf in given.items()
        if name not in wanted and name not in kept
    ]
    faults += [
        f"mismatch: {given[name].shape} in the file, {leaf.shape} in the template @ {name}"
        for name, leaf in wanted.items()
        if name in given and given[name].shape != leaf.shape
    ]
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(f"{checkpoint.path} does not fit the template:\n{lines}")
    return {leaf.path: given[name] for name, leaf in wanted.items() if name in given}
