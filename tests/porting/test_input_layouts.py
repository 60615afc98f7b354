"""Inputs of four axes: images have their channels last, others keep torch's order. Outputs that are records."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchjax_bridge import port


class Heads(nn.Module):
    """Attention over caches ``(N, heads, length, features)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) + mask
        return self.fc(scores.softmax(-1) @ k)


def test_heads_and_masks_keep_the_order_of_torch() -> None:
    module = Heads()
    ported = port(module, torch.randn(2, 2, 5, 6), torch.randn(2, 2, 7, 6), torch.randn(2, 1, 5, 7))
    assert "Inputs are laid out as in PyTorch." in ported.source
    assert "swapaxes" not in ported.source.replace("jnp.swapaxes(k, 2, 3)", "")
    assert "transpose" not in ported.source
    given = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 6, 6), torch.randn(3, 1, 4, 6)
    want = module(*given).detach().numpy()
    got = np.asarray(ported.model(*(jnp.asarray(one.numpy()) for one in given)))
    assert np.abs(got - want).max() <= 1e-5


class Maps(nn.Module):
    """Features ``(N, H, W, C)``, as torch takes them, beside an image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        return self.fc(features) * self.conv(image).permute(0, 2, 3, 1)


def test_an_image_beside_features_is_one() -> None:
    module = Maps()
    ported = port(module, torch.randn(2, 5, 6, 3), torch.randn(2, 3, 5, 6))
    features, image = torch.randn(2, 5, 6, 3), torch.randn(2, 3, 5, 6)
    got = ported.model(jnp.asarray(features.numpy()), jnp.asarray(image.permute(0, 2, 3, 1).numpy()))
    assert np.abs(np.asarray(got) - module(features, image).detach().numpy()).max() <= 1e-5
    assert "transpose" not in ported.source


@dataclass
class Record:
    states: Tensor
    loss: Tensor | None = None
    parts: list[Tensor | tuple[Tensor, Tensor]] | None = None


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Record:
        y = self.fc(x)
        return Record(y, parts=[y * 2, (y, y + 1)])


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, given: Record) -> Record:
        found = self.inner(given.states)
        return Record(found.states * found.parts[1][1], loss=found.states.mean())


def test_dataclasses_are_dicts_in_the_port() -> None:
    module = Outer()
    ported = port(module, Record(torch.randn(3, 4)))
    assert isinstance(ported.proof.gradients, float)
    x = torch.randn(5, 4)
    got = ported.model({"states": jnp.asarray(x.numpy())})
    with torch.no_grad():
        want = module(Record(x))
    assert got.keys() == {"states", "loss", "parts"}
    assert np.abs(np.asarray(got["states"]) - want.states.numpy()).max() <= 1e-5
    assert abs(float(got["loss"]) - float(want.loss)) <= 1e-5


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q = self.fc(x).view(x.size(0), -1, 2, 3).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=seen[:, None, None, :]).transpose(1, 2)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    module = Attends()
    ported = port(module, torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))
    x, seen = torch.randn(2, 5, 6), torch.tensor([[True] * 4 + [False], [False] * 5])
    got = ported.model(jnp.asarray(x.numpy()), jnp.asarray(seen.numpy()))
    want = module(x, seen).detach()
    assert not want[1].any()
    assert np.abs(np.asarray(got) - want.numpy()).max() <= 1e-5


class _Across(nn.Module):
    """A map, what a Linear makes of its rows, and the products of its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x)
        return {"map": x, "rows": self.fc(x), "pooled": x.mean((2, 3))}


class _Generates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 64), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(self.fc(z).view(-1, 4, 4, 4))


def test_the_header_says_which_outputs_are_laid_out_otherwise() -> None:
    def header(module: nn.Module, x: Tensor) -> str:
        return " ".join(port(module, x, verify=False).source.split('"""')[1].split())

    of_rows = header(_Across(), torch.randn(2, 3, 8, 8))
    assert "Images are ``(N, H, W, C)``. Output 2 is laid out as in PyTorch." in of_rows
    of_images = header(_Generates(), torch.randn(2, 4))
    assert "Inputs are laid out as in PyTorch. The output is ``(N, H, W, C)``." in of_images
