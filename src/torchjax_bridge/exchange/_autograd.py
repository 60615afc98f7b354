"""Whether a tensor carries a forward-mode tangent, which DLPack would drop without a word.

Reverse mode needs no help: ``requires_grad`` says it. For forward mode the public question
(``forward_ad.unpack_dual``) costs as much as a third of a crossing, while torch's own module keeps the number
of the open dual level in a private variable; so that is read first, where it exists.
"""

import torch
from torch.autograd import forward_ad

__all__ = ["carries_tangent"]


def carries_tangent(tensor: torch.Tensor) -> bool:
    """Whether this is a dual tensor of the ``forward_ad.dual_level`` that is open."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # none is open
        return False
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:
        # torch does not look for tangents below autograd, in the kernel of an operator: there a tensor is a
        # primal. It does not look into a wrapper either, which is refused for having no memory.
        return False
