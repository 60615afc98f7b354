"""Twenty architectures for CIFAR-10, small, written as people write them; what `port` is tried on.

Each file holds one architecture and is in a style of its own: nobody whose code is ported has read our guide.
Images are ``(N, 3, 32, 32)``, logits ``(N, 10)``; every architecture keeps the variety of its full size.
"""

from collections.abc import Callable

from torch import nn

from .airbench import airbench
from .densenet import densenet
from .dla import dla
from .dpn import dpn
from .efficientnet import efficientnet
from .googlenet import googlenet
from .mlp_mixer import mlp_mixer
from .mobilenet import mobilenet
from .mobilenetv2 import mobilenetv2
from .pnasnet import pnasnet
from .preact_resnet import preact_resnet
from .regnet import regnet
from .resnet import resnet20
from .resnext import resnext
from .senet import senet
from .shufflenet import shufflenet
from .shufflenetv2 import shufflenetv2
from .vgg import vgg
from .vit import vit
from .wide_resnet import wide_resnet

__all__ = ["BUILDERS"]

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder
    for builder in (
        airbench,
        densenet,
        dla,
        dpn,
        efficientnet,
        googlenet,
        mlp_mixer,
        mobilenet,
        mobilenetv2,
        pnasnet,
        preact_resnet,
        regnet,
        resnet20,
        resnext,
        senet,
        shufflenet,
        shufflenetv2,
        vgg,
        vit,
        wide_resnet,
    )
}
