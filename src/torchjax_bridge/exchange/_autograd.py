"""Whether a tensor has a forward-mode tangent, which DLPack would drop silently.

For reverse mode ``requires_grad`` is enough. For forward mode the public ``forward_ad.unpack_dual`` costs a third
of a crossing. torch keeps the current dual level in a private variable, so that is read first where it exists.
"""

import torch
from torch.autograd import forward_ad

__all__ = ["has_tangent"]


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether this is a dual tensor of the current ``forward_ad.dual_level``."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # no dual level is active
        return False
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:
        # Inside an operator's kernel, below autograd, torch cannot look for tangents: tensors there are primals.
        # Nor can it look into wrapper tensors, but those are refused because they have no memory.
        return False
