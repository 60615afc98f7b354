"""What one side has alone: torch tensors that stay, Flax leaves with a value, what ``strict=False`` leaves out."""

import pathlib
import warnings
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import CheckpointError, PlanError
from torchjax_bridge.weights import (
    Constant,
    Entry,
    Fill,
    Keep,
    LayerType,
    PartialWarning,
    Permute,
    Rename,
    Rule,
    SettingsWarning,
    convert,
    load_state_dict,
    plan,
    save_flax,
    save_state_dict,
    to_flax,
    to_optax,
    to_optimizer_state,
    to_state_dict,
)

Folder = pathlib.Path


class Table(nn.Module):
    """Positions that are kept as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 4))


class TorchNet(nn.Module):
    """Has a table, and a pooler that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Table()
        self.fc = nn.Linear(4, 3)
        self.pooler = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4))


class FlaxNet(nnx.Module):
    def __init__(self) -> None:
        self.fc = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def _linen() -> Any:
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return flax.linen.Dense(3, name="fc")(x)

    return Net().init(jax.random.key(0), jnp.ones((1, 4)))


KEPT = [Keep("positions"), Keep("pooler")]


@pytest.mark.parametrize(
    "template", [FlaxNet(), nnx.state(FlaxNet()), _linen()], ids=["nnx", "state", "linen"]
)
@pytest.mark.parametrize("bare", [False, True])
def test_what_is_to_be_kept_stays_in_torch_both_ways(template: Any, bare: bool) -> None:
    module = TorchNet()
    source: Any = module.state_dict() if bare else module
    found = plan(source, template, rules=KEPT)
    assert found.ok
    assert set(found.torch_only) == {key for key in module.state_dict() if not key.startswith("fc")}
    filled = to_flax(source, template, rules=KEPT)
    back = to_state_dict(filled, source, rules=KEPT)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    with pytest.raises(PlanError, match=r"'positions.weight'"):
        to_flax(source, template, rules=[Keep("pooler")])


def test_patterns_single_tensors_and_renames_are_kept_by_torchs_own_names() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    assert plan(module, FlaxNet(), rules=[Rename("0", "fc"), Keep("1"), Keep("2.*")]).ok
    found = plan(
        module,
        FlaxNet(),
        rules=[Rename("0.weight", "fc.kernel"), Rename("0.bias", "elsewhere"), Keep("0.bias")],
    )
    assert [str(fault.kind) for fault in found.faults if "elsewhere" in str(fault)] == []
    assert "0.bias" in found.torch_only
    assert plan(nn.DataParallel(TorchNet()), FlaxNet(), rules=KEPT).ok


def test_a_hint_that_names_nothing_is_a_fault_with_the_nearest_name() -> None:
    module = TorchNet()
    for rule, meant in (
        (Keep("poler"), "pooler"),
        (Keep("pooler.0.wieght"), "pooler.0.weight"),
        (Fill("fc.kernl", 0), "fc.kernel"),
    ):
        found = plan(module, FlaxNet(), rules=[*KEPT, rule])
        (fault,) = found.faults
        assert fault.kind == "rules"
        assert f"did you mean '{meant}'" in fault.message
    found = plan(module, FlaxNet(), rules=[*KEPT, Fill("fc", 0)])
    assert "it takes a leaf, such as 'fc." in str(found)
    for wrong in (
        lambda: Keep(3),
        lambda: Fill("x", "0"),
        lambda: Fill("x", float("nan")),
        lambda: Fill(3, 0),
    ):
        with pytest.raises(PlanError):
            wrong()  # type: ignore[no-untyped-call]


def test_a_kept_name_of_a_tied_tensor_goes_along_with_what_crosses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.head = nn.Linear(4, 3)
            self.head.weight, self.head.bias = self.fc.weight, self.fc.bias

    module = Tied()
    trained = to_flax(module, FlaxNet(), rules=[Keep("head")])
    trained.fc.kernel[...] += 1
    back = to_state_dict(trained, module, rules=[Keep("head")])
    assert torch.equal(back["head.weight"], back["fc.weight"])
    assert not torch.equal(back["fc.weight"], module.fc.weight)


def test_keeps_of_a_rule_excuse_a_layer_without_a_scope() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.tables = nn.ModuleList([Table(), Table()])

    rule = Rule(Table, [], keeps=("weight",))
    found = plan(Deep(), FlaxNet(), rules=[rule])
    assert found.ok
    assert found.torch_only == ("tables.0.weight", "tables.1.weight")
    hints = [rule, LayerType("tables.*", Table)]  # bare keys do not say whose they are
    assert plan(Deep().state_dict(), FlaxNet(), rules=hints).ok
    assert not plan(Deep().state_dict(), FlaxNet(), rules=[rule]).ok
    row = nn.Sequential(nn.Linear(4, 4), Table(), nn.Linear(4, 4))
    template = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)))
    filled = to_flax(row, template, rules=[rule])
    assert np.array_equal(filled.layers[1].kernel[...], row[2].weight.detach().numpy().T)
    other = Rule(Table, [], keeps=("bias",))
    assert [fault.kind for fault in plan(Deep(), FlaxNet(), rules=[other]).faults] == ["unexpected"] * 2


# --- the dual ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Projections apart, and no bias of the key."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.key = nn.Linear(4, 4, bias=False)


class FlaxAttention(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.query, self.key, self.value, self.out = (nnx.Linear(4, 4, rngs=rngs) for _ in range(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()


class FlaxBlock(nnx.Module):
    def __init__(self) -> None:
        self.attn = FlaxAttention()
        self.attn.key.bias[...] += 7


def _linen_block() -> Any:
    return {"params": nnx.to_pure_dict(nnx.state(FlaxBlock()))}


def _set_bias(filled: Any, value: float) -> None:
    if isinstance(filled, nnx.Module):
        filled.attn.key.bias[...] = jnp.full(4, value)
    else:
        filled["params"]["attn"]["key"]["bias"] = jnp.full(4, value)


@pytest.mark.parametrize("make", [FlaxBlock, _linen_block], ids=["nnx", "linen"])
@pytest.mark.parametrize("name", ["attn.key.bias", "*.key.bias"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_leaf_that_torch_lacks_is_filled_and_goes_back_while_it_has_its_value(
    make: Any, name: str, bare: bool
) -> None:
    module, rules = Block(), [Fill(name, 0.0), LayerType("attn.*", nn.Linear)]
    source: Any = module.state_dict() if bare else module
    with pytest.raises(PlanError, match=r"attn.key.bias"):
        to_flax(source, make(), rules=rules[1:])
    filled = to_flax(source, make(), rules=rules)
    attn = filled.attn if isinstance(filled, nnx.Module) else filled["params"]["attn"]
    bias = attn.key.bias[...] if isinstance(filled, nnx.Module) else attn["key"]["bias"]
    assert bias.shape == (4,)
    assert not bias.any()
    back = to_state_dict(filled, source, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    _set_bias(filled, 1e-9)
    with pytest.raises(
        PlanError, match=r"attn.key.bias' cannot be converted to torch.* no longer 0 everywhere"
    ):
        to_state_dict(filled, source, rules=rules)
    with pytest.warns(PartialWarning, match="lost: .*attn.key.bias"):
        back = to_state_dict(filled, source, rules=rules, strict=False)
    assert back.keys() == module.state_dict().keys()


def test_a_filled_leaf_has_the_dtype_of_the_weights_beside_it_and_a_bias_that_is_no_zero_is_a_setting() -> (
    None
):
    module = Block().to(torch.bfloat16)
    with pytest.warns(SettingsWarning, match="use_bias"):
        filled = to_flax(module, nnx.eval_shape(FlaxBlock), rules=[Fill("attn.key.bias", 0.5)])
    assert filled.attn.key.bias[...].dtype == jnp.bfloat16
    assert filled.attn.key.bias[...].tolist() == [0.5] * 4
    back = to_state_dict(filled, module, rules=[Fill("attn.key.bias", 0.5)])
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_a_rule_of_ones_own_fills_what_its_layer_lacks() -> None:
    entries = [
        *(
            Entry(f"{name}.weight", f"{name}.kernel", Permute((1, 0)))
            for name in ("query", "key", "value", "out")
        ),
        *(Entry(f"{name}.bias", f"{name}.bias") for name in ("query", "value", "out")),
        Entry((), "key.bias", Constant(0.0)),
    ]
    rules = [Rule(Attention, entries)]
    module = Block().double().half()
    filled = to_flax(module, FlaxBlock(), rules=rules)
    assert filled.attn.key.bias[...].dtype == jnp.float16
    assert not filled.attn.key.bias[...].any()
    assert not to_state_dict(filled, module, rules=rules).keys() ^ module.state_dict().keys()
    filled.attn.key.bias[...] += 1
    with pytest.raises(PlanError, match="no longer 0 everywhere"):
        to_state_dict(filled, module, rules=rules)
    missing = [Rule(Attention, [*entries, Entry((), "key.scale", Constant(1.0))])]
    with pytest.raises(PlanError, match=r"has no 'key.scale'"):
        to_flax(module, FlaxBlock(), rules=missing)
    optional = [Rule(Attention, [*entries, Entry((), "key.scale", Constant(1.0), optional=True)])]
    assert plan(module, FlaxBlock(), rules=optional).ok


def test_files_keep_fill_and_lose_nothing_in_silence(tmp_path: Folder) -> None:
    module, rules = Block(), [Fill("attn.key.bias", 0.0), Keep("extra")]
    module.extra = nn.Linear(2, 2)
    there, back = tmp_path / "flax.safetensors", tmp_path / "back.safetensors"
    save_state_dict(tmp_path / "torch.safetensors", module)
    convert(tmp_path / "torch.safetensors", there, to="flax", model=module, template=FlaxBlock(), rules=rules)
    convert(there, back, to="torch", model=module, rules=rules)
    found = load_state_dict(back)
    assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())
    with torch.device("meta"):
        empty = Block()
        empty.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"'extra.weight' has no source"):
        convert(there, back, to="torch", model=empty, rules=rules, overwrite=True)
    trained = to_flax(module, FlaxBlock(), rules=rules)
    _set_bias(trained, 0.25)
    save_flax(there, trained)
    with pytest.raises(PlanError, match=r"no longer 0 everywhere @ attn.key.bias"):
        convert(there, back, to="torch", model=module, rules=rules, overwrite=True)


def test_the_moments_of_what_is_kept_stay_in_torch() -> None:
    module, rules = TorchNet(), KEPT
    optimizer = torch.optim.Adam(module.parameters())
    for _ in range(2):  # which never reaches the pooler
        optimizer.zero_grad()
        (module.fc(torch.rand(5, 4)).sum() + module.positions.weight.sum()).backward()
        optimizer.step()
    model = to_flax(module, FlaxNet(), rules=rules)
    tx = optax.adam(1e-3)
    state = tx.init(nnx.state(model, nnx.Param))
    handed = to_optax(optimizer, state, module=module, template=model, rules=rules)
    back = to_optimizer_state(handed, optimizer, module=module, template=model, rules=rules)
    own = optimizer.state_dict()["state"]
    assert back["state"].keys() == own.keys()
    for place, entry in own.items():
        assert all(torch.equal(back["state"][place][name], value) for name, value in entry.items())


# --- strict=False ----------------------------------------------------------------------------------------


def test_a_lenient_conversion_says_once_what_it_left_out() -> None:
    class More(FlaxNet):
        def __init__(self) -> None:
            super().__init__()
            self.more = nnx.Linear(7, 7, rngs=nnx.Rngs(0))

    module, template = TorchNet(), More()
    found = plan(module, template)
    assert {fault.subject for fault in found.left_out} >= {"positions.weight", "pooler.0.bias", "more.kernel"}
    with pytest.warns(PartialWarning) as caught:
        filled = to_flax(module, template, strict=False)
    (warning,) = caught
    assert warning.filename == __file__
    for name in ("positions.weight", "pooler.0.bias", "more.kernel"):
        assert name in str(warning.message)
    with pytest.warns(PartialWarning) as caught:
        to_state_dict(filled, module, strict=False)
    assert len(caught) == 1
    rules = [*KEPT, Fill("more.*", 0.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_flax(module, template, rules=rules, strict=False)
    assert not plan(module, template, rules=rules).left_out
