"""The result of `port`: source, model, rules, notes and proof."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import files, save_flax

from ._built import weights_of
from ._proof import Proof
from ._rules import UserRule

__all__ = ["Port"]


@dataclass(frozen=True)
class Port:
    """A torch module as Flax source. Print it to see what was ported and proved.

    Attributes:
        source: The text of the file.
        model: The model of that source with the weights: an ``nnx.Module`` in evaluation mode, or
            ``(linen module, variables)``. Without values where the torch module is on the ``meta`` device.
        rules: What `to_flax`, `to_state_dict`, `to_optax` and `parity` take to pair the two models.
        notes: Conditions under which the port holds, which the header of the file says too.
        proof: How far torch and Flax were apart; None if nothing was compared.
        name: The class of the model.
    """

    source: str
    model: Any
    rules: tuple[UserRule, ...]
    notes: tuple[str, ...]
    proof: Proof | None
    name: str

    def save(self, path: str | Path, *, weights: str | Path | None = None) -> None:
        """Write the source, and the weights if asked for. Files appear only when they are complete.

        Args:
            path: The Python file; an existing one is replaced.
            weights: Where the weights go, as `save_flax` writes them.

        Raises:
            CheckpointError: The port has no weights, or a file cannot be written; an old source stays.
        """
        if weights is not None and not _has_weights(self.model):
            raise CheckpointError(
                f"the port of {self.name} has no weights, since the module is on the meta device: save the source "
                "alone, or port the module with its weights."
            )
        with files.atomic_file(Path(path)) as file:
            file.write(self.source.encode())
            if weights is not None:
                save_flax(weights, weights_of(self.model))

    @property
    def lines(self) -> int:
        """How many lines the source has."""
        return len(self.source.splitlines())

    @property
    def classes(self) -> int:
        """How many classes the source has."""
        return self.source.count("\nclass ")

    def __str__(self) -> str:
        head = f"{self.name}: {self.lines} lines, {self.classes} class{'es' if self.classes != 1 else ''}"
        held = [f"holds for {note}" for note in self.notes]
        proved = str(self.proof) if self.proof is not None else "not compared with torch"
        return "\n".join([head, *held, proved])


def _has_weights(model: Any) -> bool:
    """Whether a model has values, and not shapes alone."""
    weights = weights_of(model)
    leaves = jax.tree.leaves(nnx.state(weights) if isinstance(weights, nnx.Module) else weights)
    return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
