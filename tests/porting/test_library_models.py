"""Small models in the manner of torchvision and timm: what their code does and other code seldom does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchjax_bridge import port
from torchjax_bridge.porting import Port

_IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def _ported(module: nn.Module, *inputs: Any) -> Port:
    torch.manual_seed(0)
    ported = port(module.eval(), *(inputs or (_IMAGES,)), training="required")
    assert ported.proof is not None
    assert all(check.difference <= 1e-5 for check in ported.proof.checks)
    return ported


class _Norm(nn.BatchNorm2d):
    """timm's ``BatchNormAct2d``: a BatchNorm that calls the function on its own tensors, then an activation."""

    def __init__(self, features: int, act: nn.Module | None = None) -> None:
        super().__init__(features)
        self.drop = nn.Identity()
        self.act = act or nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        own = self.running_mean, self.running_var, self.weight, self.bias
        assert self.momentum is not None
        x = F.batch_norm(x, *own, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


def test_a_batch_norm_with_an_activation_of_its_own_derives_from_that_of_flax() -> None:
    ported = _ported(nn.Sequential(nn.Conv2d(3, 4, 3), _Norm(4), nn.Conv2d(4, 5, 3), _Norm(5)))
    assert ported.source.count("(nnx.BatchNorm):") == 1
    assert "nnx.silu(x)" in ported.source


class _Pooled(nn.Sequential):
    """torchvision's ``ASPPPooling``: a Sequential with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class _Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        plain = [nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()) for _ in range(2)]
        self.convs = nn.ModuleList([*plain, _Pooled(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.convs)


def test_layers_beside_a_layer_that_has_another_name_in_flax_find_their_places() -> None:
    ported = _ported(nn.Sequential(nn.Sequential(_Pyramid(), nn.Conv2d(4, 4, 3), nn.ReLU())))
    assert "+ 0" not in ported.source  # with which Python's sum starts


class _Patches(nn.Module):
    """timm's ``PatchEmbed``: a number is a pair under the same name, and one size of image is asserted."""

    def __init__(self, patch_size: Any, size: Any = 12) -> None:
        super().__init__()
        patch_size, size = ((one, one) for one in (patch_size, size))
        self.patch_size, self.size = patch_size, size
        self.proj = nn.Conv2d(3, 8, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[-2] == self.size[0], "another size")
        return self.proj(x).flatten(2).transpose(1, 2)


class _TwoScales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleList([_Patches(4), _Patches(6)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([patches(x) for patches in self.patches], 1)


def test_patches_of_several_sizes_are_one_class_and_an_asserted_size_is_no_crash() -> None:
    ported = _ported(_TwoScales())
    assert ported.source.count("class ") == 2


class _Dense(nn.Module):
    """torchvision's ``_DenseLayer``: an argument called as a builtin is, a tensor or a list of them."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2, 3, padding=1)

    def forward(self, input: Any) -> Tensor:
        input = [input] if isinstance(input, Tensor) else input
        return self.conv(torch.cat(input, 1))


class _DenseBlock(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({f"layer{place}": _Dense(3 + 2 * place) for place in range(3)})

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def test_an_argument_may_be_called_as_a_builtin_of_python_is() -> None:
    _ported(_DenseBlock())


class _Residual(nn.Module):
    """timm's ``ResidualBlock`` of EfficientViT: another module, nothing at all, or an identity beside the block."""

    def __init__(self, kernel: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.main = nn.Conv2d(3, 3, kernel)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y


def test_an_identity_that_a_condition_asks_for_is_a_setting_of_one_class() -> None:
    blocks = [_Residual(1), _Residual(1, nn.Identity()), _Residual(3)]
    ported = _ported(nn.Sequential(*blocks))
    assert ported.source.count("class _Residual") + ported.source.count("class Residual") == 1
    assert "if self.shortcut:" in ported.source
    _ported(nn.Sequential(*blocks, _Residual(1, nn.Conv2d(3, 3, 1))))
