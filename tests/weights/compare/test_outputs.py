"""What parity puts side by side: outputs by their names, and arrays whose axes are split or that lack the batch."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import parity, to_flax
from torchjax_bridge.weights import LayerType, Parity

# --- outputs with names ----------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.pack = nn.Linear(4, 3), nn.Linear(4, 3), pack

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(self.one(x), self.two(x))


class NnxHeads(nnx.Module):
    def __init__(self, pack: Callable[..., Any]) -> None:
        self.one, self.two = (nnx.Linear(4, 3, rngs=nnx.Rngs(0)) for _ in range(2))
        self.pack = pack

    def __call__(self, x: jax.Array) -> Any:
        return self.pack(self.one(x), self.two(x))


class Body(nn.Module):
    """A model around the heads, whose own output has no names."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.heads = Heads(pack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.heads(x)
        return x


class NnxBody(nnx.Module):
    def __init__(self, pack: Callable[..., Any]) -> None:
        self.heads = NnxHeads(pack)

    def __call__(self, x: jax.Array) -> jax.Array:
        self.heads(x)
        return x


@dataclass
class Named:
    z: Any
    a: Any


Pair = namedtuple("Pair", ["z", "a"])


@flax.struct.dataclass
class FlaxNamed:
    a: Any
    z: Any


def _pair(one: Any, two: Any) -> Any:
    return one, two


def _dict(one: Any, two: Any) -> Any:
    return {"z": one, "a": two}


def _turned(one: Any, two: Any) -> Any:
    return {"a": two, "z": one}


ALIKE: dict[str, tuple[Any, Any]] = {
    "dict, tuple": (_dict, _pair),
    "tuple, dict": (_pair, _dict),
    "dict, dict in another order": (_dict, _turned),
    "OrderedDict, list": (lambda one, two: OrderedDict(z=one, a=two), lambda one, two: [one, two]),
    "dataclass, tuple": (Named, _pair),
    "dataclass, dict": (Named, _turned),
    "namedtuple, tuple": (Pair, _pair),
    "namedtuple, struct": (Pair, lambda one, two: FlaxNamed(z=one, a=two)),
    "dict in a tuple": (lambda *a: (_dict(*a), a[0]), lambda *a: (_turned(*a), a[0])),
    "dict in a dict, tuple": (lambda *a: {"o": _dict(*a)}, _pair),
    "more in torch": (lambda *a: {"x": a[0] + 1, **_dict(*a)}, _turned),
    "more in Flax": (_dict, lambda *a: {"x": a[0] + 1, **_turned(*a)}),
    "other names": (lambda *a: {"q": a[0], "p": a[1]}, _dict),
    "one other name": (lambda *a: {"q": a[0], "a": a[1]}, _turned),
}
CROSSED: dict[str, tuple[Any, Any]] = {
    "dict, dict": (_dict, lambda one, two: {"z": two, "a": one}),
    "dict, tuple": (_dict, lambda one, two: (two, one)),
    "tuple, dict": (lambda one, two: (two, one), _dict),
    "namedtuple, dataclass": (Pair, lambda one, two: FlaxNamed(z=two, a=one)),
    "tuple, tuple": (_pair, lambda one, two: (two, one)),
    "one other name": (lambda *a: {"q": a[0], "a": a[1]}, lambda *a: {"a": a[0], "z": a[1]}),
}


def _compare(pack: Any, other: Any, *, jit: bool = False) -> Parity:
    module = Heads(pack)
    twin = to_flax(module, NnxHeads(other))
    if jit:

        class Jitted(NnxHeads):
            def __call__(self, x: jax.Array) -> Any:
                return nnx.jit(NnxHeads.__call__)(self, x)

        twin = to_flax(module, Jitted(other))
    return parity(module, twin, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("pack", "other"), ALIKE.values(), ids=ALIKE)
def test_outputs_are_compared_by_their_names_and_else_in_order(pack: Any, other: Any) -> None:
    assert _compare(pack, other).ok


@pytest.mark.parametrize(("pack", "other"), CROSSED.values(), ids=CROSSED)
def test_outputs_that_are_exchanged_differ(pack: Any, other: Any) -> None:
    found = _compare(pack, other)
    assert found.first is not None
    assert found.first.torch_path == ""


def test_names_are_kept_where_jax_sorts_them() -> None:
    assert _compare(_dict, _turned, jit=True).ok
    assert not _compare(_dict, lambda one, two: {"z": two, "a": one}, jit=True).ok


@pytest.mark.parametrize(
    ("pack", "other", "right"), [(_dict, _pair, True), (_dict, lambda a, b: (b, a), False)]
)
def test_what_a_layer_inside_gives_is_compared_in_the_same_way(pack: Any, other: Any, right: bool) -> None:
    module = Body(pack)
    found = parity(module, to_flax(module, NnxBody(other)), torch.randn(2, 4))
    row = next(row for row in found.rows if row.torch_path == "heads")
    assert bool(row.ok) is right


def test_what_only_one_model_gives_is_noted() -> None:
    found = _compare(*ALIKE["more in torch"])
    assert "only the torch model gives 'x': not compared" in found.notes
    assert "only the Flax model gives 'x': not compared" in _compare(*ALIKE["more in Flax"]).notes


def test_that_an_output_without_a_partner_or_a_name_was_not_compared_is_noted() -> None:
    module = Heads(lambda one, two: (one, two))
    twin = to_flax(module, NnxHeads(lambda one, two: one))
    found = parity(module, twin, torch.randn(3, 4))
    assert found.ok
    assert any("2 arrays and Flax 1" in note and "only torch's first" in note for note in found.notes)
    second = parity(module, to_flax(module, NnxHeads(lambda one, two: two)), torch.randn(3, 4))
    assert not second.ok


def test_a_model_output_of_transformers_is_compared_by_name() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    kind = outputs.BaseModelOutputWithPooling
    for other, right in (
        (("last_hidden_state", "pooler_output"), True),
        (("pooler_output", "last_hidden_state"), False),
    ):
        found = _compare(
            lambda one, two: kind(last_hidden_state=one, pooler_output=two),
            lambda one, two, names=other: dict(sorted(zip(names, (one, two), strict=True), reverse=True)),
        )
        assert found.ok is right


# --- other axes ------------------------------------------------------------------------------------------


class Positions(nn.Module):
    def __init__(self, batch: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place, self.head, self.batch = nn.Embedding(5, 4), nn.Linear(4, 3), batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, 5, 4)
        return self.head(x + self.place(torch.arange(5).expand(*self.batch, 5)))


class NnxPositions(nnx.Module):
    def __init__(self, batch: tuple[int, ...], *, turned: bool = False) -> None:
        self.place, self.head = nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.batch, self.turned = batch, turned

    def __call__(self, x: jax.Array) -> jax.Array:
        ids = jnp.broadcast_to(jnp.arange(5), (*self.batch, 5))
        return self.head(x + self.place(ids[..., ::-1] if self.turned else ids))


BATCHES: list[tuple[int, ...]] = [(), (1,), (3,)]


@pytest.mark.every(2)
@pytest.mark.parametrize(("ours", "theirs"), [(a, b) for a in BATCHES for b in BATCHES if a != b])
def test_position_embeddings_with_and_without_the_batch_agree_where_their_values_do(
    ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    module, x = Positions(ours), torch.randn(3, 5, 4)
    found = parity(module, to_flax(module, NnxPositions(theirs)), x)
    assert found.ok, str(found)
    assert all(row.ok for row in found.rows)
    wrong = parity(module, to_flax(module, NnxPositions(theirs, turned=True)), x)
    assert wrong.first is not None
    assert wrong.first.torch_path == "place"


class Attention(nn.Module):
    """Heads that torch splits behind the projection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, L, 8)
        return self.out(self.query(x).relu())


class SplitHeads(nnx.Linear):
    """A projection that gives its heads apart."""

    turned = False

    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x).reshape(*x.shape[:-1], 2, 4)
        return y.reshape(*x.shape[:-1], 4, 2).swapaxes(-1, -2) if self.turned else y


class NnxAttention(nnx.Module):
    def __init__(self, *, turned: bool) -> None:
        self.query, self.out = SplitHeads(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        self.query.turned = turned

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.query(x)).reshape(*x.shape[:-1], 8))


@pytest.mark.parametrize("turned", [False, True])
def test_heads_that_are_split_agree_and_heads_that_are_crossed_do_not(turned: bool) -> None:
    module, x = Attention(), torch.randn(2, 3, 8)
    rules = [LayerType("query", nn.Linear)]
    found = parity(module, to_flax(module, NnxAttention(turned=turned), rules=rules), x, rules=rules)
    assert found.ok is not turned, str(found)
    if turned:
        assert found.first is not None
        assert found.first.torch_path == "query"


@pytest.mark.parametrize("shape", ["(N,)", "(N, N)"])
def test_models_whose_outputs_have_other_axes_differ_though_the_values_are_the_same(shape: str) -> None:
    def call(fc: nnx.Linear, x: jax.Array) -> jax.Array:
        return fc(x)[:, 0] if shape == "(N,)" else fc(x) + jnp.zeros(len(x))

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    class NnxBody(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return call(self.fc, x)

    module = Body()
    found = parity(module, to_flax(module, NnxBody()), torch.randn(3, 4))
    assert found.first is not None
    assert (found.first.torch_path, found.first.shape) == ("", (3, 1))
