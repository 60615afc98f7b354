"""The networks of the example, whose twins a person wrote, and twenty architectures for the same images."""

from functools import partial

from flax import nnx
from torch import nn

from examples.cifar10.networks import NETWORKS, Network
from torchjax_bridge import to_flax

from ..cifar import BUILDERS
from ._entry import Entry, images

__all__ = ["cifar", "example"]


def cifar() -> list[Entry]:
    """The twenty of `benchmarks.port.cifar`."""
    return [Entry("cifar", name, build, images(32), speed_batch=64) for name, build in BUILDERS.items()]


def example() -> list[Entry]:
    """``Net`` and ``ResNet-20``, each with its twin."""
    return [
        Entry("example", one.name, one.make_torch, images(32), speed_batch=64, twin=partial(_twin, one))
        for one in NETWORKS
    ]


def _twin(network: Network, module: nn.Module) -> nnx.Module:
    template = nnx.eval_shape(lambda: network.make_nnx(rngs=nnx.Rngs(0)))
    return to_flax(module, template, rules=network.rules)
