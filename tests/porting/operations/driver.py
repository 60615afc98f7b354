"""Runs what a torch function becomes, for inputs whose axes stand in any order, beside the function itself."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.porting._body import Body
from torchjax_bridge.porting._helpers import HELPERS
from torchjax_bridge.porting._model import Model
from torchjax_bridge.porting._placed import Axes, Placed
from torchjax_bridge.recording import record, tensors_of
from torchjax_bridge.weights import Flatten, to_flax

Inputs = tuple[Any, ...] | Callable[[int], tuple[Any, ...]]

_SPACE: dict[str, Any] = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "math": math, "Any": Any}
for _source in HELPERS.values():
    exec(_source, _SPACE)


@dataclass
class Case:
    """A call and its inputs.

    Attributes:
        name: Of the test.
        call: What is recorded.
        inputs: The tensors, or a function that makes them for a batch size; then the code must hold for another.
        fixed: The inputs stand in torch's order.
        tolerance: Relative to the largest element of the output.
        layer: A layer, which ``call`` then takes first.
    """

    name: str
    call: Callable[..., Any]
    inputs: Inputs
    fixed: bool = False
    tolerance: float = 2e-6
    layer: nn.Module | None = None

    def __repr__(self) -> str:
        return self.name


class _Calls(nn.Module):
    def __init__(self, call: Callable[..., Any], layer: nn.Module | None) -> None:
        super().__init__()
        self.call, self.layer = call, layer

    def forward(self, *inputs: Any) -> Any:
        return self.call(*inputs) if self.layer is None else self.call(self.layer, *inputs)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, low: int = -4, high: int = 5) -> torch.Tensor:
    """Values that differ; integers between ``low`` and ``high``."""
    draw = torch.Generator().manual_seed(sum(shape) * 31 + len(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=draw).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape, generator=draw) > 0.5
    return torch.randint(max(low, 0 if dtype == torch.uint8 else low), high, shape, generator=draw).to(dtype)


def lowered(
    call: Callable[..., Any], inputs: tuple[Any, ...], orders: list[Axes], layer: nn.Module | None = None
) -> tuple[Model, Body]:
    """The code of a call whose inputs stand in these orders."""
    recording = record(_Calls(call, layer), inputs)
    model = Model(recording)
    for fault in recording.faults:
        model.fault(fault)
    values = [value for _, tree in recording.top.inputs for value in tensors_of(tree)]
    places = {value: Placed("", order) for value, order in zip(values, orders, strict=True)}
    return model, model.lower(recording.top, places)


def run(body: Body, arrays: Sequence[jax.Array], layer: Any = None) -> list[jax.Array]:
    """What the code gives, in torch's order of axes."""
    space = {**_SPACE, "self": SimpleNamespace(**body.attributes, layer=layer)}
    space.update(zip(body.names, arrays, strict=True))
    for statement in body.statements:
        exec(f"{statement.target} = {statement.text}", space)
    leaves = zip(_leaves(eval(body.result, space)), body.result_places, strict=True)
    return [
        jnp.transpose(array, [place.order.index(axis) for axis in range(len(place.order))])
        for array, place in leaves
        if isinstance(array, jax.Array)
    ]


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def as_jax(given: torch.Tensor, order: Axes) -> jax.Array:
    """A tensor as an array whose axes stand in an order; 64 bits become 32."""
    moved = given.permute(order).contiguous()
    if given.dtype == torch.bfloat16:
        return jnp.asarray(moved.float().numpy(), jnp.bfloat16)
    wide = {torch.int64: torch.int32, torch.float64: torch.float32}
    return jnp.asarray(moved.to(wide.get(given.dtype, given.dtype)).numpy())


@dataclass
class _Run:
    """One order of one case at one batch size."""

    case: Case
    body: Body
    orders: list[Axes]
    inputs: tuple[Any, ...]
    layer: Any

    @property
    def code(self) -> str:
        """The code, to be read beside a failure."""
        lines = [f"{line.target} = {line.text}" for line in self.body.statements]
        return "\n".join([f"{self.case}: {self.orders}", *lines, f"return {self.body.result}"])


def check_all(cases: Sequence[Case]) -> None:
    """The code of each case gives what torch gives; all run as one program, which compiles far quicker."""
    faults, runs = [], []
    for case in cases:
        try:
            runs += _runs(case, 1)
        except AssertionError as err:
            faults.append(f"{case}: {err}")
    refused: dict[int, Exception] = {}

    layers = [(None, None) if each.layer is None else nnx.split(each.layer) for each in runs]

    def program(arrays: list[list[jax.Array]], states: list[Any]) -> list[list[jax.Array]]:
        outputs = []
        for place, (each, given) in enumerate(zip(runs, arrays, strict=True)):
            graph, state = layers[place][0], states[place]
            try:
                outputs.append(run(each.body, given, None if graph is None else nnx.merge(graph, state)))
            except Exception as err:
                refused[place] = err
                outputs.append([])
        return outputs

    outputs = jax.jit(program)([_arrays(each) for each in runs], [state for _, state in layers])
    for place, (each, found) in enumerate(zip(runs, outputs, strict=True)):
        try:
            assert place not in refused, f"{each.code}\n{refused[place]!r}"
            _compare(each, found)
        except AssertionError as err:
            faults.append(str(err))
    assert not faults, f"{len(faults)} fail\n" + "\n\n".join(faults)


def check(case: Case, turns: int = 1) -> None:
    """The code of a case gives what torch gives.

    Args:
        case: The case.
        turns: How many orders of the axes of its inputs, drawn at random; torch's own comes after the first.
    """
    for each in _runs(case, turns):
        _compare(each, run(each.body, _arrays(each), each.layer))


def _runs(case: Case, turns: int) -> list[_Run]:
    made = case.inputs if callable(case.inputs) else lambda batch: case.inputs
    given = [made(2), made(3)] if callable(case.inputs) else [made(2)]
    ranks = [tensor.dim() for tensor in tensors_of(given[0], torch.Tensor)]
    draw = random.Random(case.name)
    plain = [tuple(range(rank)) for rank in ranks]
    mixed = [[tuple(draw.sample(range(rank), rank)) for rank in ranks] for _ in range(turns)]
    if mixed[0] == plain:
        mixed[0] = [order[::-1] for order in plain]
    drawn = [plain] if case.fixed or max(ranks, default=0) < 2 else [mixed[0], plain, *mixed[1:]]
    found = []
    for orders in drawn[:turns]:
        model, body = lowered(case.call, given[0], orders, case.layer)
        assert not model.faults, "\n".join(fault.reason for fault in model.faults)
        twin = None if case.layer is None else _twin(model, case.layer)
        found += [_Run(case, body, orders, inputs, twin) for inputs in given]
    return found


def _arrays(each: _Run) -> list[jax.Array]:
    tensors = tensors_of(each.inputs, torch.Tensor)
    return [as_jax(given, order) for given, order in zip(tensors, each.body.orders, strict=True)]


def _twin(model: Model, layer: nn.Module) -> Any:
    """The Flax twin of a layer, with its weights."""
    rules = [Flatten("", shape) for path, shape in model.flattened.items() if shape is not None]
    twin = to_flax(layer, model.twin("layer", layer).nnx(nnx.Rngs(0)), rules=rules)
    twin.eval()
    return twin


def _compare(each: _Run, found: list[jax.Array]) -> None:
    case = each.case
    with torch.no_grad():
        copies = [given.clone() if isinstance(given, torch.Tensor) else given for given in each.inputs]
        result = case.call(*copies) if case.layer is None else case.call(case.layer, *copies)
    wanted = [one for one in _leaves(result) if isinstance(one, torch.Tensor)]
    assert len(found) == len(wanted)
    for want, array in zip(wanted, found, strict=True):
        got = np.asarray(array)
        assert got.shape == tuple(want.shape), f"{each.code}\n{got.shape} for {tuple(want.shape)}"
        dtype = str(want.dtype).replace("torch.", "")
        dtype = dtype if want.is_complex() else dtype.replace("64", "32")
        assert str(got.dtype) == dtype, f"{each.code}\n{got.dtype} for {want.dtype}"
        if want.dtype.is_floating_point or want.is_complex():
            wide = np.complex128 if want.is_complex() else np.float64
            expected, actual = want.to(torch.float32 if want.dtype == torch.bfloat16 else want.dtype), got
            expected, actual = expected.resolve_conj().numpy().astype(wide), actual.astype(wide)
            size = np.abs(expected[np.isfinite(expected)]).max(initial=1e-6)
            bound = (2e-2 if want.dtype == torch.bfloat16 else case.tolerance) * size
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=bound, err_msg=each.code)
        else:
            np.testing.assert_array_equal(got, want.numpy(), err_msg=each.code)


def reasons(call: Callable[..., Any], *inputs: Any, layer: nn.Module | None = None) -> str:
    """Why a call is refused."""
    ranks = [tensor.dim() for tensor in tensors_of(inputs, torch.Tensor)]
    model, _ = lowered(call, inputs, [tuple(range(rank)) for rank in ranks], layer)
    return "\n".join(fault.reason for fault in model.faults)
