"""A module with weights that several modules hold is one module of the port: its class makes it and hands it on."""

from collections.abc import Callable

import jax
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

from torchjax_bridge import port, to_state_dict
from torchjax_bridge.errors import PortError

_X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class _Head(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.encoder(x)))


class _Wrapped(nn.Module):
    """Holds nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 3


class _Own(nn.Module):
    """Has weights of its own, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("shift", torch.randn(4))
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x @ self.weight + self.shift)


class _Model(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            for one in part if isinstance(part, nn.ModuleList) else [part]:
                x = x + one(x)
        return x


class _Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _named() -> nn.Module:
    """The model has it under a name that it calls."""
    model = _Model()
    model.encoder = nn.Linear(4, 4)
    model.first, model.second = _Head(model.encoder), _Head(model.encoder)
    return model


def _uncalled() -> nn.Module:
    """CoaT's: the model has it under a name that it never calls."""
    model, encoder = _Blocks(), _Own()
    model.encoder = encoder
    model.blocks = nn.ModuleList([_Wrapped(_Head(encoder)) for _ in range(3)])
    return model


def _nameless() -> nn.Module:
    """No attribute of the model is it."""
    model, norm = _Model(), nn.LayerNorm(4)
    model.blocks = nn.ModuleList([_Head(norm), _Head(norm)])
    return model


def _late() -> nn.Module:
    """It is set after a module that holds it, and nnx finds it there first."""
    model, encoder = _Model(), _Own()
    model.a_head, model.z_head = _Head(encoder), _Head(encoder)
    model.encoder = encoder
    return model


def _listed() -> nn.Module:
    """A list holds it and those that hold it."""
    model, encoder = _Model(), nn.Linear(4, 4)
    model.parts = nn.ModuleList([encoder, _Head(encoder), _Wrapped(encoder)])
    return model


def _in_a_row() -> nn.Module:
    encoder = nn.Linear(4, 4)
    return nn.Sequential(encoder, nn.ReLU(), _Wrapped(encoder), nn.Tanh(), _Head(encoder))


def _two() -> nn.Module:
    """Two of one name, in turns."""
    model, one, two = _Model(), nn.Linear(4, 4), nn.Linear(4, 4)
    model.heads = nn.ModuleList([_Head(one), _Head(two), _Head(one), _Head(two)])
    return model


def _nested() -> nn.Module:
    """What is shared holds what is shared."""
    model, encoder = _Model(), nn.Linear(4, 4)
    wrapped = _Wrapped(encoder)
    model.a, model.b, model.c = _Head(wrapped), _Head(wrapped), _Head(encoder)
    return model


def _turned() -> nn.Module:
    """What is shared holds what is shared, and nnx finds it below the module that is last in torch."""
    model, norm = _Model(), nn.LayerNorm(4)
    wrapped = _Wrapped(norm)
    model.b, model.a, model.z = _Head(wrapped), _Head(wrapped), _Head(norm)
    return model


class _Stack(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


def _a_list() -> nn.Module:
    """DETR's: a list of layers that the model calls, and a module that is given the list."""
    model = _Model()
    model.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model.stack = _Stack(model.layers)
    return model


def _only_lists() -> nn.Module:
    """A list that two modules are given, and lists of its layers in another order."""
    model, one, two = _Model(), nn.Linear(4, 4), nn.Linear(4, 4)
    same = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
    model.a, model.b = _Stack(same), _Stack(same)
    model.c, model.d = _Stack(nn.ModuleList([one, two])), _Stack(nn.ModuleList([two, one]))
    return model


class _Coder(nn.Module):
    """Is never called, but for a method."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


class _Policy(nn.Module):
    def __init__(self, coder: _Coder) -> None:
        super().__init__()
        self.coder = coder
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.coder.encode(x))


def _a_method() -> nn.Module:
    """An actor's and a critic's."""
    model, coder = _Model(), _Coder()
    model.actor, model.critic = _Policy(coder), _Policy(coder)
    return model


class _Scaled(nn.Module):
    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.temperature = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.temperature


def _a_parameter() -> nn.Module:
    """CLIP's: the model has a parameter that only those read that are given it, under another name."""
    model = _Model()
    model.logit_scale = nn.Parameter(torch.tensor(0.7))
    model.a, model.b = _Scaled(model.logit_scale), _Scaled(model.logit_scale)
    return model


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        encoder = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.left, self.right = _Head(encoder), _Head(encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(-x)


def _inside() -> nn.Module:
    """Each of three blocks has one of its own for two of its parts."""
    model = _Model()
    model.blocks = nn.ModuleList([_Pair() for _ in range(3)])
    return model


def _normalized() -> nn.Module:
    """With statistics, which training changes twice."""
    model, norm = _Model(), nn.BatchNorm1d(4)
    model.a, model.b = _Head(norm), _Head(norm)
    return model


_MODELS = (
    _named, _uncalled, _nameless, _late, _listed, _in_a_row, _two, _nested, _turned, _a_list, _only_lists,
    _a_method, _a_parameter, _inside, _normalized,
)  # fmt: skip


@pytest.mark.parametrize("make", _MODELS, ids=lambda make: make.__name__[1:])
def test_a_module_that_several_hold_is_one_module(make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    ported = port(module, _X)  # which compares outputs, and the gradients of shared weights
    arrays = jax.tree.leaves(nnx.state(ported.model, nnx.Param))
    assert sum(array.size for array in arrays) == sum(one.numel() for one in module.parameters())
    back = to_state_dict(ported.model, module, rules=ported.rules)
    assert {name: tensor.tolist() for name, tensor in back.items()} == {
        name: tensor.tolist() for name, tensor in module.state_dict().items()
    }
    fresh = nnx.state(type(ported.model)(rngs=nnx.Rngs(0)))
    assert jax.tree.structure(fresh) == jax.tree.structure(nnx.state(ported.model))


def test_its_class_is_handed_it_as_the_author_does() -> None:
    ported = port(_named(), _X)
    assert ported.model.first.encoder is ported.model.second.encoder is ported.model.encoder
    assert "self.encoder = Linear(4, 4, rngs=rngs)" in ported.source
    assert "self.first = Head(self.encoder, rngs=rngs)" in ported.source
    assert "encoder = nnx.LayerNorm(" in port(_nameless(), _X).source


def test_what_has_no_weights_stays_with_each_module() -> None:
    module, drop = _Model(), nn.Dropout(0.5)
    module.a, module.b = _Head(drop), _Head(drop)
    source = port(module, _X).source
    assert "def __init__(self, *, rngs: nnx.Rngs)" in source
    assert source.count("self.encoder = nnx.Dropout(0.5, rngs=rngs)") == 1


def test_a_port_to_linen_says_that_it_would_make_two() -> None:
    with pytest.raises(PortError, match="are one module, and a port to linen would make two") as caught:
        port(_named(), _X, to="linen")
    assert "port to nnx" in str(caught.value)
    assert "keep=[" not in str(caught.value)


class _Summed(nn.Module):
    """Does another thing when it is given two."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.dense(x) if y is None else self.dense(x) + y


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        summed = _Summed()
        self.one, self.two = _Wrapped(summed), _Doubled(summed)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class _Doubled(_Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


def test_what_stays_in_torch_is_what_holds_all_that_share_it() -> None:
    with pytest.raises(PortError, match="called again and then does something else") as caught:
        port(_Twice(), _X)
    assert "keep= cannot leave it in torch: several modules hold it" in str(caught.value)
    model = _Model()
    model.twice, model.out = _Twice(), nn.Linear(4, 4)
    with pytest.raises(PortError, match=r"keep=\['twice'\]"):
        port(model, _X)
    assert port(model, _X, keep=["twice"]).proof is not None
