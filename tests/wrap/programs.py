"""Inputs for a JAX function that is called from torch, and a look at what it was compiled to."""

import torch


def leaf(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()


def program_of(f):
    """The program of the only call so far."""
    (entry,) = f._traces._entries.values()
    return entry.value.program
