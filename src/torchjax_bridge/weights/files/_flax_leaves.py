"""Which leaf of a Flax checkpoint is which leaf of a template, by name.

Names that went through a file may have lost what a template has: integers came back as strings, a bare parameter
tree stands where the template has a ``params`` collection. Both are looked through; everything else must agree, and
all that does not is said at once.
"""

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, join_path

from ..trees import FlaxTree
from ._leaf import Checkpoint, Leaf

__all__ = ["flax_leaves"]


def flax_leaves(checkpoint: Checkpoint, tree: FlaxTree) -> dict[Path, Leaf]:
    """The leaf of the checkpoint for every path of the template; what belongs to a run stays the template's.

    So does a plain array of an nnx module that the checkpoint lacks.

    Raises:
        CheckpointError: Leaves are missing, left over, or of another shape; the message lists them all.
    """
    wanted = {join_path(leaf.path): leaf for leaf in tree.root.flat().values()}
    given = dict(checkpoint.leaves)
    if tree.flavour == "linen" and not any(name in wanted for name in given):
        given = {f"params.{name}": leaf for name, leaf in given.items()}
    run = {join_path(leaf.path) for leaf in tree.kept}
    faults = [
        f"missing: {leaf.shape} @ {name}"
        for name, leaf in wanted.items()
        if name not in given and not leaf.optional
    ]
    faults += [
        f"unexpected: {leaf.shape} @ {leaf.name}"
        for name, leaf in given.items()
        if name not in wanted and name not in run
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
