"""Each network with its Flax twins and conversion rules, and how to recognise its weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flax import linen, nnx
from torch import Tensor

from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.weights import Flatten

from . import linen_nets, nnx_nets, torch_nets


@dataclass(frozen=True)
class Network:
    """One architecture in three frameworks.

    Attributes:
        name: Its usual name.
        make_torch: Makes the torch module.
        make_nnx: Makes the nnx module, given ``rngs=``.
        make_linen: Makes the linen module.
        rules: The rules that a conversion needs in addition to the names and types of the layers.
    """

    name: str
    make_torch: Callable[[], torch.nn.Module]
    make_nnx: Callable[..., nnx.Module]
    make_linen: Callable[[], linen.Module]
    rules: Sequence[Any] = ()

    def load(self, state: Mapping[str, Tensor]) -> torch.nn.Module:
        """The torch module with the weights ``state``, in evaluation mode.

        Raises:
            CheckpointError: ``state`` does not fit; the message lists every missing, unexpected and
                mismatched tensor.
        """
        module = self.make_torch()
        wanted = module.state_dict()
        faults = [f"missing: {name}" for name in wanted if name not in state and not _is_counter(name)]
        faults += [f"unexpected: {name}" for name in state if name not in wanted]
        for name in wanted.keys() & state.keys():
            want, got = (f"{tuple(t.shape)} {t.dtype}" for t in (wanted[name], state[name]))
            if want != got:
                faults.append(f"mismatch: {name} is {got}, not {want}")
        if faults:
            lines = "".join(f"\n  {fault}" for fault in sorted(faults))
            raise CheckpointError(f"the checkpoint does not fit {self.name}:{lines}")
        # Old files lack the counters of training steps; these stay zero.
        module.load_state_dict({**wanted, **state})
        return module.eval()


NETWORKS = (
    # fc1 reads flattened feature maps of 16 channels, 5 by 5. torch flattens (channel, row, column), the Flax
    # twins (row, column, channel): the shapes agree either way, so a rule must give the order.
    Network("Net", torch_nets.Net, nnx_nets.Net, linen_nets.Net, rules=[Flatten("fc1", (16, 5, 5))]),
    # Averages each channel before its linear layer, so it needs no rule.
    Network("ResNet-20", torch_nets.ResNet20, nnx_nets.ResNet20, linen_nets.ResNet20),
)


def recognise(state: Mapping[str, Tensor]) -> Network:
    """The network that shares the most names with ``state``; `Network.load` checks whether all fit.

    Raises:
        CheckpointError: No network shares a name.
    """
    shared = {network.name: _names(network) & state.keys() for network in NETWORKS}
    best = max(NETWORKS, key=lambda network: len(shared[network.name]) / len(_names(network)))
    if not shared[best.name]:
        known = " nor ".join(network.name for network in NETWORKS)
        some = ", ".join(list(state)[:3])
        raise CheckpointError(f"the checkpoint is neither {known}: it holds {some}, ...")
    return best


def _names(network: Network) -> set[str]:
    with torch.device("meta"):  # names without memory
        return {name for name in network.make_torch().state_dict() if not _is_counter(name)}


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
