"""A small language model's names in both frameworks, and a sharded checkpoint of it, for the tests of files."""

import pathlib

import torch
from flax import nnx
from torch import nn

from torchjax_bridge.weights import save_state_dict


class Mlp(nn.Module):
    """Names as a language model has them, a tie, many layers."""

    def __init__(self, width: int = 24, depth: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(depth))
        self.norm = nn.LayerNorm(width, dtype=dtype)


class NnxMlp(nnx.Module):
    def __init__(self, width: int = 24, depth: int = 4) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(10, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)


def sharded(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint in several shards, with every bit pattern in it."""
    state = Mlp().state_dict()
    for n, tensor in enumerate(state.values()):
        raw = torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=torch.manual_seed(n))
        tensor.copy_(raw.view(torch.bfloat16))
    save_state_dict(folder, state, shard_size=2048)
    return state
