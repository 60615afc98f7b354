"""Small models in the manner of torchvision and timm: what their code does and other code seldom does."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchjax_bridge import port
from torchjax_bridge.errors import PortError
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
    norms = _Norm(4), _Norm(5, nn.Identity()), _Norm(6, nn.LeakyReLU(0.3))
    convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
    ported = _ported(nn.Sequential(*(layer for pair in zip(convs, norms, strict=True) for layer in pair)))
    assert ported.source.count("(nnx.BatchNorm):") == 1
    for made in ("Norm(4, nnx.silu,", "Norm(5, lambda x: x,", "Norm(6, lambda x: leaky_relu(x, 0.3),"):
        assert made in ported.source
    alike = _ported(nn.Sequential(convs[0], norms[0], nn.Conv2d(4, 5, 3), _Norm(5)))
    assert "nnx.silu(x)" in alike.source  # where all have one, it is code


class _LayerNorm2d(nn.LayerNorm):
    """timm's, of a map with the channels in torch's place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """timm's, under the name of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight, self.bias)


def test_a_subclass_that_adds_nothing_to_its_layer_is_that_layer() -> None:
    head = [nn.Flatten(2), nn.Linear(16, 6), Linear(6, 16), _Scaled(16, 3)]
    ported = _ported(nn.Sequential(nn.Conv2d(3, 8, 5, 2), _LayerNorm2d(8), *head))
    assert [line for line in ported.source.splitlines() if line.startswith("class ")] == [
        "class Scaled(nnx.Linear):",
        "class Sequential(nnx.Module):",
    ]


class _Sized(nn.Module):
    """timm's MViT: the size of the map goes from block to block beside its places."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Conv2d(3, 3, 2, 2)

    def forward(self, x: Tensor, size: list[int]) -> tuple[Tensor, list[int]]:
        x = self.pool(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size))
        return x.flatten(2).transpose(1, 2), [*x.shape[2:]]


class _SizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Sized(), _Sized()])

    def forward(self, x: Tensor) -> Tensor:
        size = [*x.shape[2:]]
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x, size = block(x, size)
        return x


class _Cached(nn.Module):
    """timm's LeViT: a table of biases is read by distances, and kept while the model evaluates."""

    def __init__(self, heads: int, side: int) -> None:
        super().__init__()
        places = torch.stack(torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).abs()
        self.register_buffer("numbers", apart[0] * side + apart[1], persistent=False)
        self.biases = nn.Parameter(torch.randn(heads, side * side))
        self.qk = nn.Linear(8, 16)
        self.heads = heads
        self.cache: list[Tensor] = []

    def train(self, mode: bool = True) -> "_Cached":
        self.cache = []
        return super().train(mode)

    def bias(self) -> Tensor:
        if self.training:
            return self.biases[:, self.numbers]
        if not self.cache:
            self.cache.append(self.biases[:, self.numbers])
        return self.cache[0]

    def forward(self, x: Tensor) -> Tensor:
        n, length = x.shape[:2]
        q, k = self.qk(x).view(n, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attn = q @ k.transpose(-2, -1) + self.bias()
        return x + attn.softmax(-1).mean(1) @ x


def test_what_is_kept_in_evaluation_is_computed_in_both_modes_by_one_class() -> None:
    net = nn.Sequential(_Cached(2, 6), _Cached(4, 6)).eval()
    x = torch.randn(2, 36, 8)
    net(x)  # now it keeps the biases
    ported = _ported(net, x)
    assert ported.source.count("distance_numbers(6, 6)") == 1
    assert "deterministic" not in ported.source


def test_sizes_beside_a_tensor_go_from_module_to_module() -> None:
    _ported(_SizedNet())


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


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 1) for width in (4, 5, 6))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [conv(x) for conv in self.convs]


class _Pyramids(nn.Module):
    """timm's HRNet: each layer of a list reads a value of its own, and its result goes on beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = _Branches()
        self.incre = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (4, 5, 6))
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stage(x)
        y = self.incre[0](maps[0])
        for incre, down, given in zip(self.incre[1:], self.down, maps[1:], strict=True):
            y = incre(given) + down(y)
        return y


def test_layers_of_a_list_that_read_values_of_their_own_are_no_loop_over_one_value() -> None:
    _ported(_Pyramids())


class _OtherBias(nn.Module):
    """The second Swin: a Linear is not called, its weight is used with a bias of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.qkv = nn.Linear(12, 9, bias=False)
        self.q_bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).reshape(x.shape[0], -1, 12)
        return F.linear(x, self.qkv.weight, self.q_bias.repeat(3))


def test_the_weight_of_a_linear_that_is_not_called_is_that_of_torch() -> None:
    _ported(_OtherBias())


class _Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5))

    def get_bias(self) -> Tensor:
        return self.table * 2


class _Biased(nn.Module):
    """timm's MaxViT: a module that is never called gives its tensor by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.bias = _Bias()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.bias.get_bias()


def test_the_tensors_of_a_module_that_is_not_called_are_in_the_port() -> None:
    ported = _ported(nn.Sequential(_Biased()), torch.randn(2, 4))
    assert 'self.bias = nnx.Dict({"table": nnx.Param(' in ported.source


class _Relative(nn.Module):
    """timm's ``RelPosMlp``: what it holds runs in a method of its own; ``periods`` of its ``RotaryEmbedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 5))
        self.blocks = nn.ModuleList([nn.Linear(5, 5)])
        self.scale = nn.Parameter(torch.rand(5))
        self.register_buffer("places", torch.tensor([[0.5, 1.0], [2.0, 3.0]]), persistent=False)

    def get_bias(self) -> Tensor:
        return self.blocks[0](self.mlp(self.places) * self.scale).mean(0)


class _Periods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("periods", torch.tensor([0.5, 1.0, 2.0, 3.0]), persistent=False)

    def embed(self, x: Tensor) -> Tensor:
        return x / self.periods


class _WithRelative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.bias = _Relative()
        self.rope = _Periods()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rope.embed(x)) + self.bias.get_bias()


def test_what_a_method_of_a_module_calls_is_in_the_port() -> None:
    _ported(_WithRelative(), torch.randn(2, 4))
    with pytest.raises(PortError, match="'bias' is not called"):
        port(_WithRelative(), torch.randn(2, 4), to="linen")


class _ConvAct(nn.Sequential):
    """torchvision's ``Conv2dNormActivation``: a Sequential of its own class, with one activation or another."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(nn.Conv2d(3, 3, 3), act)


def test_a_sequential_of_its_own_class_keeps_each_activation() -> None:
    ported = _ported(nn.Sequential(_ConvAct(nn.ReLU()), _ConvAct(nn.Hardswish())))
    assert "nnx.relu" in ported.source
    assert "nnx.hard_swish" in ported.source


class _Columns(nn.Module):
    """A recogniser of text: a recurrent layer over the columns of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(3, 8, 3, padding=1), nn.LSTM(96, 16, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.rnn(self.conv(x).permute(0, 3, 1, 2).flatten(2))[0])


class _Joined(nn.Module):
    """Layers over features that no single layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(3, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm1d(16), nn.PReLU(16)
        self.rnn, self.mix = nn.GRU(16, 16, batch_first=True), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.norm(torch.cat([self.a(x), self.b(x)], 1))).transpose(1, 2)
        x = self.rnn(x)[0]
        return self.mix(x, x, x)[0]


def test_layers_whose_features_no_width_explains_are_told_what_the_port_gives_them() -> None:
    _ported(_Columns())
    _ported(_Joined(), torch.randn(2, 3, 10))


class _Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


def test_a_subclass_of_a_linear_keeps_the_order_of_its_outputs() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 4), nn.Flatten(), nn.Sequential(_Subclass(8, 16), nn.ReLU()), _Subclass(16, 4)
    )
    images = torch.randn(2, 3, 4, 4)
    ported = port(module, images)
    got = np.asarray(ported.model(jnp.asarray(images.permute(0, 2, 3, 1).numpy())))
    np.testing.assert_allclose(got, module(images).detach().numpy(), rtol=1e-5, atol=1e-5)


class _Shortcut(nn.Module):
    """CoAtNet's: an optional layer in which another is optional, by an argument that is None without it."""

    def __init__(self, width: int, out: int, settings: dict[str, int]) -> None:
        super().__init__()
        self.shortcut = _Shrink(width, out) if settings["stride"] == 2 else nn.Identity()
        self.norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, 4 * out, 3, stride=settings["stride"], padding=1)
        self.conv2 = nn.Conv2d(4 * out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.conv1(self.norm(x)))


class _Shrink(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.expand = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.pool(x))


class _Universal(nn.Module):
    """MobileNetV4's: a layer that some blocks lack is the only one that reads an argument with a default."""

    def __init__(self, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1)
        if kernel:
            self.middle = nn.Conv2d(2 * width, 2 * width, kernel, stride, kernel // 2, groups=2 * width)
        else:
            self.middle = nn.Identity()
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.middle(self.expand(x)))


def test_a_layer_that_a_block_lacks_is_not_made_by_the_default_of_its_argument() -> None:
    given = (3, 2), (3, 1), (3, 1), (3, 1), (0, 1), (3, 1)
    source = _ported(nn.Sequential(*(_Universal(3, kernel, stride) for kernel, stride in given))).source
    assert "stride is not None" not in source


def test_an_optional_layer_is_there_also_where_its_own_arguments_are_none() -> None:
    stages = [(4, 4, 2), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2)]
    blocks = (_Shortcut(width, out, {"stride": stride}) for width, out, stride in stages)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks)
    ported = port(module.eval(), torch.randn(2, 3, 16, 16))
    assert ported.source.count("class Shortcut") == ported.source.count("class Shrink") == 1


class _Mixed(nn.Module):
    """iFormer's stages: rows of other layers in other numbers."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        make = {"c": lambda: nn.Conv2d(4, 4, 1), "n": lambda: nn.BatchNorm2d(4), "p": lambda: _Parted()}
        self.blocks = nn.Sequential(*(make[kind]() for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class _Parted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_rows_of_layers_with_little_in_common_are_classes_of_their_own() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), *map(_Mixed, ("pp", "ppcpnpppp", "pcnpp", "cc"))).eval()
    ported = port(module, torch.randn(2, 3, 8, 8))
    assert ported.source.count("else []") <= 3


class _Points(nn.Module):
    """PointNet's: the largest of many values that are computed alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.max(F.relu(self.bn(self.conv(x))), 2)[0])


@pytest.mark.every(2)
@pytest.mark.parametrize("quick", [False, True])
def test_the_gradient_of_a_maximum_is_that_of_an_optimized_program(quick: bool) -> None:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick)
    try:
        for seed in range(2):
            torch.manual_seed(seed)
            assert port(_Points().eval(), torch.randn(2, 3, 9)).proof is not None
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_layers_whose_weight_a_hook_of_torch_computes_are_ported(norm: Any) -> None:
    module = nn.Sequential(norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), norm(nn.Conv1d(8, 2, 1))).eval()
    x = torch.randn(2, 4, 9)
    got = np.asarray(port(module, x).model(jnp.asarray(x.numpy())))
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-5, atol=1e-5)


class _Filled(nn.Module):
    def __init__(self, least: Any, use: Any) -> None:
        super().__init__()
        self.linear, self.least, self.use = nn.Linear(4, 4), least, use
        self.register_buffer("width", torch.tensor(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.linear(x))


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("least", "use"),
    [
        (-math.inf, lambda own, x: torch.softmax(x.masked_fill(x < x.mean(-1, keepdim=True), own.least), -1)),
        ((0.0, math.inf), lambda own, x: x.clamp(*own.least)),
        (math.inf, lambda own, x: torch.where(x > -99, x, own.least)),
        (0.0, lambda own, x: torch.where(x > -99, x, math.nan)),
        (0.0, lambda own, x: F.pad(x, (own.width, 0))),
    ],
)
def test_infinite_settings_and_numbers_in_buffers_that_are_not_saved(least: Any, use: Any) -> None:
    module, x = _Filled(least, use).eval(), torch.randn(3, 4)
    got = np.asarray(port(module, torch.randn(2, 4)).model(jnp.asarray(x.numpy())))
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_width_that_a_saved_buffer_holds_is_refused() -> None:
    module = _Filled(0.0, lambda own, x: F.pad(x, (own.saved, 0)))
    module.register_buffer("saved", torch.tensor(2))
    with pytest.raises(PortError, match=r"F\.pad by widths that a tensor's value decides"):
        port(module, torch.randn(2, 4))
