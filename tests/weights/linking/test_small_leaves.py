"""Many small leaves, which are copied by one call from the second push on, are pushed and pulled as all others."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import link

WIDTH = 4


def _models(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    layers = 20
    rngs = nnx.Rngs(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(layers)))
    return module, nnx.Sequential(*(nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(layers)))


def _train(module: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))


def _expected(module: Any, dtype: torch.dtype) -> list[np.ndarray[Any, Any]]:
    values = (value.detach().to(dtype) for layer in module for value in (layer.weight.t(), layer.bias))
    return [value.contiguous().view(-1).view(torch.uint8).numpy().copy() for value in values]


def _arrays(model: Any) -> list[jax.Array]:
    return [leaf.get_value() for layer in model.layers for leaf in (layer.kernel, layer.bias)]


def _bits(arrays: list[jax.Array]) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(array).reshape(-1).view(np.uint8) for array in arrays]


@pytest.mark.parametrize("cast", [None, jnp.bfloat16])
@pytest.mark.parametrize("changed_only", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_every_push_gives_the_values_of_its_time(cast: Any, changed_only: bool, share: bool) -> None:
    module, model = _models()
    both = link(module, model, dtype=cast, changed_only=changed_only, share=share)
    held: list[tuple[list[jax.Array], list[np.ndarray[Any, Any]]]] = []
    for _ in range(5):
        _train(module)
        both.push()
        expected = _expected(module, torch.float32 if cast is None else torch.bfloat16)
        assert all(map(np.array_equal, _bits(_arrays(model)), expected))
        if not share:
            held.append((_arrays(model), expected))
    for arrays, expected in held:
        fresh = [np.from_dlpack(array.view(jnp.uint8)) for array in arrays]
        assert all(np.array_equal(one.reshape(-1), other) for one, other in zip(fresh, expected, strict=True))


def _conjugated(parameter: torch.Tensor) -> None:
    parameter.data = torch.randn(WIDTH, WIDTH, dtype=torch.complex64).conj().imag


def _resized(parameter: torch.Tensor) -> None:
    values = parameter.detach().clone()
    parameter.untyped_storage().resize_(0)
    parameter.untyped_storage().resize_(values.nbytes)
    parameter.data.copy_(values + 1)


WRITES = {
    "in place": lambda parameter: parameter.data.add_(1),
    "numpy": lambda parameter: parameter.detach().numpy().__iadd__(1),
    "other memory": lambda parameter: setattr(parameter, "data", torch.randn(WIDTH, WIDTH)),
    "other strides": lambda parameter: setattr(parameter, "data", parameter.data.t()),
    "set_": lambda parameter: parameter.data.set_(torch.randn(WIDTH, WIDTH)),
    "conj": _conjugated,
    "resized": _resized,
}


def test_a_push_leaves_storage_that_can_be_resized() -> None:
    module, model = nn.Linear(600, 600), nnx.Linear(600, 600, rngs=nnx.Rngs(0))  # XLA copies it
    small, twin = _models()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for both in (link(module, model), link(small, twin)):
            for _ in range(3):
                both.push()
    finally:
        torch.set_num_threads(threads)
    for parameter in (module.weight, small[0].weight):
        assert parameter.untyped_storage().resizable()


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_seen_by_a_push(write: str) -> None:
    module, model = _models()
    both = link(module, model)
    for number in range(6):
        if number > 2:
            WRITES[write](module[3].weight)
        both.push()
        assert all(map(np.array_equal, _bits(_arrays(model)), _expected(module, torch.float32)))


def test_a_parameter_at_the_same_address_with_a_neg_bit_is_another() -> None:
    module, model = _models()
    both = link(module, model)
    values = torch.randn(WIDTH, WIDTH, dtype=torch.complex64)
    for view in [values.imag] * 3 + [values.conj().imag] * 2 + [values.imag]:
        module[3].weight = nn.Parameter(view)
        both.push()
        assert np.array_equal(model.layers[3].kernel[...], view.resolve_neg().t())


def test_a_parameter_that_was_replaced_is_followed() -> None:
    module, model = _models()
    both = link(module, model)
    for number in range(6):
        if number > 2:
            module[number].weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
            state = {key: value + 1 for key, value in module[number + 1].state_dict().items()}
            module[number + 1].load_state_dict(state, assign=True)
        both.push()
        assert all(map(np.array_equal, _bits(_arrays(model)), _expected(module, torch.float32)))


def test_a_push_of_some_copies_those_alone() -> None:
    module, model = _models()
    both = link(module, model, changed_only=True)
    for _ in range(3):
        _train(module)
        both.push()
    before = _arrays(model)
    with torch.no_grad():
        module[3].bias.add_(1)
    both.push()
    after = _arrays(model)
    assert [
        place for place, (one, other) in enumerate(zip(before, after, strict=True)) if one is not other
    ] == [7]
    assert all(map(np.array_equal, _bits(after), _expected(module, torch.float32)))


def test_a_push_that_finds_nothing_changed_starts_no_garbage_collection() -> None:
    rngs = nnx.Rngs(0)
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(1000)))
    model = nnx.Sequential(*(nnx.Linear(2, 2, rngs=rngs) for _ in range(1000)))
    both = link(module, model, changed_only=True)
    both.push()
    both.push()
    before = _arrays(model)
    collections: list[str] = []

    def note(phase: str, _: Any) -> None:
        collections.append(phase)

    gc.collect()  # so that the count of new objects begins at none
    gc.callbacks.append(note)
    try:
        both.push()
    finally:
        gc.callbacks.remove(note)
    assert not collections
    assert all(one is other for one, other in zip(before, _arrays(model), strict=True))


def test_a_pull_takes_back_what_a_push_gave() -> None:
    module, model = _models()
    both = link(module, model)
    for _ in range(3):
        _train(module)
        both.push()
        expected = _expected(module, torch.float32)
        versions = [parameter._version for parameter in module.parameters()]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        both.pull()
        assert all(map(np.array_equal, _expected(module, torch.float32), expected))
        rose = [parameter._version for parameter in module.parameters()]
        assert all(one < other for one, other in zip(versions, rose, strict=True))


def test_tensors_inside_torch_func_are_refused_by_name() -> None:
    module, model = _models()
    both = link(module, model)
    for _ in range(3):
        both.push()
    before = _arrays(model)

    class Pushing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both.push()
            return x

    pushing = Pushing()
    stacked = {key: torch.stack([value.detach()] * 2) for key, value in pushing.named_parameters()}
    with pytest.raises(TypeError, match=r"cannot share 'layers\.0\.kernel'.*torch\.func"):
        torch.func.vmap(lambda given: torch.func.functional_call(pushing, given, (torch.ones(1),)))(stacked)
    assert all(one is other for one, other in zip(before, _arrays(model), strict=True))
