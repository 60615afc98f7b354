"""A port computes what torch computes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.port.cifar import BUILDERS
from tests.marking import slow_but
from torchjax_bridge import port


@pytest.mark.parametrize("name", slow_but(["resnet20"], BUILDERS))
def test_a_network_for_cifar_gives_what_torch_gives_at_any_batch_size(name: str) -> None:
    torch.manual_seed(0)
    module = BUILDERS[name]().eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
    model = port(module, torch.randn(2, 3, 32, 32)).model
    model.eval()
    for batch in (2, 3):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            want = module(x).numpy()
        got = np.asarray(model(jnp.asarray(x.permute(0, 2, 3, 1).numpy())))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
        torch.nn.BatchNorm2d(3, track_running_stats=False),
    ],
    ids=str,
)
def test_a_layer_is_called_as_its_twin_asks(layer: torch.nn.Module) -> None:
    module, x = torch.nn.Sequential(layer).eval(), torch.randn(2, 3, 8, 8)
    model = port(module, x).model
    model.eval()
    want = module(x).detach().permute(0, 2, 3, 1).numpy()
    got = np.asarray(model(jnp.asarray(x.permute(0, 2, 3, 1).numpy())))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
