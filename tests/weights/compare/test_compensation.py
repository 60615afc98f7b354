"""A layer that differs in a right twin is a note; a mistake is none, however little it shows in the outputs."""

from collections.abc import Callable
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from torchjax_bridge import errors, parity, to_flax
from torchjax_bridge.weights import LayerType, Rename

# --- what one side has inside and the other behind it ------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as timm has it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), NormAct(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), NormAct(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        return self.fc((x + self.bn2(self.conv2(x))).mean((2, 3)))


class NnxConvs(nnx.Module):
    def __init__(
        self, *, epsilon: float = 1e-5, skip: bool = True, last: Any = jax.nn.relu, middle: Any = jnp.array
    ) -> None:
        rngs, settings = (
            nnx.Rngs(0),
            {"use_running_average": True, "momentum": 0.9, "use_fast_variance": False},
        )
        self.conv1 = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), padding=1, rngs=rngs)
        self.bn1, self.bn2 = (nnx.BatchNorm(4, epsilon=e, rngs=rngs, **settings) for e in (1e-5, epsilon))
        self.fc, self.skip, self.last, self.middle = nnx.Linear(4, 2, rngs=rngs), skip, last, middle

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        y = self.last(self.bn2(self.middle(self.conv2(x))))
        return self.fc((x + y if self.skip else y).mean((1, 2)))


NORMS = [LayerType(name, nn.BatchNorm2d) for name in ("bn1", "bn2")]


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")
@pytest.mark.parametrize(
    ("settings", "where", "says"),
    [
        ({}, None, ""),
        ({"middle": lambda x: x * 3}, "bn2", "3 times"),  # the mistake behind the first norm is found
        ({"skip": False}, "bn2", "may have it behind"),  # relu is there: to add it once more would be wrong
        ({"last": lambda x: x}, "bn2", "may have it behind"),
        ({"epsilon": 0.5}, "bn2", ""),
    ],
)
def test_a_norm_with_its_activation_inside_is_a_note_and_hides_no_mistake(
    settings: Any, where: str | None, says: str
) -> None:
    module = Convs().eval()
    found = parity(module, to_flax(module, NnxConvs(**settings), rules=NORMS), _image(), rules=NORMS)
    assert found.ok is (where is None), str(found)
    row = next(row for row in found.rows if row.torch_path == "bn1")
    assert (row.ok, row.note) == (None, "what reads it is given the same in both")
    assert any(note.startswith("'bn1' (NormAct) gives something else in Flax") for note in found.notes)
    if where is None:
        assert "differ and are made up for" in str(found)
    else:
        assert found.first is not None
        assert found.cause is not None
        assert found.first.torch_path == where
        assert says in str(found.cause)


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 8


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.fc = Scaled(9, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.emb(ids) + 1)


class FlaxWords:
    scale: float
    inside: bool

    def run(self, emb: Any, fc: Any, ids: jax.Array) -> jax.Array:
        return fc(emb(ids) * self.scale + 1)


class NnxWords(FlaxWords, nnx.Module):
    def __init__(self, scale: float) -> None:
        self.emb, self.fc = nnx.Embed(9, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.scale = scale

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.run(self.emb, self.fc, ids)


class LinenWords(FlaxWords, ln.Module):
    scale: float

    @ln.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.run(ln.Embed(9, 4, name="emb"), ln.Dense(3, name="fc"), ids)


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
@pytest.mark.parametrize("scale", [8.0, 4.0])
def test_a_scale_inside_an_embedding_and_behind_it_is_the_same_if_it_is(flavour: str, scale: float) -> None:
    module, ids, rules = Words(), torch.arange(6)[None], [LayerType("emb", nn.Embedding)]
    model: Any
    if flavour == "nnx":
        model = to_flax(module, NnxWords(scale), rules=rules)
    else:
        linen = LinenWords(scale)
        shapes = jax.eval_shape(linen.init, jax.random.key(0), ids.numpy())
        model = linen, to_flax(module, shapes, rules=rules)
    found = parity(module, model, ids, rules=rules)
    assert found.ok is (scale == 8), str(found)
    if scale != 8:
        assert found.first is not None
        assert found.first.torch_path in ("emb", "fc")


# --- containers --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).relu()


class Stages(nn.Module):
    """Torch counts its stages from 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(Block(), Block()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer3(self.layer2(self.layer1(x)))


class NnxBlock(nnx.Module):
    def __init__(self) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.fc(x))


class NnxStage(nnx.Module):
    def __init__(self, act: Callable[[jax.Array], jax.Array]) -> None:
        self.blocks, self.act = nnx.List([NnxBlock(), NnxBlock()]), act

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.act(x)


class NnxStages(nnx.Module):
    def __init__(self, act: Callable[[jax.Array], jax.Array] = lambda x: x) -> None:
        self.layer0, self.layer1, self.layer2 = NnxStage(act), NnxStage(lambda x: x), NnxStage(lambda x: x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer2(self.layer1(self.layer0(x)))


def test_containers_whose_layers_went_elsewhere_are_not_compared_with_their_namesakes() -> None:
    module, x = Stages(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    rules = [Rename(f"layer{number + 1}", f"layer{number}.blocks") for number in range(3)]
    found = parity(module, to_flax(module, NnxStages(), rules=rules), x, rules=rules)
    assert found.ok, str(found)
    assert all(row.ok for row in found.rows)
    assert ("layer1", "layer1") not in {(row.torch_path, row.flax_path) for row in found.rows}
    wrong = parity(module, to_flax(module, NnxStages(lambda x: x + 1), rules=rules), x, rules=rules)
    assert wrong.first is not None
    assert wrong.first.torch_path == "layer2.0.fc"


class Ends(nn.Module):
    """A container that ends before its activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class NnxEnds(nnx.Module):
    def __init__(self, act: Callable[[jax.Array], jax.Array]) -> None:
        self.body = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), act)
        self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.body(x))


def test_a_container_that_ends_behind_its_activation_is_a_note_if_the_activation_is_right() -> None:
    module, x = Ends(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    found = parity(module, to_flax(module, NnxEnds(jax.nn.relu)), x)
    assert found.ok, str(found)
    assert [row.ok for row in found.rows] == [True, None, True, True]
    assert not parity(module, to_flax(module, NnxEnds(jax.nn.silu)), x).ok


# --- what no output shows ------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A layer in a branch that is scaled; a model whose last layer gives zeros has the scale 0."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.fc2(functional.gelu(self.fc1(x)))


class NnxHidden(nnx.Module):
    def __init__(self, scale: float, *, approximate: bool) -> None:
        self.fc1, self.fc2 = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
        self.scale, self.approximate = scale, approximate

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.scale * self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


@pytest.mark.every(2)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-2, 1.0])
def test_a_mistake_that_the_outputs_do_not_show_yet_is_a_mistake(scale: float) -> None:
    module, x = Hidden(scale), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    assert parity(module, to_flax(module, NnxHidden(scale, approximate=False)), x).ok
    found = parity(module, to_flax(module, NnxHidden(scale, approximate=True)), x)
    assert found.cause is not None
    assert (found.cause.kind, found.cause.proved) == ("gelu", True), str(found)


class Padded(nn.Module):
    """Positions behind the length of a sequence are left out of the mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.fc2(self.fc1(x).relu())
        return self.head((y * mask[..., None]).sum(1))


class NnxPadded(nnx.Module):
    """Zeros the positions that do not count."""

    def __init__(self) -> None:
        self.fc1, self.fc2 = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
        self.head, self.every = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), False

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = self.fc2(nnx.relu(self.fc1(x * mask[..., None])))
        return self.head((y if self.every else y * mask[..., None]).sum(1))


def test_positions_that_a_mask_leaves_out_may_hold_anything() -> None:
    module, x = Padded(), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(5) < torch.tensor([[3], [4]])).float()
    twin = to_flax(module, NnxPadded())
    found = parity(module, twin, x, mask)
    assert found.ok, str(found)
    assert "the models' outputs agree" in {row.note for row in found.rows if row.ok is None}
    twin.every = True
    assert not parity(module, twin, x, mask).ok


# --- the mode of a linen model -------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(x))


class LinenNormed(ln.Module):
    """Takes its mode from whether its statistics can be written to."""

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        train = self.is_mutable_collection("batch_stats")
        norm = ln.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, name="bn"
        )
        return norm(ln.Dense(4, name="fc")(x))


def test_a_linen_model_that_asks_whether_its_statistics_are_mutable_runs_in_torch_s_mode() -> None:
    module, x = Normed(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    variables = to_flax(module, LinenNormed().init(jax.random.key(0), jnp.zeros((1, 4))))
    assert parity(module.eval(), (LinenNormed(), variables), x).ok
    found = parity(module.train(), (LinenNormed(), variables), x)
    assert [row.ok for row in found.rows] == [True, True, True, True, False]
    assert found.cause is not None
    assert found.cause.kind == "running variance"  # Flax's own, which is known to differ


# --- layers that are left out --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torchjax_bridge.weights.SettingsWarning")
def test_a_layer_can_be_left_out_by_its_path_and_the_outputs_cannot() -> None:
    module = Convs().eval()
    twin = to_flax(module, NnxConvs(epsilon=0.5), rules=NORMS)
    found = parity(module, twin, _image(), rules=NORMS, ignore=("bn*", "fc"))
    assert [row.note for row in found.rows if row.torch_path in ("bn1", "bn2", "fc")] == ["ignored"] * 3
    assert found.first is not None
    assert found.first.torch_path == ""
    assert parity(
        module, to_flax(module, NnxConvs(), rules=NORMS), _image(), rules=NORMS, ignore="bn1.act"
    ).ok
    for wrong, near in (("bn3", "did you mean 'bn"), ("", "names no layer"), ("b", "names no layer")):
        with pytest.raises(errors.ArgumentError, match=near):
            parity(module, twin, _image(), rules=NORMS, ignore=[wrong])


def test_a_statistic_of_a_layer_that_is_left_out_does_not_fail() -> None:
    module, x = Normed(), torch.randn(5, 4)
    variables = to_flax(module, LinenNormed().init(jax.random.key(0), jnp.zeros((1, 4))))
    assert not parity(module, (LinenNormed(), variables), x).ok
    assert parity(module, (LinenNormed(), variables), x, ignore="bn").ok
