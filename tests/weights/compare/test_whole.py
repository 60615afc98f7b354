"""A Flax model of many shapes runs as one program, and what is recorded of it is what single operations give."""

from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights.compare import _record_flax, _recorder

WIDTHS = range(3, 17)
pytestmark = pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width + 1) for width in WIDTHS)
        self.norm = nn.BatchNorm1d(17)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x).tanh()
        return {"z": self.norm(x), "a": x}


def _forward(layers: Any, norm: Any, x: jax.Array, kind: str) -> Any:
    for place, layer in enumerate(layers):
        x = jnp.sin(layer(x)) if kind == "wrong" and place == 5 else jnp.tanh(layer(x))
    if kind == "by value" and x.sum() > 1e6:
        return x
    return {"z": norm(x), "a": x}


class NnxWide(nnx.Module):
    def __init__(self, kind: str, *, train: bool) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(width, width + 1, rngs=rngs) for width in WIDTHS])
        self.norm = nnx.BatchNorm(17, use_running_average=not train, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.kind = kind

    def __call__(self, x: jax.Array) -> Any:
        if self.kind == "transformed":
            first = nnx.remat(lambda layer, x: layer(x))(self.layers[0], x)
            return _forward([lambda _: first, *self.layers[1:]], self.norm, x, self.kind)
        return _forward(self.layers, self.norm, x, self.kind)


class LinenWide(ln.Module):
    kind: str
    train: bool

    @ln.compact
    def __call__(self, x: jax.Array) -> Any:
        first = ln.remat(ln.Dense) if self.kind == "transformed" else ln.Dense
        dense = [first(4, name="layers_0")]
        dense += [ln.Dense(width + 1, name=f"layers_{width - 3}") for width in WIDTHS[1:]]
        norm = ln.BatchNorm(not self.train, momentum=0.9, epsilon=1e-5, name="norm")
        return _forward(dense, norm, x, self.kind)


_KINDS = (
    ("right", False, True),
    ("right", True, True),
    ("wrong", False, True),
    ("by value", False, False),
    ("transformed", False, False),
)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("flavour", "kind", "train", "whole"),
    slow_but(
        [("nnx", *_KINDS[0]), ("nnx", *_KINDS[3]), ("linen", *_KINDS[0])],
        [(flavour, *kind) for flavour in ("nnx", "linen") for kind in _KINDS],
    ),
)
def test_a_model_that_runs_as_one_program_is_recorded_as_one_that_runs_by_operations(
    flavour: str, kind: str, train: bool, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = Wide().train(train), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    model: Any
    if flavour == "nnx":
        model = to_flax(module, nnx.eval_shape(lambda: NnxWide(kind, train=train)))
    else:
        linen = LinenWide(kind, train)
        shapes = LinenWide("right", train).init(jax.random.key(0), jnp.zeros((2, 3)))
        model = linen, to_flax(module, shapes)
    ran: list[Any] = []
    run_whole = _recorder.Recorder.run_whole

    def watch(self: Any, *args: Any) -> Any:
        ran.append(run_whole(self, *args))
        return ran[-1]

    monkeypatch.setattr(_recorder.Recorder, "run_whole", watch)
    found = parity(module, model, x)
    assert [one is not None for one in ran][-1] is whole
    monkeypatch.setattr(_record_flax, "_MANY_SHAPES", 10**9)
    plain = parity(module, model, x)
    assert [(r.torch_path, r.flax_path, r.ok, r.shape) for r in found.rows] == [
        (r.torch_path, r.flax_path, r.ok, r.shape) for r in plain.rows
    ]
    differences = [[row.difference for row in one.rows] for one in (found, plain)]
    assert np.allclose(*differences, rtol=1e-3, atol=1e-5, equal_nan=True)
    if kind == "wrong":
        assert found.first is not None
        assert found.first.torch_path == "layers.6"
        assert found.cause == plain.cause
    else:
        assert found.ok, str(found)
        assert ("BatchNorm1d running_var" in {row.layer for row in found.rows}) is train
