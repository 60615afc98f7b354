"""Tables of vectors.

A table is ``(rows, features)`` on both sides, so it crosses as it is
(https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html,
https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/linear.html#flax.nnx.Embed).

Settings for parity: ``num_embeddings`` and ``features``. An ``EmbeddingBag`` is an ``Embed`` followed by
``sum``, ``mean`` or ``max`` over the bag (``jax.ops.segment_sum`` and the like where bags are given by offsets).
An index out of range raises in torch and gives NaN in Flax. ``padding_idx`` only stops a gradient in torch's
``Embedding``, and leaves the row out of the bag in its ``EmbeddingBag``; Flax has neither. ``max_norm``
rewrites the table in every forward pass. No Flax layer does, so it is refused.
"""

from collections.abc import Iterable

from torch import nn

from ._rule import Entry, Layer, Rule
from ._twin import Initializer, Twin

__all__ = ["RULES"]


def _table(layer: Layer) -> Iterable[Entry]:
    _refuse_max_norm(layer.module)
    padding = getattr(layer.module, "padding_idx", None)
    note = ""
    if padding is not None and isinstance(layer.module, nn.EmbeddingBag):
        note = f"padding_idx={padding}: torch leaves this row out of its bags, Flax's Embed does not"
    elif padding is not None:
        note = f"padding_idx={padding}: torch gives this row no gradient, Flax's Embed trains it"
    return (Entry("weight", "embedding", note=note),)


def _refuse_max_norm(module: nn.Module | None) -> None:
    limit = getattr(module, "max_norm", None)
    if limit is not None:
        raise ValueError(
            f"max_norm={limit:g} rescales rows of the table in the forward pass, which Flax's Embed does not; "
            "rescale the weight once (torch.renorm) and set max_norm=None"
        )


def _embedding_twin(module: nn.Embedding) -> Twin:
    _refuse_max_norm(module)
    notes = []
    if module.padding_idx is not None:
        notes.append(
            f"padding_idx={module.padding_idx}: torch gives this row no gradient, Flax's Embed trains it"
        )
    if module.scale_grad_by_freq:
        notes.append(
            "scale_grad_by_freq=True: torch divides gradients by how often a row is read, Flax does not"
        )
    return Twin(
        "Embed",
        {"num_embeddings": module.num_embeddings, "features": module.embedding_dim},
        initializers={"embedding_init": Initializer("normal", (1.0,))},
        notes=tuple(notes),
    )


def _bag_twin(module: nn.EmbeddingBag) -> Twin:
    raise ValueError(
        f"Flax has no such layer; read the rows with an Embed, and take the {module.mode} over each bag by hand"
    )


RULES = (
    Rule(
        nn.Embedding,
        _table,
        flax_types=("Embed",),
        required=frozenset({"weight"}),
        settings="num_embeddings, features",
        twin=_embedding_twin,
    ),
    Rule(
        nn.EmbeddingBag,
        _table,
        flax_types=("Embed",),
        required=frozenset({"weight"}),
        settings="num_embeddings, features, and the sum, mean or max over each bag by hand",
        twin=_bag_twin,
    ),
)
