"""The networks and their Flax twins, and which network a checkpoint belongs to."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from examples.cifar10.networks import NETWORKS, Network, recognise
from torchjax_bridge import plan
from torchjax_bridge.errors import CheckpointError

NET, RESNET20 = NETWORKS
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize(("network", "parameters"), [(NET, 62_006), (RESNET20, 269_722)])
def test_the_networks_have_the_sizes_of_their_papers(network: Network, parameters: int) -> None:
    assert sum(p.numel() for p in network.make_torch().parameters()) == parameters


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_every_weight_has_one_place_in_either_twin(network: Network) -> None:
    net = network.make_torch()
    twins = (
        nnx.eval_shape(lambda: network.make_nnx(rngs=nnx.Rngs(0))),
        jax.eval_shape(network.make_linen().init, jax.random.key(0), IMAGE),
    )
    for twin in twins:
        assert plan(net, twin, rules=network.rules).ok


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_a_network_is_recognised_by_the_names_of_its_weights(network: Network) -> None:
    state = network.make_torch().state_dict()
    assert recognise(state) is network
    del state["conv1.weight"]
    assert recognise(state) is network


def test_weights_of_another_network_are_refused() -> None:
    state = {"encoder.weight": torch.ones(1), "decoder.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"neither Net nor ResNet-20: it holds encoder.weight, decoder"):
        recognise(state)


def test_loading_keeps_the_bits_and_forgives_old_files_their_lack_of_counters() -> None:
    state = RESNET20.make_torch().state_dict()
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    loaded = RESNET20.load(old)
    assert not loaded.training
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in old.items())


def test_loading_lists_every_fault_at_once() -> None:
    state = NET.make_torch().state_dict()
    del state["fc2.bias"], state["conv1.weight"]
    state["fc4.weight"] = torch.ones(1)
    state["fc3.bias"] = torch.ones(11)
    state["fc1.bias"] = state["fc1.bias"].double()
    with pytest.raises(CheckpointError) as caught:
        NET.load(state)
    assert str(caught.value).split("\n") == [
        "the checkpoint does not fit Net:",
        "  mismatch: fc1.bias is (120,) torch.float64, not (120,) torch.float32",
        "  mismatch: fc3.bias is (11,) torch.float32, not (10,) torch.float32",
        "  missing: conv1.weight",
        "  missing: fc2.bias",
        "  unexpected: fc4.weight",
    ]
