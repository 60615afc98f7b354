"""With inputs, models that leave questions leave none, and what is converted computes what torch computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen, nnx
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Flatten, parity
from torchjax_bridge.weights.flatten import record_orders


class Own(nn.Module):
    """A torch model of these layers, with a forward that is given."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


class Flax(nnx.Module):
    """Its twin: the layer of each name, and a call that is given."""

    def __init__(self, call: Callable[..., Any], parts: dict[str, nn.Module]) -> None:
        self.run = call
        for name, part in parts.items():
            setattr(self, name, _twin(part))

    def __call__(self, *args: Any) -> Any:
        return self.run(self, *args)


def _twin(part: nn.Module) -> Any:
    rngs = nnx.Rngs(0)
    match part:
        case nn.Conv2d():
            stride = part.stride
            return nnx.Conv(
                part.in_channels,
                part.out_channels,
                part.kernel_size,
                strides=stride,
                padding="VALID",
                rngs=rngs,
            )
        case nn.ConvTranspose2d():
            sizes = part.in_channels, part.out_channels, part.kernel_size
            return nnx.ConvTranspose(*sizes, padding="VALID", transpose_kernel=True, rngs=rngs)
        case nn.Linear():
            return nnx.Linear(part.in_features, part.out_features, rngs=rngs)
        case nn.BatchNorm1d():
            norm = {"momentum": 0.9, "use_running_average": True, "use_fast_variance": False}
            return nnx.BatchNorm(part.num_features, **norm, rngs=rngs)
        case nn.LayerNorm():
            return nnx.LayerNorm(part.normalized_shape[0], epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        case nn.LSTM():
            return nnx.RNN(nnx.OptimizedLSTMCell(part.input_size, part.hidden_size, rngs=rngs), rngs=rngs)
        case _:
            raise NotImplementedError(part)


def _flat(x: Any) -> Any:
    return x.reshape(len(x), -1)


def _patches(x: Any) -> Any:
    return x.reshape(-1, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 12)


def _images(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


IMAGE = _images(3, 4, 4)
VECTOR = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride)


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, nn.Module], tuple[Any, ...], str]] = {
    "a classifier behind a flatten": (
        lambda s, x: s.fc2(F.relu(s.fc1(torch.flatten(s.conv(x), 1)))),
        lambda s, x: s.fc2(nnx.relu(s.fc1(_flat(s.conv(x))))),
        {"conv": conv(3, 16), "fc1": nn.Linear(64, 64), "fc2": nn.Linear(64, 10)},
        (IMAGE,),
        'Flatten("fc1", (16, 2, 2))',
    ),
    "as alexnet, with dropout and a view by sizes": (
        lambda s, x: s.fc(F.dropout(F.max_pool2d(s.conv(x), 2).view(x.size(0), 16 * 2 * 2), 0.5, s.training)),
        lambda s, x: s.fc(_flat(nnx.max_pool(s.conv(x), (2, 2), (2, 2)))),
        {"conv": conv(3, 16), "fc": nn.Linear(64, 16)},
        (_images(3, 6, 6),),
        'Flatten("fc", (16, 2, 2))',
    ),
    "two heads on different maps": (
        lambda s, x: (s.near(s.conv1(x).reshape(len(x), -1)), s.far(s.conv2(s.conv1(x)).flatten(1))),
        lambda s, x: (s.near(_flat(s.conv1(x))), s.far(_flat(s.conv2(s.conv1(x))))),
        {"conv1": conv(3, 4), "conv2": conv(4, 16, 1), "near": nn.Linear(16, 3), "far": nn.Linear(64, 16)},
        (IMAGE,),
        'Flatten("near", (4, 2, 2)) Flatten("far", (16, 2, 2))',
    ),
    "a norm over flattened features": (
        lambda s, x: s.fc(F.relu(s.norm(s.conv(x).flatten(1)))),
        lambda s, x: s.fc(nnx.relu(s.norm(_flat(s.conv(x))))),
        {"conv": conv(3, 16), "norm": nn.BatchNorm1d(64), "fc": nn.Linear(64, 5)},
        (IMAGE,),
        'Flatten("norm", (16, 2, 2)) Flatten("fc", (16, 2, 2))',
    ),
    "a flatten in two steps": (
        lambda s, x: s.fc(s.conv(x).flatten(2).sigmoid().flatten(1)),
        lambda s, x: s.fc(_flat(nnx.sigmoid(s.conv(x)))),
        {"conv": conv(3, 16), "fc": nn.Linear(64, 5)},
        (IMAGE,),
        'Flatten("fc", (16, 2, 2))',
    ),
    "an autoencoder": (
        lambda s, x: s.up(F.relu(s.lift(s.code(s.conv(x).flatten(1)))).view(-1, 16, 2, 2)),
        lambda s, x: s.up(nnx.relu(s.lift(s.code(_flat(s.conv(x))))).reshape(-1, 2, 2, 16)),
        {
            "conv": conv(3, 16), "code": nn.Linear(64, 6), "lift": nn.Linear(6, 64),
            "up": nn.ConvTranspose2d(16, 3, 3),
        },
        (IMAGE,),
        'Flatten("code", (16, 2, 2)) Flatten("lift", (16, 2, 2), output=True)',
    ),
    "a map of a sum with a norm, and a layer that reads the vector": (
        lambda s, z: (s.up(s.norm(s.a(z) + s.b(z)).view(-1, 16, 2, 2)), s.side(s.norm(s.a(z) + s.b(z)))),
        lambda s, z: (lambda h: (s.up(h.reshape(-1, 2, 2, 16)), s.side(h)))(s.norm(s.a(z) + s.b(z))),
        {
            "a": nn.Linear(5, 64), "b": nn.Linear(5, 64), "norm": nn.BatchNorm1d(64), "side": nn.Linear(64, 3),
            "up": nn.ConvTranspose2d(16, 3, 2),
        },
        (VECTOR,),
        'Flatten("a", (16, 2, 2), output=True) Flatten("b", (16, 2, 2), output=True) Flatten("norm", (16, 2, 2)) '
        'Flatten("side", (16, 2, 2))',
    ),
    "a flattened map plus a vector": (
        lambda s, x, y: s.fc(s.conv(x).flatten(1) + s.side(y)),
        lambda s, x, y: s.fc(_flat(s.conv(x)) + s.side(y)),
        {"conv": conv(3, 16), "side": nn.Linear(5, 64), "fc": nn.Linear(64, 64)},
        (IMAGE, VECTOR),
        'Flatten("side", (16, 2, 2), output=True) Flatten("fc", (16, 2, 2))',
    ),
    "joined maps": (
        lambda s, x: s.fc(torch.cat([s.a(x), s.b(x)], dim=1).flatten(1)),
        lambda s, x: s.fc(_flat(jnp.concatenate([s.a(x), s.b(x)], -1))),
        {"a": conv(3, 4), "b": conv(3, 12), "fc": nn.Linear(64, 5)},
        (IMAGE,),
        'Flatten("fc", (16, 2, 2))',
    ),
    "columns in a recurrent layer": (
        lambda s, x: s.rnn(s.conv(x).permute(0, 3, 1, 2).flatten(2))[0],
        lambda s, x: (lambda h: s.rnn(h.transpose(0, 2, 1, 3).reshape(2, 2, -1)))(s.conv(x)),
        {"conv": conv(3, 8), "rnn": nn.LSTM(16, 6, batch_first=True)},
        (IMAGE,),
        'Flatten("rnn", (8, 2))',
    ),
    "channels last in torch too": (
        lambda s, x: s.fc(s.conv(x).permute(0, 2, 3, 1).reshape(len(x), -1)),
        lambda s, x: s.fc(_flat(s.conv(x))),
        {"conv": conv(3, 16), "fc": nn.Linear(64, 5)},
        (IMAGE,),
        "",
    ),
    "shuffled channels": (
        lambda s, x: s.fc(s.conv(x).view(-1, 4, 4, 2, 2).transpose(1, 2).reshape(-1, 16, 2, 2).flatten(1)),
        lambda s, x: s.fc(_flat(s.conv(x).reshape(-1, 2, 2, 4, 4).swapaxes(3, 4))),
        {"conv": conv(3, 16), "fc": nn.Linear(64, 5)},
        (IMAGE,),
        'Flatten("fc", (16, 2, 2))',
    ),
    "patches by a view, as einops writes them": (
        lambda s, x: (
            s.fc(x.view(-1, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 12)) + s.conv(x).sum()
        ),
        lambda s, x: s.fc(_patches(x)) + s.conv(x).sum(),
        {"conv": conv(3, 4), "fc": nn.Linear(12, 6)},
        (IMAGE,),
        "",
    ),
    "patches with their channels first": (
        lambda s, x: s.fc(F.unfold(x, 2, stride=2).transpose(1, 2)) + s.conv(x).sum(),
        lambda s, x: s.fc(_patches(x)) + s.conv(x).sum(),
        {"conv": conv(3, 4), "fc": nn.Linear(12, 6)},
        (IMAGE,),
        'Flatten("fc", (3, 2, 2))',
    ),
    "mixed tokens and channels": (
        lambda s, x: (lambda t: s.head(
            s.channels(t + s.back(F.gelu(s.tokens(s.norm(t).transpose(1, 2)))).transpose(1, 2)).mean(1)
        ))(s.conv(x).flatten(2).transpose(1, 2)),
        lambda s, x: (lambda t: s.head(
            s.channels(
                t + s.back(nnx.gelu(s.tokens(s.norm(t).swapaxes(1, 2)), approximate=False)).swapaxes(1, 2)
            ).mean(1)
        ))(s.conv(x).reshape(2, 4, 12)),
        {
            "conv": conv(3, 12, 2, 2), "norm": nn.LayerNorm(12), "tokens": nn.Linear(4, 24),
            "back": nn.Linear(24, 4), "channels": nn.Linear(12, 24), "head": nn.Linear(24, 10),
        },
        (IMAGE,),
        "",
    ),
    "a gate of half a width, a first token beside a mean": (
        lambda s, x: (lambda t: s.head(torch.cat([t[:, 0], t[:, 1:].mean(1)], -1)))(
            (lambda a, b: s.out(a * b.sigmoid()))(*s.up(s.conv(x).flatten(2).mT).chunk(2, -1))
        ),
        lambda s, x: (lambda t: s.head(jnp.concatenate([t[:, 0], t[:, 1:].mean(1)], -1)))(
            (lambda a, b: s.out(a * nnx.sigmoid(b)))(*jnp.split(s.up(s.conv(x).reshape(2, 4, 8)), 2, -1))
        ),
        {"conv": conv(3, 8, 2, 2), "up": nn.Linear(8, 24), "out": nn.Linear(12, 8), "head": nn.Linear(16, 10)},
        (IMAGE,),
        "",
    ),
    "attention by equations": (
        lambda s, x: (lambda q, k, v: s.out(
            torch.einsum("...qk,...kd->...qd", torch.einsum("n q d, n k d -> n q k", q, k), v)
        ))(*s.up(s.conv(x).flatten(2).mT).chunk(3, -1)),
        lambda s, x: (lambda q, k, v: s.out(q @ k.swapaxes(1, 2) @ v))(
            *jnp.split(s.up(s.conv(x).reshape(2, 4, 8)), 3, -1)
        ),
        {"conv": conv(3, 8, 2, 2), "up": nn.Linear(8, 36), "out": nn.Linear(12, 8)},
        (IMAGE,),
        "",
    ),
    "pooled in two ways": (
        lambda s, x: (
            lambda m: s.fc(torch.cat([m.mean((2, 3)), F.adaptive_max_pool2d(m, 1).flatten(1)], 1))
        )(s.conv(x)),
        lambda s, x: (lambda m: s.fc(jnp.concatenate([m.mean((1, 2)), m.max((1, 2))], -1)))(s.conv(x)),
        {"conv": conv(3, 8), "fc": nn.Linear(16, 10)},
        (IMAGE,),
        "",
    ),
}  # fmt: skip


def _perturbed(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    for part in parts.values():
        for tensor in part.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.5 + 0.1)
    return parts


@pytest.mark.every(3)
@pytest.mark.parametrize("case", slow_but([*CASES][::2], CASES))
def test_a_run_answers_every_question_and_the_conversion_agrees_with_torch(case: str) -> None:
    forward, call, parts, inputs, flattened = CASES[case]
    module = Own(forward, **_perturbed(parts)).eval()
    template = nnx.eval_shape(lambda: Flax(call, parts))
    assert not plan(module, template).ok
    made = plan(module, template, inputs=inputs)
    assert made.faults == ()
    assert made.assumed == ()
    assert " ".join(map(str, made.flattened)) == flattened
    model = to_flax(module, template, inputs=inputs)
    arrays = [jnp.asarray((x.movedim(1, -1) if x.ndim == 4 else x).numpy()) for x in inputs]
    with torch.no_grad():
        expected = module(*inputs)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(model(*arrays)), strict=True):
        ours = ours.permute(0, 2, 3, 1) if ours.ndim == 4 else ours
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    back = to_state_dict(model, module, inputs=inputs)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    assert to_flax(module, template, rules=[*made.flattened, *_none(made, module)]) is not None
    assert parity(module, model, *inputs).ok


def _none(made: Any, module: nn.Module) -> list[Flatten]:
    """What a caller without inputs says of all other layers."""
    said = {(rule.torch, rule.output) for rule in made.flattened}
    linears = [name for name, part in module.named_children() if isinstance(part, nn.Linear)]
    readers = [*linears, *(n for n, p in module.named_children() if isinstance(p, nn.LSTM | nn.BatchNorm1d))]
    return [
        *(Flatten(name, None) for name in readers if (name, False) not in said),
        *(Flatten(name, None, output=True) for name in linears if (name, True) not in said),
    ]


def _pair(forward: Callable[..., Any], **parts: nn.Module) -> tuple[Any, Any]:
    return Own(forward, **parts).eval(), nnx.eval_shape(lambda: Flax(lambda s: s, parts))


def test_what_only_the_flax_model_decides_is_asked_with_inputs_too() -> None:
    """Images that no convolution reads may go into Flax in either order; with one channel there is no order."""
    module, template = _pair(lambda s, x: s.fc(x.flatten(1)), fc=nn.Linear(48, 5))
    (fault,) = plan(module, template, inputs=IMAGE).faults
    assert 'rules=[Flatten("fc", (3, 4, 4))] if it does, or Flatten("fc", None)' in fault.message
    assert plan(module, template, inputs=IMAGE, rules=[Flatten("fc", None)]).ok
    gray, template = _pair(lambda s, x: s.fc(x.flatten(1)), fc=nn.Linear(16, 5))
    assert plan(gray, template, inputs=_images(1, 4, 4)).ok


@pytest.mark.parametrize("joined", ["beside a vector", "half of it", "frames"])
def test_features_of_which_a_part_is_a_flattened_map_are_refused(joined: str) -> None:
    def forward(s: Any, x: Any) -> Any:
        maps = s.conv(x)
        match joined:
            case "beside a vector":
                return s.fc(torch.cat([maps.flatten(1), s.side(x.sum((2, 3)))], 1))
            case "half of it":
                return s.fc(torch.cat([maps.flatten(1)[:, :32], maps.flatten(1)[:, 32:]], 1)[:, :48])
            case _:
                return s.fc(maps.view(-1, 2, 16, 2, 2).flatten(1))

    module, template = _pair(forward, conv=conv(3, 16), side=nn.Linear(3, 64), fc=nn.Linear(128, 5))
    module.fc = nn.Linear({"beside a vector": 128, "half of it": 48, "frames": 128}[joined], 5)
    template = nnx.eval_shape(lambda: Flax(lambda s: s, dict(module.named_children())))
    faults = plan(module, template, inputs=IMAGE).faults
    assert "fc" in [fault.path for fault in faults]
    assert plan(module, template, inputs=IMAGE, rules=[Flatten("fc", None), Flatten("side", None)]).ok


def test_a_function_that_is_not_known_ends_the_knowledge() -> None:
    def forward(s: Any, x: Any) -> Any:
        return s.fc(torch.linalg.inv_ex(s.conv(x)).inverse.flatten(1))

    module, template = _pair(forward, conv=conv(3, 16), fc=nn.Linear(64, 5))
    (fault,) = plan(module, template, inputs=IMAGE).faults
    assert "takes 64 inputs in a model with feature maps" in fault.message
    assert "Pass inputs=" not in fault.message


def test_a_linear_whose_output_goes_into_an_unknown_function_may_become_a_map() -> None:
    def forward(s: Any, z: Any) -> Any:
        return s.up(torch.linalg.inv_ex(s.fc(z).view(-1, 16, 2, 2)).inverse)

    module, template = _pair(forward, fc=nn.Linear(5, 64), up=nn.ConvTranspose2d(16, 3, 2))
    assert [fault.path for fault in plan(module, template, inputs=VECTOR).faults] == ["fc"]


def test_the_word_of_the_caller_prevails_unless_torch_flattens_another_map() -> None:
    module, template = _pair(lambda s, x: s.fc(s.conv(x).flatten(1)), conv=conv(3, 16), fc=nn.Linear(64, 5))
    assert plan(module, template, inputs=IMAGE, rules=[Flatten("fc", None)]).flattened == ()
    with pytest.raises(
        errors.PlanError, match=r"Flatten says \(8, 4, 2\), and with these inputs torch flattens"
    ):
        to_flax(module, template, inputs=IMAGE, rules=[Flatten("fc", (8, 4, 2))])


def test_parity_takes_the_word_of_the_caller_or_of_the_run_whichever_the_numbers_bear_out() -> None:
    forward, call, parts, inputs, _ = CASES["a classifier behind a flatten"]
    module = Own(forward, **parts).eval()

    def first(s: Any, x: Any) -> Any:
        return s.fc2(nnx.relu(s.fc1(_flat(s.conv(x).transpose(0, 3, 1, 2)))))

    own = Flax(call, parts)
    turned = Flax(first, parts)
    right = to_flax(module, turned, inputs=inputs, rules=[Flatten("fc1", None)])
    wrong = to_flax(module, turned, inputs=inputs)
    assert parity(module, to_flax(module, own, inputs=inputs), *inputs).ok
    assert parity(module, right, *inputs).ok
    assert not parity(module, wrong, *inputs).ok
    assert "flatten order" in str(parity(module, wrong, *inputs))


ROTATED: dict[str, tuple[Callable[..., Any], str]] = {
    "the channels of a map": (lambda x: (x + x.roll(1, 1)).flatten(1), "map"),
    "the rows of a map": (lambda x: (x + x.flip(2)).flatten(1), "map"),
    "halves of the channels": (lambda x: (x + torch.cat([x[:, 8:], x[:, :8]], 1)).flatten(1), "map"),
    "a flattened map": (lambda x: x.flatten(1) + x.flatten(1).flip(1), "unknown"),
    "a list of places": (lambda x: x.flatten(1) + x.flatten(1)[:, [*range(63, -1, -1)]], "unknown"),
    "joined halves of a flattened map": (
        lambda x: x.flatten(1) + torch.cat([x.flatten(1)[:, 32:], x.flatten(1)[:, :32]], 1), "unknown",
    ),
    "features, as rotary embeddings do": (
        lambda x: (lambda m: m + torch.cat([-m[:, 8:], m[:, :8]], 1))(x.mean((2, 3))).repeat(1, 4), "plain",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROTATED)
def test_an_axis_to_which_entries_of_its_own_are_added_in_another_order(case: str) -> None:
    rotate, kind = ROTATED[case]
    module, _ = _pair(lambda s, x: s.fc(rotate(s.conv(x))), conv=conv(3, 16), fc=nn.Linear(64, 5))
    assert record_orders(module, (IMAGE,), {}).reads[id(module.fc)].kind == kind


def _over(x: torch.Tensor, size: int, at: Any) -> torch.Tensor:
    """Zeros over a part of which a flattened map is written."""
    whole = x.new_zeros(len(x), size)
    whole[at] = x.flatten(1)
    return whole


def _swapped(x: torch.Tensor) -> torch.Tensor:
    """The second half of the features over the first."""
    x = x.clone()
    x[:, :32] = x[:, 32:]
    return x


VIEWS: dict[str, tuple[Callable[..., Any], tuple[str, tuple[int, ...]]]] = {
    "a permutation by names": (lambda x: x.movedim(1, -1).flatten(1), ("plain", ())),
    "parts side by side": (lambda x: torch.cat(x.split(8, 1), 1).flatten(1), ("map", (16, 2, 2))),
    "every second channel": (lambda x: x[:, ::2].repeat(1, 2, 1, 1).flatten(1), ("map", (16, 2, 2))),
    "an expanded pixel": (lambda x: x.mean((2, 3), True).expand(-1, -1, 2, 2).flatten(1), ("unknown", (16, 2, 2))),
    "one image at a time": (lambda x: torch.stack([*x]).flatten(1), ("map", (16, 2, 2))),
    "memory as another shape": (lambda x: x.as_strided((len(x), 64), (64, 1)), ("map", (16, 2, 2))),
    "a diagonal": (lambda x: torch.diagonal(x, 0, 2, 3).repeat(1, 1, 2).flatten(1), ("unknown", ())),
    "windows that overlap": (lambda x: x.unfold(1, 8, 4)[:, :2].flatten(1), ("mixed", (2, 2, 2, 8))),
    "picked channels": (lambda x: x[:, torch.arange(16)].flatten(1), ("map", (16, 2, 2))),
    "a mask of channels": (lambda x: x[:, torch.ones(16, dtype=torch.bool)].flatten(1), ("map", (16, 2, 2))),
    "picked pixels in each image": (lambda x: x[:, :, torch.eye(2).long()[0]].flatten(1), ("map", (16, 2, 2))),
    "a list of channels": (lambda x: x[:, [*range(16)]].flatten(1), ("unknown", ())),
    "a function that writes over it": (lambda x: x.tril_().flatten(1), ("unknown", ())),
    "another type of the same memory": (
        lambda x: torch.view_as_real(torch.view_as_complex(x)).flatten(1), ("unknown", ()),
    ),
    "pairs as complex numbers": (
        lambda x: torch.view_as_complex(x.mean(1)).abs().repeat(1, 32), ("unknown", ()),
    ),
    "a tensor that is written to": (lambda x: _over(x, 64, slice(None)), ("map", (16, 2, 2))),
    "every column that is written to": (
        lambda x: _over(x, 64, (slice(None), slice(0, 64))), ("map", (16, 2, 2)),
    ),
    "some columns that are written to": (
        lambda x: _over(x, 128, (slice(None), slice(0, 64)))[:, :64], ("mixed", (16, 2, 2)),
    ),
    "halves in another order": (lambda x: _swapped(x.flatten(1)), ("unknown", ())),
    "part of a flattened map": (lambda x: x.flatten(1)[:, :32].repeat(1, 2), ("mixed", (16, 2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_tells_by_its_strides_what_became_of_the_axes(case: str) -> None:
    view, order = VIEWS[case]
    module, _ = _pair(lambda s, x: s.fc(view(s.conv(x))), conv=conv(3, 16), fc=nn.Linear(64, 5))
    assert record_orders(module, (IMAGE,), {}).reads[id(module.fc)] == order


def test_layers_that_only_training_calls_are_seen_too() -> None:
    def forward(s: Any, x: Any) -> Any:
        maps = s.conv(x)
        return (s.fc(maps.mean((2, 3))), s.aux(maps.flatten(1))) if s.training else s.fc(maps.mean((2, 3)))

    module, template = _pair(forward, conv=conv(3, 16), fc=nn.Linear(16, 5), aux=nn.Linear(64, 5))
    assert plan(module, template, inputs=IMAGE).flattened == (Flatten("aux", (16, 2, 2)),)
    assert not module.training


def test_a_model_that_decides_by_values_runs_with_values() -> None:
    def forward(s: Any, x: Any) -> Any:
        return s.fc(s.conv(x).flatten(1)) if x.sum() > 0 else s.fc(s.conv(x).permute(0, 2, 3, 1).flatten(1))

    module, template = _pair(forward, conv=conv(3, 16), fc=nn.Linear(64, 5))
    assert plan(module, template, inputs=IMAGE.abs()).flattened == (Flatten("fc", (16, 2, 2)),)
    assert plan(module, template, inputs=-IMAGE.abs()).flattened == ()


def test_keyword_arguments_go_into_the_run() -> None:
    class Masked(Own):
        def forward(self, x: Any, *, scale: Any) -> Any:
            return self.fc((self.conv(x) * scale).flatten(1))

    parts: dict[str, nn.Module] = {"conv": conv(3, 16), "fc": nn.Linear(64, 5)}
    template = nnx.eval_shape(lambda: Flax(lambda s: s, parts))
    for inputs, kwargs in [
        (IMAGE, {"scale": torch.ones(16, 1, 1)}),
        (None, {"x": IMAGE, "scale": torch.ones(1)}),
    ]:
        made = plan(Masked(lambda s: s, **parts), template, inputs=inputs, kwargs=kwargs)
        assert made.flattened == (Flatten("fc", (16, 2, 2)),)


class Keyword(nn.Module):
    def forward(self, *, x: Any) -> Any:
        return x


def test_inputs_that_cannot_be_run_are_one_clear_error() -> None:
    module, template = _pair(lambda s, x: s.fc(x), fc=nn.Linear(64, 5))
    with pytest.raises(errors.ArgumentError, match="Own fails on these inputs"):
        plan(module, template, inputs=VECTOR)
    with pytest.raises(errors.ArgumentError, match=r"takes \(\*, x.*missing a required.*kwargs=\{\.\.\.\}"):
        plan(Keyword(), template, inputs=())
    with pytest.raises(errors.ArgumentError, match="a state_dict cannot run"):
        to_flax(module.state_dict(), template, inputs=VECTOR)
    for inputs in ({"x": VECTOR}, [VECTOR]):
        with pytest.raises(errors.ArgumentError, match="inputs= is a"):
            plan(module, template, inputs=inputs)


def test_a_model_on_the_meta_device_and_its_inputs_need_no_values() -> None:
    module, template = _pair(lambda s, x: s.fc(s.conv(x).flatten(1)), conv=conv(3, 16), fc=nn.Linear(64, 5))
    assert plan(module.to("meta"), template, inputs=IMAGE).flattened == (Flatten("fc", (16, 2, 2)),)


def test_what_a_hook_does_to_the_order_is_followed() -> None:
    module, template = _pair(lambda s, x: s.fc(s.conv(x).flatten(1)), conv=conv(3, 16), fc=nn.Linear(64, 5))
    module.conv.register_forward_hook(lambda m, args, out: out.permute(0, 2, 3, 1).reshape(out.shape))
    made = plan(module, template, inputs=IMAGE)
    assert made.ok
    assert made.flattened == ()  # the features are those of a map with its channels last


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_a_layer_whose_call_was_changed_may_change_the_order_too(way: str) -> None:
    parts = {"conv": conv(3, 16), "norm": nn.BatchNorm1d(64), "fc": nn.Linear(64, 5)}
    module, template = _pair(lambda s, x: s.fc(s.norm(s.conv(x).flatten(1))), **parts)
    norm = module.norm
    if way == "hook":
        norm.register_forward_hook(lambda m, args, out: out.view(-1, 4, 16).mT.flatten(1))
    else:
        norm.forward = lambda x: nn.BatchNorm1d.forward(norm, x).view(-1, 4, 16).mT.flatten(1)
    made = plan(module, template, inputs=IMAGE)
    assert "fc" in [fault.path for fault in made.faults]
    assert Flatten("fc", (16, 2, 2)) not in made.flattened


def test_a_flatten_behind_what_is_not_known_is_assumed_to_keep_the_order_in_a_model_without_maps() -> None:
    parts: dict[str, nn.Module] = {"fc": nn.Linear(16, 5)}
    module, template = _pair(lambda s, x: s.fc(s.flat(torch.linalg.inv_ex(x).inverse)), **parts)
    module.flat = nn.Flatten()
    assert plan(module, template, inputs=_images(1, 4, 4)).assumed
    module.run = lambda s, x: s.fc(s.flat(x))
    assert not plan(module, template, inputs=_images(1, 4, 4)).assumed


# --- linen's numbers --------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Equal layers, defined in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.second, self.first = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


class Compact(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Dense(8)(x))
        x = linen.relu(linen.Dense(8)(x))
        return linen.Dense(3)(x)


def test_linens_numbers_are_paired_in_the_order_of_torchs_calls() -> None:
    module, x = Layers(), torch.randn(2, 8)
    variables = Compact().init(jax.random.key(0), jnp.zeros((1, 8)))
    assert not plan(module, variables).ok
    made = plan(module, variables, inputs=x)
    assert made.ok
    assert any("paired in the order of their calls" in note for note in made.notes)
    filled = to_flax(module, variables, inputs=x)
    with torch.no_grad():
        np.testing.assert_allclose(Compact().apply(filled, x.numpy()), module(x), atol=1e-5)
