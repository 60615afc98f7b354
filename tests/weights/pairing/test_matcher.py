"""Matching: by name, by place, by what alone fits; and refused where two answers are left."""

import itertools
import re
from contextlib import nullcontext
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Entry, Flatten, Identity, LayerType, PairingWarning, Permute, Rename, Rule


def _variables(module: ln.Module, *shape: int) -> dict[str, Any]:
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))


def _pairs(source: Any, template: Any, **options: Any) -> dict[str, str]:
    """Which torch key lies in which Flax path."""
    made = plan(source, template, **options)
    assert made.ok, str(made)
    return {
        "+".join(move.torch_keys): "+".join(".".join(map(str, path)) for path in move.flax_paths)
        for move in made.moves
    }


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# --- containers ----------------------------------------------------------------------------------------


def test_a_sequential_is_an_nnx_sequential_with_the_same_numbers() -> None:
    rngs = nnx.Rngs(0)
    template = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 3, rngs=rngs))
    assert _pairs(_mlp(2, 3, 3), template)["2.weight"] == "layers.2.kernel"


def test_a_sequential_is_an_nnx_sequential_without_the_activations() -> None:
    rngs = nnx.Rngs(0)
    template = nnx.Sequential(*[nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])
    pairs = _pairs(_mlp(3, 3, 3, 3), template)
    assert [pairs[f"{k}.weight"] for k in (0, 2, 4)] == [f"layers.{k}.kernel" for k in (0, 1, 2)]


def test_the_automatic_numbers_of_linen_follow_the_order_of_a_sequential() -> None:
    class Mlp(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(12):  # Dense_10 sorts before Dense_2 as a string
                x = ln.relu(ln.Dense(3)(x))
            return x

    pairs = _pairs(_mlp(*[3] * 13), _variables(Mlp(), 1, 3))
    assert [pairs[f"{2 * k}.weight"] for k in range(12)] == [f"params.Dense_{k}.kernel" for k in range(12)]


def test_a_linen_sequential_names_its_items_with_gaps_as_torch_does() -> None:
    class Stem(ln.Module):
        def setup(self) -> None:
            self.stem = ln.Sequential([ln.Dense(3), ln.relu, ln.Dense(3)])

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.stem(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = _mlp(3, 3, 3)

    variables = _variables(Stem(), 1, 3)
    assert set(variables["params"]["stem"]) == {"layers_0", "layers_2"}
    assert _pairs(Net(), variables)["stem.2.weight"] == "params.stem.layers_2.kernel"


def test_the_items_of_a_module_list_and_a_module_dict_are_found_under_linens_flat_names() -> None:
    class Lists(ln.Module):
        def setup(self) -> None:
            self.blocks = [ln.Dense(3) for _ in range(11)]
            self.heads = {"a": ln.Dense(2), "b": ln.Dense(2)}

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x)
            return self.heads["a"](x) + self.heads["b"](x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(11))
            self.heads = nn.ModuleDict({"b": nn.Linear(3, 2), "a": nn.Linear(3, 2)})

    pairs = _pairs(Net(), _variables(Lists(), 1, 3))
    assert pairs["blocks.10.weight"] == "params.blocks_10.kernel"
    assert pairs["blocks.2.weight"] == "params.blocks_2.kernel"
    assert pairs["heads.a.weight"] == "params.heads_a.kernel"


def test_lists_in_lists_and_in_dicts_are_found_under_linens_flat_names() -> None:
    class Nested(ln.Module):
        def setup(self) -> None:
            self.layers = [[ln.Dense(3) for _ in range(2)] for _ in range(3)]
            self.heads = {"a": [ln.Dense(3), ln.Dense(3)]}
            self.ends = [{"x": ln.Dense(3), "y": ln.Dense(3)}]

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in (*itertools.chain(*self.layers), *self.heads["a"], *self.ends[0].values()):
                x = layer(x)
            return x

    def two() -> list[nn.Module]:
        return [nn.Linear(3, 3), nn.Linear(3, 3)]

    module = nn.Module()
    module.rows = nn.ModuleList(nn.ModuleList(two()) for _ in range(3))
    module.heads = nn.ModuleDict({"a": nn.ModuleList(two())})
    module.ends = nn.ModuleList([nn.ModuleDict(dict(zip("yx", two(), strict=True)))])
    for rules in ([Rename("rows", "layers")], [Rename("rows.*.*", "layers_*_*")]):
        pairs = _pairs(module, _variables(Nested(), 1, 3), rules=rules)
        assert pairs["rows.2.1.weight"] == "params.layers_2_1.kernel"
        assert pairs["rows.0.1.weight"] == "params.layers_0_1.kernel"
        assert pairs["heads.a.1.weight"] == "params.heads_a_1.kernel"
        assert pairs["ends.0.y.weight"] == "params.ends_0_y.kernel"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 6)
        self.down = nn.Linear(6, 3)


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(3, 2)


class LinenBlock(ln.Module):
    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ln.Dense(3, name="down")(ln.Dense(6, name="up")(x))


def test_blocks_with_automatic_names_match_a_module_list_by_order() -> None:
    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for _ in range(3):
                x = LinenBlock()(x)
            return ln.Dense(2, name="head")(x)

    pairs = _pairs(Stack(3), _variables(Net(), 1, 3))
    assert [pairs[f"blocks.{k}.up.weight"] for k in range(3)] == [
        f"params.LinenBlock_{k}.up.kernel" for k in range(3)
    ]


@pytest.mark.parametrize("lift", [ln.remat, None], ids=["remat", "plain"])
def test_remat_changes_names_and_nothing_else(lift: Any) -> None:
    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            dense = ln.Dense if lift is None else lift(ln.Dense)
            for _ in range(3):
                x = dense(3)(x)
            return x

    pairs = _pairs(_mlp(3, 3, 3, 3), _variables(Net(), 1, 3))
    prefix = "params.CheckpointDense" if lift else "params.Dense"
    assert [pairs[f"{2 * k}.weight"] for k in range(3)] == [f"{prefix}_{k}.kernel" for k in range(3)]


def test_numbers_that_run_against_the_shapes_are_not_trusted_for_equal_layers() -> None:
    class Nested(ln.Module):
        """Linen numbers modules as they are made: the outermost of a nested expression comes first."""

        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(2)(ln.Dense(3)(ln.Dense(3)(x)))

    variables = _variables(Nested(), 1, 3)
    assert variables["params"]["Dense_0"]["kernel"].shape == (3, 2)
    made = plan(_mlp(3, 3, 3, 2), variables)
    assert [fault.kind for fault in made.faults] == ["ambiguous"]
    assert "run the other way" in made.faults[0].message
    rules = [Rename("0", "Dense_2"), Rename("2", "Dense_1"), Rename("4", "Dense_0")]
    assert plan(_mlp(3, 3, 3, 2), variables, rules=rules).ok


def test_a_pairing_by_number_alone_is_warned_of_until_it_is_said() -> None:
    class Backwards(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(3)(jnp.tanh(ln.Dense(3)(x)))  # the outer one is made first: Dense_0

    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    variables = Backwards().init(jax.random.key(0), jnp.zeros((1, 3)))
    assert "assumed: '0' (Linear) to '2' (Linear): equal, and paired by number" in str(
        plan(module, variables)
    )
    with pytest.warns(PairingWarning, match=r"backwards if they are written as(.|\n)*Rename\("):
        to_flax(module, variables)
    with pytest.warns(PairingWarning):
        to_state_dict(variables, module)
    rules = [Rename("0", "Dense_1"), Rename("2", "Dense_0")]
    filled = to_flax(module, variables, rules=rules)  # a warning is an error in these tests
    x = torch.randn(4, 3)
    np.testing.assert_allclose(
        Backwards().apply(filled, x.numpy()), module(x).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_a_pairing_by_number_that_a_neighbours_shape_bears_out_is_a_note() -> None:
    class Mlp(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for width in (3, 3, 2):
                x = ln.Dense(width)(x)
            return x

    module, variables = _mlp(3, 3, 3, 2), _variables(Mlp(), 1, 3)
    made = plan(module, variables)
    assert not made.assumed
    assert any("paired by number" in note for note in made.notes)
    to_flax(module, variables)


def test_scanned_layers_are_stacked_and_come_back_layer_by_layer() -> None:
    class Body(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return LinenBlock(name="block")(x), None

    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scan = ln.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            x, _ = scan(name="blocks")(x, None)
            return ln.Dense(2, name="head")(x)

    module = Stack(4)
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 3)))
    twin = to_flax(module, variables)
    assert twin["params"]["blocks"]["block"]["up"]["kernel"].shape == (4, 3, 6)
    np.testing.assert_array_equal(
        np.asarray(twin["params"]["blocks"]["block"]["up"]["kernel"][2]),
        module.blocks[2].up.weight.detach().T,
    )
    x = torch.randn(5, 3)
    want = x
    for block in module.blocks:
        want = block.down(block.up(want))
    got = Net().apply(twin, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(np.asarray(got), module.head(want).detach(), atol=1e-5)
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_nnx_layers_made_by_vmap_are_stacked_too() -> None:
    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(3, 6, rngs=rngs)
            self.down = nnx.Linear(6, 3, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
            self.blocks = make(rngs.split(4))
            self.head = nnx.Linear(3, 2, rngs=rngs)

    module = Stack(4)
    twin = to_flax(module, Net(nnx.Rngs(0)))
    assert twin.blocks.up.kernel[...].shape == (4, 3, 6)
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_stacked_layers_whose_parts_could_be_each_other_are_refused_with_those_parts() -> None:
    class Expert(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up, self.down = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.experts = nnx.vmap(Expert, in_axes=0, out_axes=0)(rngs.split(4))

    module = nn.Module()
    module.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(4))
    with pytest.raises(errors.PlanError, match=r"'experts\.0\.0' .*'experts\.0\.1' .*equally well") as caught:
        to_flax(module, Net(nnx.Rngs(0)))
    assert "1 fault" in str(caught.value)
    rules = [Rename("experts.*.0", "experts.*.up"), Rename("experts.*.1", "experts.*.down")]
    twin = to_flax(module, Net(nnx.Rngs(0)), rules=rules)
    np.testing.assert_array_equal(twin.experts.down.kernel[2], module.experts[2][1].weight.detach().T)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("name", ["blocks", None])
def test_layers_that_are_stacked_along_another_axis_are_refused_with_that_axis(
    axis: int, name: str | None
) -> None:
    class Body(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return ln.Dense(3, name="down")(ln.Dense(6, name="up")(x)), None

    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scan = ln.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=4)
            return ln.Dense(2, name="head")(scan(name=name)(x, None)[0])

    with pytest.raises(errors.PlanError, match=rf"stacked along axis {axis} .*variable_axes=.\"params\": 0"):
        to_flax(Stack(4), jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 3))))


# --- levels of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [True, False])
def test_scanned_layers_keep_what_only_flax_has(statistics: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=statistics)
            self.rnn = nn.LSTM(3, 3, bias=False)

    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 3, rngs=rngs))

    module = nn.ModuleList(Block() for _ in range(4))
    twin = to_flax(module, nnx.vmap(NnxBlock)(nnx.Rngs(0).split(4)))
    assert not twin.rnn.cell.dense_h.bias[...].any()
    assert twin.norm.var[...].shape == (4, 3)
    back = to_state_dict(twin, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize(("layers", "doubt"), [(3, True), (4, False)])
def test_an_axis_of_layers_that_another_axis_could_be_is_warned_of(layers: int, doubt: bool) -> None:
    module = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
    stacked = {"kernel": jnp.zeros((layers, 3, 3)), "bias": jnp.zeros((layers, 3))}
    made = plan(module, {"params": stacked})
    assert made.ok
    assert bool(made.assumed) == doubt
    with pytest.warns(PairingWarning, match="first axis") if doubt else nullcontext():
        to_flax(module, {"params": stacked})


def test_a_model_held_in_an_attribute_is_looked_into_on_either_side() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Block()

    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.up = nnx.Linear(3, 6, rngs=rngs)
            self.down = nnx.Linear(6, 3, rngs=rngs)

    class NnxHeld(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = NnxBlock(rngs)

    rngs = nnx.Rngs(0)
    assert _pairs(Held(), NnxBlock(rngs))["model.up.weight"] == "up.kernel"
    assert _pairs(Block(), NnxHeld(rngs))["up.weight"] == "inner.up.kernel"
    assert _pairs(Held(), NnxHeld(rngs))["model.up.weight"] == "inner.up.kernel"


def test_a_sequential_written_out_in_a_compact_method_is_found_by_what_fits() -> None:
    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.classifier = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    class Linen(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = ln.Conv(4, (3, 3))(x)
            x = ln.Conv(4, (3, 3))(x).mean((1, 2))
            x = ln.Dense(5)(x)
            return ln.Dense(2)(x)

    pairs = _pairs(Torch(), _variables(Linen(), 1, 8, 8, 3))
    assert pairs["features.2.weight"] == "params.Conv_1.kernel"
    assert pairs["classifier.2.weight"] == "params.Dense_1.kernel"


# --- renamed layers ------------------------------------------------------------------------------------


class Named(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **widths: tuple[int, int]) -> None:
        for name, (before, after) in widths.items():
            setattr(self, name, nnx.Linear(before, after, rngs=rngs))


class TorchNamed(nn.Module):
    def __init__(self, **widths: tuple[int, int]) -> None:
        super().__init__()
        for name, (before, after) in widths.items():
            setattr(self, name, nn.Linear(before, after))


def test_a_renamed_layer_is_found_when_nothing_else_fits() -> None:
    module = TorchNamed(fc=(3, 4), out=(4, 2))
    assert _pairs(module, Named(nnx.Rngs(0), fc=(3, 4), head=(4, 2)))["out.weight"] == "head.kernel"


def test_equal_siblings_under_other_names_are_refused_with_the_rule_that_settles_it() -> None:
    module = TorchNamed(query=(4, 4), key=(4, 4))
    template = Named(nnx.Rngs(0), q=(4, 4), k=(4, 4))
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module, template)
    message = str(caught.value)
    assert "'query' (Linear), 'key' (Linear) fit 'q' (Linear), 'k' (Linear) equally well" in message
    assert 'Rename("query", <"q" or "k">)' in message
    assert "in the order that has 'query' as 'q', 'key' as 'k', which proves nothing" in message
    pairs = _pairs(module, template, rules=[Rename("query", "q"), Rename("key", "k")])
    assert pairs == {
        "query.weight": "q.kernel",
        "query.bias": "q.bias",
        "key.weight": "k.kernel",
        "key.bias": "k.bias",
    }


def test_equal_siblings_with_automatic_names_are_refused_when_attributes_have_no_order() -> None:
    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(4)(ln.Dense(4)(x))

    with pytest.raises(errors.PlanError, match="equally well"):
        to_flax(TorchNamed(second=(4, 4), first=(4, 4)), Net().init(jax.random.key(0), jnp.zeros((1, 4))))


class _Block(nn.Module):
    def __init__(self, down: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4)) if down else nn.Identity()


class _LinenBlock(ln.Module):
    down: bool

    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda x, name=None: ln.BatchNorm(use_running_average=True, name=name)(x)  # noqa: E731
        y = norm(ln.Conv(4, (3, 3))(x))
        y = norm(ln.Conv(4, (5, 5))(y))
        return y + norm(ln.Conv(4, (5, 5), name="proj")(x), "proj_norm") if self.down else y


class _LinenBlocks(ln.Module):
    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for down in (False, True):
            x = _LinenBlock(down)(x)
        return x


def test_blocks_with_doubts_inside_are_paired_and_each_doubt_is_settled_by_the_rule_it_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(_Block(down=False), _Block(down=True))

    module, template = Net(), _variables(_LinenBlocks(), 1, 9, 9, 4)
    faults = plan(module, template).faults
    assert [fault.kind for fault in faults] == ["ambiguous"] * len(faults)
    options = '<"layer1.0.BatchNorm_0" or "layer1.0.BatchNorm_1">'
    assert f'Rename("layer1.0.bn1", {options})' in str(faults[0])  # of one block, and not of all
    assert "layer1.1" not in str(faults[0])
    rules: list[Rename] = []
    for _ in range(9):
        faults = plan(module, template, rules=rules).faults
        if not faults:
            break
        one, other = re.findall(r'Rename\("(\S+)", <"(\S+)"', faults[0].message)[0]
        rules.append(Rename(one, other))
    pairs = _pairs(module, template, rules=rules)
    assert pairs["layer1.0.conv1.weight"] == "params._LinenBlock_0.Conv_0.kernel"
    assert pairs["layer1.0.bn1.weight"] == "params._LinenBlock_0.BatchNorm_0.scale"
    assert {pairs[f"layer1.1.{name}.weight"] for name in ("conv2", "down.0")} == {
        f"params._LinenBlock_1.{name}.kernel" for name in ("Conv_1", "proj")
    }


@pytest.mark.parametrize("bare", [False, True])
def test_the_whole_paths_of_flax_are_taken_for_what_they_say(bare: bool) -> None:
    module, template = Net2(), _variables(_LinenBlocks(), 1, 9, 9, 4)
    source = module.state_dict() if bare else module
    here, there = "_LinenBlock_0", "_LinenBlock_1"
    wanted = {"layer1.1.bn1": f"{there}.BatchNorm_1", "layer1.1.bn2": f"{there}.BatchNorm_0"}
    wanted |= {"layer1.0.bn1": f"{here}.BatchNorm_0", "layer1.1.down.0": f"{there}.proj"}
    made = plan(source, template, rules=[Rename(*one) for one in wanted.items()])
    assert made.ok, made
    pairs = {move.torch_keys[0]: ".".join(map(str, move.flax_paths[0])) for move in made.moves}
    for ours, theirs in wanted.items():
        leaf = "kernel" if theirs.endswith("proj") else "scale"
        assert pairs[f"{ours}.weight"] == f"params.{theirs}.{leaf}"
    astray = plan(source, template, rules=[Rename("layer1.0.bn1", f"{there}.BatchNorm_0")])
    assert "gives 'layer1.0.bn1' a place in another block than its own" in str(astray)


class Net2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(_Block(down=False), _Block(down=True))


def test_the_rule_that_an_assumption_about_numbers_names_settles_it() -> None:
    class Pair(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(4)(ln.Dense(4)(x))

    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(2)(Pair()(x))

    module = nn.ModuleDict({"body": _mlp(4, 4, 4), "head": nn.Linear(4, 2)})
    template = _variables(Net(), 1, 4)
    (assumed,) = plan(module, template).assumed
    one, other = re.findall(r'Rename\("(\S+)", <"(\S+)" or "Pair_0.Dense_1">', assumed)[0]
    made = plan(module, template, rules=[Rename(one, other)])
    assert made.ok
    assert not made.assumed
    backwards = [Rename("body.0", "body.Dense_1")]
    assert _pairs(module, template, rules=backwards)["body.2.weight"] == "params.Pair_0.Dense_0.kernel"


def test_equal_layers_under_a_parent_that_linen_has_not_are_paired_by_their_names() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.attn = TorchNamed(query=(4, 4), key=(4, 4), out=(4, 4))

    class LinenBlock(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = ln.LayerNorm(name="norm")(x)
            return ln.Dense(4, name="out")(ln.Dense(4, name="query")(x) * ln.Dense(4, name="key")(x))

    pairs = _pairs(Block(), _variables(LinenBlock(), 1, 4))
    for name in ("query", "key", "out"):
        assert pairs[f"attn.{name}.weight"] == f"params.{name}.kernel"
    block = Block()
    block.attn = TorchNamed(query=(4, 4), key=(4, 4), o=(4, 4))  # one name of three is another
    with pytest.raises(errors.PlanError):
        to_flax(block, _variables(LinenBlock(), 1, 4))


def test_a_norm_of_your_own_is_refused_with_the_layer_type_that_fills_a_scale() -> None:
    class Rms(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))
            if bias:
                self.bias = nn.Parameter(torch.randn(4))

    class Net(nnx.Module):
        def __init__(self, norm: type) -> None:
            self.norm = norm(4, rngs=nnx.Rngs(0))

    for own, norm, said in ((Rms(False), nnx.RMSNorm, nn.RMSNorm), (Rms(True), nnx.LayerNorm, nn.LayerNorm)):
        module = nn.Module()
        module.norm = own
        fix = rf'rules=\[LayerType\("norm", nn\.{said.__name__}\)\] if it computes'
        with pytest.raises(errors.PlanError, match=fix):
            to_flax(module, Net(norm))
        twin = to_flax(module, Net(norm), rules=[LayerType("norm", said)])
        np.testing.assert_array_equal(np.asarray(twin.norm.scale[...]), own.weight.detach().numpy())


def test_a_square_weight_of_bare_keys_is_asked_about_where_a_scan_holds_it() -> None:
    class Block(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return ln.Dense(4, name="proj")(x), None

    class Scan(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scanned = ln.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return scanned(name="h")(x, None)[0]

    module = nn.Module()
    module.model = nn.Module()
    module.model.h = nn.ModuleList(TorchNamed(proj=(4, 4)) for _ in range(2))
    rule = 'LayerType("model.h.0.proj", nn.Linear)'
    (fault,) = plan(module.state_dict(), _variables(Scan(), 1, 4)).faults
    assert rule in fault.message
    said = [LayerType("model.h.*.proj", nn.Linear)]
    assert plan(module.state_dict(), _variables(Scan(), 1, 4), rules=said).ok


def test_one_of_two_equal_siblings_is_not_guessed_when_the_other_is_missing() -> None:
    module = TorchNamed(query=(4, 4), key=(4, 4))
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module, Named(nnx.Rngs(0), q=(4, 4)))
    assert "query" in str(caught.value)
    assert "key" in str(caught.value)


def test_a_pattern_renames_every_place_it_speaks_of() -> None:
    class NnxBlock(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.wi = nnx.Linear(3, 6, rngs=rngs)
            self.wo = nnx.Linear(6, 3, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layer = nnx.List([NnxBlock(rngs) for _ in range(3)])
            self.head = nnx.Linear(3, 2, rngs=rngs)

    rules = [Rename("blocks.*.up", "layer.*.wi"), Rename("blocks.*.down", "layer.*.wo")]
    module = Stack(3)
    pairs = _pairs(module, Net(nnx.Rngs(0)), rules=rules)
    assert pairs["blocks.1.down.weight"] == "layer.1.wo.kernel"
    twin = to_flax(module, Net(nnx.Rngs(0)), rules=rules)
    back = to_state_dict(twin, module, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_a_rename_that_finds_nothing_is_a_fault() -> None:
    with pytest.raises(errors.PlanError, match=r'Rename\("fcc", "fc"\) matches nothing'):
        to_flax(TorchNamed(fc=(3, 4)), Named(nnx.Rngs(0), fc=(3, 4)), rules=[Rename("fcc", "fc")])


def test_two_renames_to_one_place_are_a_fault() -> None:
    module = TorchNamed(a=(3, 4), b=(3, 4))
    rules = [Rename("a", "fc"), Rename("b", "fc")]
    with pytest.raises(errors.PlanError, match="both renamed"):
        to_flax(module, Named(nnx.Rngs(0), fc=(3, 4)), rules=rules)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(errors.PlanError, match="is no rule"):
        plan(nn.Linear(2, 2), nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rules=[("a", "b")])


# --- bare keys -----------------------------------------------------------------------------------------


def test_a_square_kernel_of_unknown_class_is_refused_and_a_class_settles_it() -> None:
    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(2, name="head")(ln.Dense(4, name="proj")(x))

    module = TorchNamed(proj=(4, 4), head=(4, 2))
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 4)))
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module.state_dict(), variables)
    assert "'proj'" in str(caught.value)
    assert 'LayerType("proj", nn.Linear)' in str(caught.value)
    assert "'head'" not in str(caught.value)
    twin = to_flax(module.state_dict(), variables, rules=[LayerType("proj", nn.Linear)])
    np.testing.assert_array_equal(np.asarray(twin["params"]["proj"]["kernel"]), module.proj.weight.detach().T)


def test_the_classes_of_an_nnx_template_settle_bare_keys() -> None:
    module = TorchNamed(proj=(4, 4))
    twin = to_flax(module.state_dict(), Named(nnx.Rngs(0), proj=(4, 4)))
    np.testing.assert_array_equal(np.asarray(twin.proj.kernel[...]), module.proj.weight.detach().T)


def test_an_input_major_weight_of_bare_keys_is_recognised_by_its_shape() -> None:
    state = {"proj.weight": torch.randn(4, 6), "proj.bias": torch.randn(6)}

    class Net(ln.Module):
        @ln.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return ln.Dense(6, name="proj")(x)

    twin = to_flax(state, Net().init(jax.random.key(0), jnp.zeros((1, 4))))
    np.testing.assert_array_equal(np.asarray(twin["params"]["proj"]["kernel"]), state["proj.weight"].numpy())


# --- rules of one's own ----------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A dense layer that keeps its weight input-major, as some libraries do."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(before, after))
        self.bias = nn.Parameter(torch.randn(after))


def test_a_layer_of_the_users_own_takes_a_rule_of_the_users_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Conv1D(4, 4)

    template = Named(nnx.Rngs(0), proj=(4, 4))
    with pytest.raises(errors.PlanError, match=r"rules=\[Rule\(Conv1D"):
        to_flax(Net(), template)
    rule = Rule(Conv1D, [Entry("weight", "kernel", Identity()), Entry("bias", "bias")])
    module = Net()
    twin = to_flax(module, template, rules=[rule])
    np.testing.assert_array_equal(np.asarray(twin.proj.kernel[...]), module.proj.weight.detach())
    assert torch.equal(to_state_dict(twin, module, rules=[rule])["proj.weight"], module.proj.weight)


def test_a_users_rule_comes_before_ours_and_reaches_subclasses() -> None:
    class Transposed(nn.Linear):
        pass

    module = Transposed(4, 4)
    rule = Rule(Transposed, [Entry("weight", "kernel", Identity()), Entry("bias", "bias")])
    template = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    own = to_flax(module, template, rules=[rule])
    ours = to_flax(module, template)
    np.testing.assert_array_equal(np.asarray(own.kernel[...]), module.weight.detach())
    np.testing.assert_array_equal(np.asarray(ours.kernel[...]), module.weight.detach().T)


# --- wrong templates -------------------------------------------------------------------------------------


def test_every_fault_is_reported_at_once() -> None:
    module = TorchNamed(a=(3, 4), b=(4, 5), c=(5, 6))
    template = Named(nnx.Rngs(0), a=(3, 4), b=(4, 7), d=(9, 9))
    with pytest.raises(errors.PlanError) as caught:
        to_flax(module, template)
    message = str(caught.value)
    for piece in ("b.weight", "(5, 4)", "(4, 7)", "b.bias", "c.weight", "c.bias", "d.kernel", "d.bias"):
        assert piece in message, message
    assert "6 faults" in message


def test_a_layer_of_another_kind_is_refused_even_if_the_shape_fits() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.ConvTranspose(4, 4, (), rngs=rngs)

    with pytest.raises(errors.PlanError, match=r"'fc' \(Linear\) cannot fill 'fc' \(ConvTranspose\)"):
        to_flax(TorchNamed(fc=(4, 4)), Net(nnx.Rngs(0)))


def test_a_bias_on_one_side_alone_is_a_fault_that_names_both_layers() -> None:
    module = TorchNamed(fc=(3, 4))
    template = Named(nnx.Rngs(0), fc=(3, 4))
    template.fc = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(errors.PlanError, match=r"'fc\.bias' \(4,\).*has no 'bias'"):
        to_flax(module, template)


def test_a_torch_layer_without_counterpart_says_how_to_pass_a_rule() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(4))

    with pytest.raises(errors.PlanError) as caught:
        to_flax(Net(), Named(nnx.Rngs(0), fc=(3, 4)))
    assert "torch.nn.CrossEntropyLoss (weight) has no counterpart in Flax" in str(caught.value)
    assert "rules=[Rule(CrossEntropyLoss, [Entry(...), ...])]" in str(caught.value)


# --- flattened features ----------------------------------------------------------------------------------


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4 * 9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).flatten(1))


class NnxFlat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, front: bool) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), padding="VALID", rngs=rngs)
        self.fc = nnx.Linear(36, 2, rngs=rngs)
        self.front = front

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        if self.front:
            x = x.transpose(0, 3, 1, 2)
        return self.fc(x.reshape(x.shape[0], -1))


def test_a_linear_behind_a_flatten_is_refused_until_its_order_is_said() -> None:
    with pytest.raises(errors.PlanError) as caught:
        to_flax(Flat(), NnxFlat(nnx.Rngs(0), front=False))
    assert 'Flatten("fc", (4, 3, 3))' in str(caught.value)
    assert 'Flatten("fc", None)' in str(caught.value)


@pytest.mark.parametrize(("front", "features"), [(False, (4, 3, 3)), (True, None)])
def test_either_way_of_flattening_gives_the_same_outputs(
    front: bool, features: tuple[int, ...] | None
) -> None:
    module = Flat()
    rules = [Flatten("fc", features)]
    twin = to_flax(module, NnxFlat(nnx.Rngs(0), front=front), rules=rules)
    x = torch.randn(3, 1, 5, 5)
    got = np.asarray(twin(jnp.asarray(x.permute(0, 2, 3, 1).numpy())))
    np.testing.assert_allclose(got, module(x).detach(), atol=2e-6)
    back = to_state_dict(twin, module, rules=rules)
    assert torch.equal(back["fc.weight"], module.fc.weight)


def test_wrong_features_are_a_fault_and_so_is_a_flatten_that_names_no_linear() -> None:
    template = NnxFlat(nnx.Rngs(0), front=False)
    with pytest.raises(errors.PlanError, match="cannot be laid out"):
        to_flax(Flat(), template, rules=[Flatten("fc", (4, 3, 4))])
    with pytest.raises(errors.PlanError, match="which is no Linear"):
        to_flax(Flat(), template, rules=[Flatten("fc", (4, 3, 3)), Flatten("conv", (4, 3, 3))])
    with pytest.raises(errors.PlanError, match="names no layer"):
        to_flax(Flat(), template, rules=[Flatten("fc", (4, 3, 3)), Flatten("fc9", (4, 3, 3))])


class Heads(nn.Module):
    """Two layers that read one flattened map, defined before the convolution that makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(36, 2)
        self.fc2 = nn.Linear(36, 3)
        self.conv = nn.Conv2d(1, 4, 3)


class NnxHeads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(36, 2, rngs=rngs)
        self.fc2 = nnx.Linear(36, 3, rngs=rngs)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)


@pytest.mark.parametrize(
    "source", [Heads(), Heads().state_dict(), dict(sorted(Heads().state_dict().items()))]
)
def test_no_order_of_keys_or_definitions_hides_a_flatten(source: Any) -> None:
    made = plan(source, NnxHeads(nnx.Rngs(0)))
    assert [fault.path for fault in made.faults] == ["fc1", "fc2"]
    rules = [Flatten("fc1", (4, 3, 3)), Flatten("fc2", None)]
    assert plan(source, NnxHeads(nnx.Rngs(0)), rules=rules).ok


def test_names_that_count_from_another_number_are_refused() -> None:
    module = TorchNamed(fc1=(4, 4), fc2=(4, 4))
    template = Named(nnx.Rngs(0), fc0=(4, 4), fc1=(4, 4))
    with pytest.raises(errors.PlanError, match="count from different numbers"):
        to_flax(module, template)
    pairs = _pairs(module, template, rules=[Rename("fc1", "fc0"), Rename("fc2", "fc1")])
    assert pairs["fc2.weight"] == "fc1.kernel"


def test_a_sparse_tensor_of_a_state_dict_is_named() -> None:
    state = {"weight": torch.eye(3).to_sparse(), "bias": torch.zeros(3)}
    with pytest.raises(errors.BridgeError, match="sparse"):
        to_flax(state, nnx.Linear(3, 3, rngs=nnx.Rngs(0)))


def test_a_linear_behind_a_pooled_map_needs_nothing_said() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 8)
            self.fc2 = nn.Linear(8, 8)

    class NnxPooled(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)
            self.fc = nnx.Linear(4, 8, rngs=rngs)
            self.fc2 = nnx.Linear(8, 8, rngs=rngs)

    assert plan(Pooled(), NnxPooled(nnx.Rngs(0))).ok


# --- the printed plan ------------------------------------------------------------------------------------


def test_the_plan_prints_what_moves_what_stays_and_what_is_wrong() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.fc = nn.Linear(3, 4)

    class Twin(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.bn = nnx.BatchNorm(3, rngs=rngs)
            self.fc = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    made = plan(Net(), Twin(nnx.Rngs(0)))
    text = str(made)
    assert "bn.running_var   bn.var     as it is       BatchNorm1d" in text
    assert "fc.weight        fc.kernel  permute(1, 0)  Linear" in text
    assert "stays in torch: bn.num_batches_tracked" in text
    assert "stays in Flax: drop.rngs.key" in text
    assert "unexpected: 'fc.bias' (4,)" in text
    assert not made.ok
    assert [fault.kind for fault in made.faults] == ["unexpected"]
    assert made.faults[0].subject == "fc.bias"


def test_the_plan_is_the_same_whichever_side_comes_first() -> None:
    module, twin = nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert plan(module, twin) == plan(twin, module)
    assert (
        plan(module.state_dict(), nnx.state(twin)).moves == plan(nnx.state(twin), module.state_dict()).moves
    )


def test_a_plan_is_frozen() -> None:
    made = plan(nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(AttributeError):
        made.moves = ()  # type: ignore[misc]
    assert made.moves[0].layout == Permute((1, 0))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, "an int is no source"),
        (nn.Linear, "the class Linear is no source"),
        ({}, "empty"),
        ({"state_dict": {"weight": torch.ones(2)}, "epoch": 3}, r"pass source\['state_dict'\]"),
        ({"weight": torch.ones(2), "epoch": 3}, "'epoch' is an int"),
        ({("a", "b"): torch.ones(2)}, "no key of a state_dict"),
    ],
)
def test_what_is_no_source_is_refused_with_the_fix(source: Any, words: str) -> None:
    with pytest.raises(errors.PlanError, match=words):
        to_flax(source, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (3, "an int is no Flax template"),
        (nnx.Linear, "the class Linear is no Flax template"),
        ({}, "empty"),
        ({"kernel": np.ones((2, 3))}, r"\{'params': tree\}"),
        ({"fc": {"kernel": np.ones((2, 3))}}, r"\{'params': tree\}"),
        ({"params": {"kernel": "no array"}}, "not an array"),
        (ln.Dense(3), "that a linen module's init"),
    ],
)
def test_what_is_no_template_is_refused_with_the_fix(template: Any, words: str) -> None:
    with pytest.raises(errors.PlanError, match=words):
        to_flax(nn.Linear(2, 3), template)
