"""Dropout: layers without weights, which no plan pairs, and which have a twin like any other layer.

``Dropout1d`` to ``Dropout3d`` drop whole channels: one draw for all of space. ``AlphaDropout`` and
``FeatureAlphaDropout`` move what they drop to a value of their own; Flax has no such layer.

Settings for parity: ``rate``, and ``broadcast_dims`` with the axes of space.
"""

from torch import nn

from ._rule import Rule
from ._twin import Twin, changed

__all__ = ["RULES"]


def _twin(module: nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) -> Twin:
    rank = next((n for kind, n in _RANKS.items() if isinstance(module, kind)), 0)
    settings = changed(broadcast_dims=(tuple(range(1, 1 + rank)), ()))
    return Twin("Dropout", {"rate": module.p}, settings)


_RANKS = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def _no_alpha(module: nn.AlphaDropout | nn.FeatureAlphaDropout) -> Twin:
    raise ValueError("Flax has no dropout that keeps mean and variance; for evaluation alone, leave it out")


RULES = (
    Rule(
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        (),
        flax_types=("Dropout",),
        settings="rate=p; broadcast_dims=(1, ...) over the axes of space in Dropout1d to Dropout3d",
        twin=_twin,
    ),
    Rule((nn.AlphaDropout, nn.FeatureAlphaDropout), (), twin=_no_alpha),
)
