"""No size of the example is baked into a port, or the port says so."""

import dataclasses
import inspect
import linecache
import math
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from torchjax_bridge import port
from torchjax_bridge.errors import ArgumentError, PortError


def _agree(module: nn.Module, model: object, x: Tensor) -> None:
    images = x.dim() == 4
    given = jnp.asarray((x.permute(0, 2, 3, 1) if images else x).contiguous().numpy())
    got = np.asarray(model(given))  # type: ignore[operator]
    want = module(x).detach()
    want = want.permute(0, 2, 3, 1) if want.dim() == 4 else want
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


class _Forgets(nn.Module):
    """Sizes that Python turns into plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.interpolate(y, size=(int(y.shape[2]) * 2, int(y.shape[3] * 3)), mode="bilinear")
        return y.mean((2, 3)).view(len(x), 2, -1).flatten(1)


def test_plain_numbers_get_the_size_that_they_came_from() -> None:
    module = _Forgets().eval()
    ported = port(module, torch.randn(2, 3, 8, 12))
    assert ported.notes == ()
    for shape in ((2, 3, 8, 12), (5, 3, 8, 12), (1, 3, 10, 6)):
        _agree(module, ported.model, torch.randn(shape))


class _Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * math.ceil(x.shape[2] / 3)


def test_a_number_that_is_no_size_is_a_condition() -> None:
    ported = port(_Rounds(), torch.randn(2, 3, 8, 8))
    (note,) = ported.notes
    assert note.startswith("inputs where torch's axis 2 has the example's size of 8: `return x * math.ceil(")
    assert note in " ".join(ported.source.split())


class _ByBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + math.ceil(x.shape[0] / 2)


def test_a_number_that_depends_on_the_batch_size_is_refused() -> None:
    with pytest.raises(PortError, match="is no size of a tensor"):
        port(_ByBatch(), torch.randn(2, 3))


class _Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = [row * 2 for row in x]
        return torch.stack(rows)


def test_code_that_runs_once_for_each_example_is_refused() -> None:
    with pytest.raises(PortError, match="torch makes"):
        port(_Loops(), torch.randn(2, 3))


class _Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 0).all()):
            return x
        return x * 2


def test_a_decision_by_values_is_refused_until_it_is_accepted_by_its_line() -> None:
    x = torch.randn(2, 3) - 5
    with pytest.raises(PortError) as refused:
        port(_Decides(), x)
    advice = next(word for word in str(refused.value).split() if word.startswith("assume="))
    line = advice.split('"')[1]
    ported = port(_Decides(), x, assume=[line])
    assert "(x > 0).all()" in ported.notes[0]
    _agree(_Decides(), ported.model, x)
    with pytest.raises(ArgumentError, match="decide nothing"):
        port(_Decides(), x, assume=["other.py:1"])


class _Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x[:, ::2].mul_(3)
        y = x[:, 1:]
        y += 1
        return x


def test_a_write_to_a_part_is_a_write_to_the_whole() -> None:
    ported = port(_Halves(), torch.randn(2, 5))
    _agree(_Halves(), ported.model, torch.randn(3, 5))


class _Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(b=x, a=x[:, :1])


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return b - a * self.scale


def test_keyword_arguments_in_another_order_are_told_apart() -> None:
    ported = port(_Swapped(), torch.randn(2, 5))
    _agree(_Swapped(), ported.model, torch.randn(3, 5))


def test_a_model_on_the_meta_device_is_ported_without_values() -> None:
    with torch.device("meta"):
        module, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.ones(2, 3, 8, 8)
    ported = port(module, x)
    assert ported.proof is None
    leaves = jax.tree.leaves(nnx.state(ported.model))
    assert len(leaves) == 4
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


class _Convolution(nn.Module):
    def __init__(self, width_in: int, width_out: int, **settings: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, bias=False, **settings)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def test_kernels_that_are_square_in_some_instances_alone_stay_tuples() -> None:
    module = nn.Sequential(
        _Convolution(3, 4, kernel_size=(1, 7), padding=(0, 3)),
        _Convolution(4, 3, kernel_size=(7, 1), padding=(3, 0)),
        _Convolution(3, 3, kernel_size=1),
    )
    ported = port(module, torch.randn(2, 3, 8, 8))
    assert "(1, 1)" in ported.source
    _agree(module, ported.model, torch.randn(3, 3, 8, 8))


class _Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in range(x.size(1)):
            state = torch.tanh(state + x[:, step])
        return state


def test_a_loop_over_a_sequence_holds_for_its_length_and_says_so() -> None:
    ported = port(_Steps(), torch.randn(2, 3, 4))
    assert "torch.tanh(state + x[:, step])" in ported.notes[0]


def test_a_normalized_vector_of_zeros_has_the_gradient_of_torch() -> None:
    class Normalized(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.normalize(x, dim=1)

    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    model = port(Normalized(), x).model
    weights = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    given = x.clone().requires_grad_()
    (Normalized()(given) * weights).sum().backward()
    got = jax.grad(lambda x: (model(x) * jnp.asarray(weights.numpy())).sum())(jnp.asarray(x.numpy()))
    assert given.grad is not None
    np.testing.assert_allclose(got, given.grad.numpy(), rtol=1e-5)


class _Decoder(nn.Module):
    """A loop over an axis that is neither a batch nor the length of a sequence of features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        y = self.fc(source).sum(0)
        for step in range(target.size(0)):
            y = torch.tanh(self.fc(y) + target[step][:, None])
        return y


def test_a_loop_over_an_axis_of_another_input_is_a_condition() -> None:
    ported = port(_Decoder(), torch.randn(5, 2, 4), torch.randint(0, 9, (3, 2)), verify=False)
    (note,) = ported.notes
    assert note.startswith("inputs where axis 0 of torch's 'target' has the example's size of 3: `")
    assert "torch.tanh(self.fc(y) + target[step]" in note


def test_the_axes_with_which_a_port_differs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchjax_bridge.porting._port.holds_for", lambda *_: False)
    (note,) = port(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 9)).notes
    sizes = "torch's axes 2 and 3 have the example's sizes of 8 and 9"
    assert note == f"inputs where {sizes}: with larger ones the port differs from torch"


class _Frames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, :, frame].mean((2, 3)) * frame for frame in range(x.shape[2])])


def test_a_loop_over_frames_is_a_condition() -> None:
    (note,) = port(_Frames(), torch.randn(2, 3, 4, 5, 5)).notes
    assert note.startswith("inputs where torch's axis 2 has the example's size of 4: `return torch.stack(")


class _Masked(nn.Module):
    """Lengths first: the size of the first axis is that of both axes of the mask, too."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = torch.softmax(mask, 1)
        return torch.einsum("ts,snd->tnd", weights, x) * x.shape[0]


def test_a_length_that_is_the_size_of_several_axes_is_tried_with_all_of_them() -> None:
    ported = port(_Masked(), torch.randn(3, 2, 4), torch.randn(3, 3))
    assert not ported.notes
    x, mask = torch.randn(6, 5, 4), torch.randn(6, 6)
    got = ported.model(jnp.asarray(x.numpy()), jnp.asarray(mask.numpy()))
    np.testing.assert_allclose(np.asarray(got), _Masked()(x, mask).numpy(), rtol=1e-5, atol=1e-5)


class _Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc(x).squeeze() * scale


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_one_that_torch_squeezes_is_a_condition(batch: int) -> None:
    (note,) = port(_Squeezes(), torch.randn(batch, 4)).notes
    assert "batches of two or more" in note


def test_a_number_among_the_arguments_is_a_condition() -> None:
    ported = port(_Squeezes(), torch.randn(3, 4), kwargs={"scale": 2.0})
    assert "Holds for scale=2.0 in every call." in ported.source


class _OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.view(4))


def test_a_module_that_takes_one_example_alone_is_ported() -> None:
    (note,) = port(_OneAtATime(), torch.randn(1, 4)).notes
    assert "a batch of 1: the torch module itself fails with another one" in note


def test_the_error_of_the_module_is_that_for_the_inputs_of_the_caller() -> None:
    with pytest.raises(ArgumentError, match=r"1x3 and 4x2"):
        port(nn.Sequential(nn.Linear(4, 2)), torch.randn(1, 3))


@dataclasses.dataclass
class _Tokens:
    tokens: Tensor
    sizes: tuple[int, int]


class _Sizes(NamedTuple):
    tokens: Tensor
    sizes: tuple[int, int]


_CONTAINERS = {
    "dataclass": _Tokens,
    "namedtuple": _Sizes,
    "dict": lambda tokens, sizes: {"sizes": sizes, "tokens": tokens},
    "tuple": lambda tokens, sizes: (tokens, [sizes, {"again": sizes[0]}]),
}


def _opened(out: Any) -> tuple[Tensor, tuple[int, int]]:
    """What one of the containers holds."""
    if isinstance(out, dict):
        return out["tokens"], out["sizes"]
    if isinstance(out, _Tokens | _Sizes):
        return out.tokens, out.sizes
    tokens, (sizes, _) = out
    return tokens, sizes


class _Embeds(nn.Module):
    def __init__(self, kind: str, weights: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 2, stride=2) if weights else nn.Identity()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.proj(x)
        return _CONTAINERS[self.kind](y.flatten(2).transpose(1, 2), (y.shape[2], y.shape[3]))


class _Restores(nn.Module):
    def __init__(self, kind: str, weights: bool) -> None:
        super().__init__()
        self.embed = _Embeds(kind, weights)
        self.conv = nn.Conv2d(8 if weights else 3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens, (height, width) = _opened(self.embed(x))
        return self.conv(tokens.transpose(1, 2).reshape(len(x), -1, height, width))


@pytest.mark.every(3)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", _CONTAINERS)
def test_sizes_in_whatever_a_module_returns_stay_sizes(kind: str, weights: bool) -> None:
    module = _Restores(kind, weights).eval()
    ported = port(module, torch.randn(2, 3, 8, 12))
    for shape in ((2, 3, 8, 12), (3, 3, 6, 4)):
        _agree(module, ported.model, torch.randn(shape))


class _Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, out: Any) -> Tensor:
        tokens, (height, width) = _opened(out)
        return self.conv(tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)).relu() / height


class _Hands(nn.Module):
    """One class that is given sizes, twice, of other inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = _Shapes(), _Shapes()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        halved = x[:, :, ::2, ::2]
        first, second = (
            stage(_CONTAINERS[self.kind](y.flatten(2).transpose(1, 2), (y.shape[2], y.shape[3])))
            for stage, y in ((self.first, x), (self.second, halved))
        )
        return first.mean((2, 3)) + second.mean((2, 3))


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", _CONTAINERS)
def test_sizes_in_whatever_a_module_is_given_stay_sizes(kind: str) -> None:
    module = _Hands(kind).eval()
    ported = port(module, torch.randn(2, 3, 8, 12))
    for shape in ((2, 3, 8, 12), (3, 3, 6, 4)):
        _agree(module, ported.model, torch.randn(shape))


class _Held(nn.Module):
    """DeBERTa's and Longformer's: sizes that are held in tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 4))

    def forward(self, x: Tensor) -> Tensor:
        span = torch.tensor(x.shape[1])
        half = torch.div(x.shape[1], 2, rounding_mode="trunc")
        rows = self.table[20 - span : span + 20 : 2]
        return (x @ rows.T).reshape(len(x), half, -1) * half + x.new_zeros(len(x), half, 1)


def test_sizes_that_tensors_hold_are_sizes() -> None:
    module = _Held().eval()
    ported = port(module, torch.randn(2, 6, 4))
    for shape in ((2, 6, 4), (3, 10, 4)):
        _agree(module, ported.model, torch.randn(shape))


class _EndsByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : (x.sum() > 0).long() + 1]


def test_a_value_that_a_tensor_holds_is_no_size() -> None:
    with pytest.raises(PortError):
        port(_EndsByValue(), torch.ones(2, 6))


class _ShapedByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view((x.sum() > 0).long() * 2, -1)


def test_a_shape_that_a_value_decides_is_refused_in_these_words() -> None:
    with pytest.raises(PortError, match="a size that a tensor's value decides"):
        port(_ShapedByValue(), torch.ones(2, 6))


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: x.pow(2).mean(1),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x.std(-1),
        lambda x: x.amax(1) - x.min(1).values,
        lambda x: x.logsumexp(1),
    ],
)
def test_the_order_of_a_map_that_is_reduced_as_a_whole_does_not_matter(reduce: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return reduce(self.conv(x).view(len(x), -1))

    module = Net().eval()
    ported = port(module, torch.randn(2, 3, 8, 12))
    assert ported.notes == ()
    assert "transpose" not in ported.source
    for shape in ((2, 3, 8, 12), (3, 3, 5, 7)):
        _agree(module, ported.model, torch.randn(shape))


def test_where_the_largest_of_a_map_lies_is_counted_in_the_order_of_torch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(1).argmax(1)

    module = Net().eval()
    _agree(module, port(module, torch.randn(2, 3, 8, 8)).model, torch.randn(3, 3, 8, 8))


class _Powers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.numel() ** -0.5 + x / x.shape[1] ** 0.5


class _Scalars(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, np.prod(x.shape[1:])) * np.float32(0.5) * np.sqrt(2)


def test_powers_of_sizes_are_no_condition() -> None:
    assert "example" not in port(_Powers(), torch.randn(2, 3, 4)).source


def test_scalars_of_numpy_are_numbers() -> None:
    source = port(_Scalars(), torch.randn(2, 3, 4)).source
    assert "np." not in source.replace("jnp.", "")
    # np.prod forgets what it multiplied.
    assert "inputs where torch's axis 2 has the example's size of 4: with" in " ".join(source.split())


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


class _ScaledBySizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Scale(), _Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, x.shape[1] ** -0.5), scale=1 / x.shape[0])


def test_a_number_of_sizes_is_an_argument_as_a_size_is() -> None:
    module = _ScaledBySizes()
    ported = port(module, torch.randn(2, 5, 4))
    assert "scale: float" in ported.source
    assert "example" not in ported.source
    for shape in ((2, 5, 4), (3, 7, 4)):
        _agree(module, ported.model, torch.randn(shape))


class _Checked(nn.Module):
    """torch's own module asks whether the channels are those of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_what_torch_checks_of_sizes_is_no_condition() -> None:
    notes = port(_Checked(), torch.randn(2, 3, 8, 8)).notes
    assert not any("decides as for the example" in note for note in notes)


class _OfTorch(nn.Module):
    """A module of torch's own that decides by a size, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] < 3 else self.linear(x)


class _Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _OfTorch()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_decision_of_torch_s_own_code_is_said_to_be_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "return x if x.shape[1] < 3 else self.linear(x)"
    assert any(f"sizes that `{line}`" in note for note in port(_Calls(), torch.randn(2, 5, 4)).notes)
    code = _OfTorch.forward.__code__.replace(co_filename=str(Path(torch.__file__).parent / "own.py"))
    monkeypatch.setattr(_OfTorch, "forward", types.FunctionType(code, globals()))
    source = Path(inspect.getfile(_Calls)).read_text()
    lines = source.splitlines(keepends=True)
    monkeypatch.setitem(linecache.cache, code.co_filename, (len(source), None, lines, code.co_filename))
    notes = port(_Calls(), torch.randn(2, 5, 4)).notes
    assert any(
        f"`{line}` of torch's own (own.py:" in n and "called by `return self.part(x)`" in n for n in notes
    )
