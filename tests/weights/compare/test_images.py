"""Images in models whose layers do not show that they are images: both orders of their channels are tried."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights import Flatten


class Patches(nn.Module):
    """A Mixer's beginning: patches of 2 x 2 pixels, and a Linear over each."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4 * channels, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, C, H, W)
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        return self.head(self.embed(x.reshape(n, -1, 4 * c)).tanh().mean(1))


class NnxPatches(nnx.Module):
    def __init__(self, act: Callable[[jax.Array], jax.Array] = jnp.tanh, channels: int = 3) -> None:
        self.embed, self.head = (nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in ((4 * channels, 6), (6, 4)))
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:  # (N, H, W, C)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return self.head(self.act(self.embed(x.reshape(n, -1, self.embed.in_features))).mean(1))


class NnxFront(NnxPatches):
    """Takes its channels in front, as torch does."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.transpose(0, 2, 3, 1))


def _image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SHAPES = [(2, 3, 4, 8), (2, 4, 4, 4), (4, 4, 4, 4), (2, 6, 6, 6)]


@pytest.mark.every(3)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("front", [False, True])
def test_images_without_a_convolution_go_in_where_the_flax_model_has_their_channels(
    shape: tuple[int, ...], front: bool
) -> None:
    module = Patches(shape[1])
    twin = to_flax(module, (NnxFront if front else NnxPatches)(channels=shape[1]))
    found = parity(module, twin, _image(*shape))
    assert found.ok, str(found)
    assert found.max_difference < 1e-5
    if front:
        assert any("went into Flax as it is" in note for note in found.notes)
    else:
        assert found.notes == ("input 0 went into Flax with its channels last",)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mistake_is_found_in_the_order_that_the_flax_model_has(shape: tuple[int, ...]) -> None:
    module = Patches(shape[1])
    found = parity(module, to_flax(module, NnxPatches(jax.nn.relu, shape[1])), _image(*shape))
    assert found.cause is not None
    assert found.first is not None
    assert found.first.torch_path == "head"
    assert "input 0 went into Flax with its channels last" in found.notes
    assert found.rows[0].ok


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 4, 4, 4)])
def test_an_order_that_was_said_and_is_not_the_model_s_is_the_cause(
    said: bool, shape: tuple[int, ...]
) -> None:
    module = Patches(shape[1])
    twin = to_flax(module, (NnxFront if said else NnxPatches)(channels=shape[1]))
    try:
        found = parity(module, twin, _image(*shape), channels_last=said)
    except (TypeError, ValueError):  # before any layer ran
        assert shape == (2, 3, 4, 8)
        return
    assert found.cause is not None
    assert f"channels_last={not said}" in found.cause.fix
    assert found.cause.proved
    assert parity(module, twin, _image(*shape), channels_last=not said).ok


def test_where_both_orders_fail_the_cause_says_that_both_were_tried() -> None:
    class Other(NnxPatches):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(jnp.sin(x + 1))

    module = Patches(4)
    cause = parity(module, to_flax(module, Other(channels=4)), _image(2, 4, 4, 4)).cause
    assert cause is not None
    assert not cause.proved
    assert "channels_last=True" in str(cause)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(27, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


class NnxPixels(nnx.Module):
    def __init__(self) -> None:
        self.fc = nnx.Linear(27, 5, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x.reshape(len(x), -1))


@pytest.mark.parametrize(("features", "last"), [((3, 3, 3), True), (None, False)])
def test_pixels_of_an_image_of_3_x_3_x_3_go_in_as_the_kernel_was_laid_out(features: Any, last: bool) -> None:
    module, rules = Pixels(), [Flatten("fc", features)]
    found = parity(module, to_flax(module, NnxPixels(), rules=rules), _image(4, 3, 3, 3), rules=rules)
    assert found.ok, str(found)
    assert ("input 0 went into Flax with its channels last" in found.notes) is last


class Series(nn.Module):
    """A Linear over the channels of a sequence ``(N, C, L)``."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.axes = nn.Linear(4, 3), axes

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.fc(x.movedim(1, -1)) + t


@pytest.mark.every(2)
@pytest.mark.parametrize("shape", [(2, 4, 7), (4, 4, 4), (2, 4, 3, 5, 2), (2, 4, 4, 4, 4)])
def test_sequences_and_volumes_are_tried_as_well(shape: tuple[int, ...]) -> None:
    class Twin(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
            return self.fc(x) + t

    module = Series(len(shape))
    found = parity(module, to_flax(module, Twin()), _image(*shape), _image(3))
    assert found.ok, str(found)
    assert "input 0 went into Flax with its channels last" in found.notes
