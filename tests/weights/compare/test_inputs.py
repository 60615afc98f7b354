"""Both models of a parity get inputs of their own, and the caller's inputs and torch model stay what they were."""

import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from torchjax_bridge import parity, to_flax


class Torch(nn.Module):
    """One layer, in a forward that is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.way = nn.Linear(4, 4), forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.way(self.fc, *args, **kwargs)


class Flax(nnx.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        self.fc, self.way = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.way(self.fc, *args, **kwargs)


def _compare(forward: Any, call: Any, *inputs: Any, **settings: Any) -> bool:
    module = Torch(forward)
    return parity(module, to_flax(module, Flax(call)), *inputs, **settings).ok


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (3, 4), generator=torch.Generator().manual_seed(1))


# --- a forward that writes to its input ------------------------------------------------------------------


class Batch:
    """A class of the caller's, which no registry knows."""

    def __init__(self, x: Any) -> None:
        self.x, self.rest = x, {"deep": [x]}


PLACES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], Any]]] = {
    "an argument": (lambda x: x, lambda given: given),
    "a list in a dict": (lambda x: {"b": [x], "a": None}, lambda given: given["b"][0]),
    "an object": (Batch, lambda given: given.x),
    "an object, deep": (Batch, lambda given: given.rest["deep"][0]),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize(("pack", "find"), PLACES.values(), ids=PLACES)
def test_a_forward_that_writes_to_its_input_is_compared_with_one_that_computes_the_same(
    pack: Any, find: Any, keyword: bool
) -> None:
    def forward(fc: Any, given: Any) -> Any:
        return fc(find(given).sub_(0.5))

    for shift, right in ((0.5, True), (0.0, False)):
        x = _x()
        before, given = x.clone(), pack(x)

        def call(fc: Any, given: Any, shift: float = shift) -> Any:
            return fc(find(given) - shift)

        if keyword:
            named = {"given": given}
            assert _compare(forward, call, torch_kwargs=named, flax_kwargs=named) is right
        else:
            assert _compare(forward, call, given) is right
        assert torch.equal(x, before)
        assert x._version == 0
        assert find(given) is x


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :2], lambda x: x.T], ids=["same", "part", "T"])
def test_tensors_that_share_memory_share_it_in_what_the_torch_model_is_given(view: Any) -> None:
    def forward(fc: Any, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        one.mul_(2)
        return fc(torch.cat([one, other.reshape(-1, 4)]))

    x = _x(4, 4)
    for factor in (2, 1):  # what was written to the one shows in the other
        assert _compare(
            forward,
            lambda fc, one, other, f=factor: fc(jnp.concatenate([2 * one, f * other.reshape(-1, 4)])),
            x,
            view(x),
        ) is (factor == 2)


def test_an_input_that_requires_grad_is_given_to_torch_as_one() -> None:
    def forward(fc: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(fc(x).square().sum(), x)[0]

    x = (_x().requires_grad_() * 2)[:, ::1].T.contiguous().T
    assert _compare(forward, lambda fc, x: jax.grad(lambda x: jnp.square(fc(x)).sum())(x), x)
    assert x.grad_fn is not None


def test_a_numpy_array_among_the_keywords_is_copied_for_each_model() -> None:
    def forward(fc: Any, x: torch.Tensor, *, mean: np.ndarray) -> torch.Tensor:
        mean += 1
        return fc(x - torch.from_numpy(mean))

    def call(fc: Any, x: jax.Array, *, mean: np.ndarray) -> jax.Array:
        mean += 1
        return fc(x - jnp.asarray(mean))

    mean = np.zeros(4, np.float32)
    assert _compare(forward, call, _x(), torch_kwargs={"mean": mean}, flax_kwargs={"mean": mean})
    assert not mean.any()


def test_containers_are_of_their_own_and_keep_the_order_of_their_keys() -> None:
    def forward(fc: Any, parts: dict[str, Any]) -> Any:
        parts.pop("drop")
        return fc(torch.cat(list(parts.values()), 1))

    def call(fc: Any, parts: dict[str, Any]) -> Any:
        parts.pop("drop")
        return fc(jnp.concatenate(list(parts.values()), 1))

    parts = {"z": _x(3, 1), "drop": "me", "a": _x(3, 3)}
    assert _compare(forward, call, parts)
    assert list(parts) == ["z", "drop", "a"]


def test_a_model_output_of_transformers_is_opened() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    given = outputs.BaseModelOutput(last_hidden_state=_x())
    assert _compare(
        lambda fc, given: fc(given.last_hidden_state.add_(1)),
        lambda fc, given: fc(given.last_hidden_state + 1),
        given,
    )
    assert torch.equal(given.last_hidden_state, _x())


def test_a_tensordict_is_opened() -> None:
    tensordict = pytest.importorskip("tensordict")
    given = tensordict.TensorDict({"x": _x()}, [3]).lock_()
    assert _compare(lambda fc, given: fc(given["x"].add_(1)), lambda fc, given: fc(given["x"] + 1), given)
    assert torch.equal(given["x"], _x())


# --- what is written to after a layer ----------------------------------------------------------------------


class Written(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.write = nn.Linear(4, 4), nn.Linear(4, 4), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        self.write(y, x)
        return self.second(y)


class NnxWritten(nnx.Module):
    def __init__(self, after: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
        self.first, self.second = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
        self.after = after

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.after(self.first(x), x))


@pytest.mark.parametrize(
    ("write", "after", "kind"),
    [
        (lambda y, _: functional.relu_(y), lambda y, _: jax.nn.relu(y), "activation"),
        (lambda y, x: y.add_(x), lambda y, x: y + x, "residual"),
        (lambda y, x: x.copy_(y.mul_(3)), lambda y, _: y * 3, "scale"),
    ],
)
def test_what_a_layer_gave_is_kept_as_it_gave_it(write: Any, after: Any, kind: str) -> None:
    torch.manual_seed(0)
    module = Written(write)
    assert parity(module, to_flax(module, NnxWritten(after)), _x()).ok
    found = parity(module, to_flax(module, NnxWritten(lambda y, _: y)), _x())
    assert [row.ok for row in found.rows] == [True, False, False]
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == (kind, True)


# --- the torch model is left as it was ---------------------------------------------------------------------


class Busy(nn.Module):
    """A forward that writes to everything it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.table = torch.ones(4)
        self.calls, self.cache, self.log = 0, {"keys": []}, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(x)
        self.cache["keys"].append(x)
        self.cache["last"] = x
        self.mean.add_(x.mean(0))
        self.table.mul_(2)
        self.late = x
        self.mean = self.mean * 2
        x = self.fc(x)
        self.fc.weight.data.clamp_(-0.1, 0.1)
        self.fc.bias.data = self.fc.bias.data + 1
        random.random()
        np.random.random()
        torch.rand(1)
        self.eval()
        return x


def test_a_forward_that_writes_to_its_model_leaves_it_as_it_was() -> None:
    torch.manual_seed(0)
    module = Busy()
    twin = to_flax(nn.ModuleDict({"fc": module.fc}), Flax(lambda fc, x: fc(x)))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    buffer, names = module.mean, list(vars(module))
    memory = {key: value.data_ptr() for key, value in module.state_dict().items()}
    draws = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for _ in range(2):
        assert parity(module, twin, _x()).ok
    assert list(vars(module)) == names
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert {key: value.data_ptr() for key, value in module.state_dict().items()} == memory
    assert module.mean is buffer
    assert torch.equal(module.table, torch.ones(4))
    assert (module.calls, module.cache, module.log) == (0, {"keys": []}, [])
    assert module.training
    assert module.fc.training
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == draws[1:]


def test_a_graph_that_the_caller_holds_can_be_run_backward_afterwards() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module.eval()
    x = _x().requires_grad_()
    loss = module(x).square().sum()
    layers = (
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(4, use_running_average=True, epsilon=1e-5, momentum=0.9, rngs=nnx.Rngs(0)),
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    )
    assert parity(module, to_flax(module, nnx.Sequential(*layers)), x).ok
    loss.backward()  # raises if a tensor that it saved had been written to
    assert x.grad is not None


def test_a_layer_that_raises_and_is_caught_does_not_shift_what_others_were_given() -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not this one")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky, self.fc = Picky(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.picky(x * 7)
            except ValueError:
                return self.fc(x)

    module = Tries()
    assert parity(module, to_flax(module, Flax(lambda fc, x: fc(x))), _x()).ok
    found = parity(module, to_flax(module, Flax(lambda fc, x: fc(x * 2))), _x())
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("scale", True)
