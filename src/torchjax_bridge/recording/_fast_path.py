"""torch's fused kernels for its own encoders, which do not do what the module says."""

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["without_fast_path"]


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Without the kernel for encoders without gradients: it takes a bias on the scores for a mask.

    It also asks of each mask whether a nested tensor could hold what it leaves.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
