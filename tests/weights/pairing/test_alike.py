"""Equal blocks are compared once; what differs in anything a rule may ask is never taken for equal."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge import plan
from torchjax_bridge.errors import PlanError
from torchjax_bridge.weights import Entry, Rename, Rule
from torchjax_bridge.weights.pairing._alike import Structures
from torchjax_bridge.weights.pairing._matcher import Matcher
from torchjax_bridge.weights.trees._read_flax import read_flax
from torchjax_bridge.weights.trees._read_torch import read_torch


class Block(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.index = index  # as many write it; no rule asks a block for it
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)


class FlaxBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(4)(linen.relu(linen.Dense(6)(x)))


class FlaxBlocks(linen.Module):
    count: int

    @linen.compact
    def __call__(self, x):
        for _ in range(self.count):
            x = FlaxBlock()(x)
        return x


def _blocks(count):
    return nn.ModuleDict({"blocks": nn.ModuleList(Block(index) for index in range(count))})


def _variables(count):
    return jax.eval_shape(FlaxBlocks(count).init, jax.random.key(0), jnp.zeros((1, 4)))


def test_equal_blocks_are_compared_a_number_of_times_that_grows_with_their_number(monkeypatch):
    compared = []
    original = Matcher._match

    def counting(self, torch_node, flax_node):
        compared.append(torch_node)
        return original(self, torch_node, flax_node)

    monkeypatch.setattr(Matcher, "_match", counting)

    def count(blocks):
        compared.clear()
        found = plan(_blocks(blocks), _variables(blocks))
        assert found.ok
        assert len(found.moves) == 4 * blocks
        return len(compared)

    few, many = count(10), count(20)
    assert many - few == count(30) - many


def test_what_is_compared_once_is_still_paired_each_with_its_own():
    found = plan(_blocks(12), _variables(12))
    place = {move.torch_keys[0]: move.flax_paths[0] for move in found.moves}
    assert place["blocks.11.up.weight"] == ("params", "FlaxBlock_11", "Dense_1", "kernel")
    assert place["blocks.2.down.bias"] == ("params", "FlaxBlock_2", "Dense_0", "bias")


def _number_of(module, structures=None):
    structures = structures or Structures(lambda node: True)
    return structures.of_torch(read_torch(module).root)


class WithTable(nn.Linear):
    def __init__(self, table):
        super().__init__(2, 3)
        self.table = table


class WithBuffer(nn.Linear):
    def __init__(self, values, persistent=True):
        super().__init__(2, 3)
        self.register_buffer("order", torch.tensor(values), persistent=persistent)


class Settings(dict):
    def __init__(self, turned):
        super().__init__()
        self.turned = turned


def _frozen():
    return nn.Linear(2, 3).requires_grad_(False)


def _counted():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3))
    return norm


def _holding_itself():
    table = {"width": 3}
    table["root"] = table
    return WithTable(table)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(nn.Linear(2, 3), nn.Linear(2, 3), id="other values"),
        pytest.param(nn.LSTM(2, 3, 2), nn.LSTM(2, 3, 2), id="weights held twice"),
        pytest.param(nn.Linear(2, 3), nn.Linear(2, 3).eval(), id="mode"),
        pytest.param(WithTable({"a": [1, 2]}), WithTable({"a": [1, 2]}), id="containers"),
        pytest.param(WithTable(torch.tensor([1, 0])), WithTable(torch.tensor([1, 0])), id="equal tensors"),
        pytest.param(WithBuffer([1, 0]), WithBuffer([1, 0]), id="equal buffers"),
        pytest.param(nn.BatchNorm1d(3), _counted(), id="statistics"),
    ],
)
def test_modules_of_one_structure_are_alike(one, other):
    structures = Structures(lambda node: True)
    assert _number_of(one, structures) == _number_of(other, structures)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(2, 8, 3), id="groups"),
        pytest.param(nn.Linear(2, 3), nn.Linear(2, 3, dtype=torch.bfloat16), id="dtype"),
        pytest.param(nn.Linear(2, 3), nn.Linear(2, 3, bias=False), id="bias"),
        pytest.param(nn.LayerNorm(3), nn.RMSNorm(3), id="class and names"),
        pytest.param(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4), id="heads"),
        pytest.param(WithTable(object()), WithTable(object()), id="what has no value"),
        pytest.param(WithTable(1), WithTable(True), id="equal of another type"),
        pytest.param(WithTable(torch.tensor([1, 0])), WithTable(torch.tensor([0, 1])), id="a tensor"),
        pytest.param(WithBuffer([1, 0]), WithBuffer([0, 1]), id="a buffer"),
        pytest.param(WithBuffer([1, 0], False), WithBuffer([0, 1], False), id="a buffer that is not saved"),
        pytest.param(WithTable(Settings(True)), WithTable(Settings(False)), id="a container of one's own"),
        pytest.param(nn.Linear(2, 3), _frozen(), id="what is trained"),
        pytest.param(_holding_itself(), _holding_itself(), id="a container that holds itself"),
        pytest.param(nn.Sequential(nn.Linear(2, 3)), nn.ModuleDict({"a": nn.Linear(2, 3)}), id="names below"),
    ],
)
def test_modules_that_a_rule_could_tell_apart_are_not_alike(one, other):
    structures = Structures(lambda node: True)
    assert _number_of(one, structures) != _number_of(other, structures)


class Turned(nn.Module):
    def __init__(self, turned):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.turned = torch.tensor(turned)


def test_a_rule_that_asks_a_tensor_of_its_layer_is_asked_for_each():
    def entries(layer):
        name = "turned" if layer.module.turned else "plain"
        if (name,) not in layer.flax:
            raise ValueError(f"its scope has no {name}")
        return [Entry("weight", name)]

    module = nn.ModuleDict({"a": Turned(False), "b": Turned(True)})
    leaf = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    found = plan(
        module, {"params": {"x": {"turned": leaf}, "y": {"plain": leaf}}}, rules=[Rule(Turned, entries)]
    )
    assert [(move.torch_keys, move.flax_paths) for move in found.moves] == [
        (("a.weight",), (("params", "y", "plain"),)),
        (("b.weight",), (("params", "x", "turned"),)),
    ]
    assert found.ok


def test_settings_count_below_a_rule_only():
    """So ``layer_idx`` of a block does not make every block its own kind, and a rule for a block may ask for it."""
    without, within = (
        Structures(lambda node: False),
        Structures(lambda node: isinstance(node.module, nn.ModuleList)),
    )
    same = [Block(0), Block(1)]
    assert len({without.of_torch(read_torch(block).root) for block in same}) == 1
    held = [nn.ModuleList([block]) for block in same]
    assert len({within.of_torch(read_torch(one).root) for one in held}) == 2


def test_flax_scopes_differ_by_setting_collection_and_shape():
    structures = Structures(lambda node: True)

    def number(template):
        return structures.of_flax(read_flax(template).root)

    def conv(groups, features=4):
        return nnx.Conv(4, features, (1, 1), feature_group_count=groups, rngs=nnx.Rngs(0))

    assert number(conv(1)) == number(conv(1))
    grouped = nnx.Conv(8, 4, (1, 1), feature_group_count=2, rngs=nnx.Rngs(0))
    assert grouped.kernel.shape == conv(1).kernel.shape
    assert number(grouped) != number(conv(1))
    assert number(conv(1)) != number(conv(1, features=8))
    value = jnp.zeros(3)
    assert number({"params": {"a": value}}) == number({"params": {"a": value}})
    assert number({"params": {"a": value}}) != number({"batch_stats": {"a": value}})
    assert number({"params": {"a": value}}) != number({"params": {"b": value}})


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)


class FlaxTwoNorms(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.LayerNorm()(linen.Dense(4)(linen.LayerNorm()(x))))


class FlaxDoubts(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(3):
            x = FlaxTwoNorms()(x)
        return x


def test_one_doubt_in_every_block_is_one_line_with_the_rules_that_settle_all_of_them():
    module = nn.ModuleDict({"blocks": nn.ModuleList(TwoNorms() for _ in range(3))})
    variables = jax.eval_shape(FlaxDoubts().init, jax.random.key(0), jnp.zeros((1, 4)))
    report = plan(module, variables).report
    assert len(report) == 6  # as data, each
    lines = str(report).splitlines()
    assert len(lines) == 2  # norms, and linear layers
    options = '"FlaxTwoNorms_*.LayerNorm_0" or "FlaxTwoNorms_*.LayerNorm_1"'
    wanted = f'rules=[Rename("blocks.*.first", <{options}>), ...] matches all of them'
    assert f"the same in 2 more blocks up to 'blocks.2.first', and {wanted}" in lines[0]
    with pytest.raises(PlanError, match=r"6 faults\n  ambiguous: .*\n  ambiguous: .*$"):
        report.raise_unless_ok("convert", strict=True)
    rules = [Rename("blocks.*.first", "blocks.*.LayerNorm_0"), Rename("blocks.*.up", "blocks.*.Dense_1")]
    assert plan(module, variables, rules=rules).ok
    as_in_flax = [
        Rename("blocks.*.first", "FlaxTwoNorms_*.LayerNorm_0"),
        Rename("blocks.*.up", "FlaxTwoNorms_*.Dense_1"),
    ]
    assert plan(module, variables, rules=as_in_flax).moves == plan(module, variables, rules=rules).moves


class Pair(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm_a, self.norm_b = nnx.LayerNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)


class NumberedPairs(nnx.Module):
    def __init__(self):
        self.block10, self.block11, self.block12 = Pair(), Pair(), Pair()
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)


def test_advice_for_numbered_names_leads_to_a_plan_step_by_step():
    blocks = nn.ModuleList([nn.Identity() for _ in range(10)] + [Norms() for _ in range(3)])
    module, template = nn.ModuleDict({"layers": blocks, "head": nn.Linear(4, 2)}), NumberedPairs()
    advice = 'if their numbers say which is which, rules=[Rename("layers.*", "block*"), ...]'
    assert advice in str(plan(module, template).report)
    blocks_by_number = Rename("layers.*", "block*")
    report = str(plan(module, template, rules=[blocks_by_number]).report)
    options = '"block*.norm_a" or "block*.norm_b"'
    advice = f'rules=[Rename("layers.*.first", <{options}>), ...] matches all of them'
    assert f"the same in 2 more blocks up to 'layers.12.first', and {advice}" in report
    norms = Rename("layers.*.first", "block*.norm_a")
    late = str(plan(module, template, rules=[blocks_by_number, norms]).report)
    assert (
        f"{norms} never applies, since {blocks_by_number} comes first and matches the same: put it first"
        in late
    )
    found = plan(module, template, rules=[norms, blocks_by_number])
    assert found.ok
    place = {move.torch_keys[0]: move.flax_paths[0] for move in found.moves}
    assert place["layers.11.second.weight"] == ("block11", "norm_b", "scale")


def _scopes(*names):
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
    scopes = {}
    for name in names:
        place = scopes
        for part in name.split("/"):
            place = place.setdefault(part, {})
        for norm in ("norm_a", "norm_b"):
            place[norm] = {"scale": leaf, "bias": leaf}
    return {"params": scopes}


class TwoAlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)


def test_the_rules_for_a_renamed_state_dict_speak_of_its_own_names():
    state = nn.ModuleDict({"layers": nn.ModuleList(TwoAlike() for _ in range(3))}).state_dict()
    template = _scopes("enc/blocks_0", "enc/blocks_1", "enc/blocks_2")
    moved = Rename("layers", "enc.blocks")
    (line,) = str(plan(state, template, rules=[moved]).report).splitlines()
    advised = Rename("layers.*.first", "enc.blocks.*.norm_a")
    options = '"enc.blocks.*.norm_a" or "enc.blocks.*.norm_b"'
    assert f'rules=[Rename("layers.*.first", <{options}>), ...] matches all of them' in line
    assert plan(state, template, rules=[advised, moved]).ok


def test_what_holds_tensors_renamed_from_two_places_is_called_by_its_new_name():
    leaf = torch.zeros(2)
    root = read_torch(
        {"a.x.w": leaf, "b.y.w": leaf, "c.z.w": leaf}, [Rename("a.x", "b.x"), Rename("c", "d")]
    ).root
    assert {node.path: node.origin for node in root.walk()} == {
        (): (),
        ("b",): ("b",),
        ("b", "x"): ("a", "x"),
        ("b", "y"): ("b", "y"),
        ("d",): ("c",),
        ("d", "z"): ("c", "z"),
    }


def test_no_one_pattern_is_advised_for_blocks_that_are_doubted_in_two_ways():
    rows = nn.ModuleList(nn.ModuleList(TwoAlike() for _ in range(2)) for _ in range(2))
    module, template = nn.ModuleDict({"st": rows}), _scopes("s0/b0", "s0/b1", "s1/b0", "s1/b1")
    moved = [Rename("st.*.0", "st.s*.b0"), Rename("st.*", "st.s*")]
    found = plan(module, template, rules=moved)
    assert len(found.faults) == 4
    assert "matches all of them" not in str(found.report)
    told = [
        Rename(f"st.{i}.{j}.first", f"st.s{i}.{b}.norm_a") for i in range(2) for j, b in ((0, "b0"), (1, 1))
    ]
    assert plan(module, template, rules=[*told, *moved]).ok


class TwoOfOneName(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.third = nn.LayerNorm(4)


def test_no_pattern_is_advised_that_also_renames_what_has_its_partner():
    """Taken for all, it would give ``norm_a`` of the last scope, which is no ``first``, to ``first``."""
    module = nn.ModuleDict({"layers": nn.ModuleList(TwoOfOneName() for _ in range(3))})
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
    norm = {"scale": leaf, "bias": leaf}
    names = [("norm_a", "norm_b", "norm_c"), ("norm_a", "norm_b", "norm_c"), ("first", "second", "norm_a")]
    template = {"params": {f"layers_{i}": dict.fromkeys(one, norm) for i, one in enumerate(names)}}
    found = plan(module, template)
    assert [fault.path for fault in found.faults] == ["layers.0.first", "layers.1.first"]
    assert "layers.*" not in str(found.report)
    settled = [Rename("layers.2.third", "layers.2.norm_a"), Rename("layers.0.first", "layers.0.norm_a")]
    (line,) = str(plan(module, template, rules=settled).report).splitlines()[1:]
    assert "layers.*" not in line


def test_a_pattern_is_advised_for_all_but_what_the_caller_has_renamed():
    module = nn.ModuleDict({"layers": nn.ModuleList(TwoAlike() for _ in range(4))})
    template = _scopes(*(f"layers_{i}" for i in range(4)))
    told, advised = Rename("layers.0.second", "layers.0.norm_a"), Rename("layers.*.first", "layers.*.norm_a")
    own = Rename("layers.0.first", "layers.0.norm_b")
    report = plan(module, template, rules=[told, own]).report
    options = '"layers.*.norm_a" or "layers.*.norm_b"'
    assert f'rules=[Rename("layers.*.first", <{options}>), ...] matches all of them' in str(report)
    found = plan(module, template, rules=[told, own, advised])
    assert found.ok
    place = {move.torch_keys[0]: move.flax_paths[0] for move in found.moves}
    assert place["layers.0.first.weight"] == ("params", "layers_0", "norm_b", "scale")
    assert place["layers.3.first.weight"] == ("params", "layers_3", "norm_a", "scale")


def test_no_pattern_for_numbers_is_advised_that_also_renames_a_sibling_of_the_right_name():
    module = nn.ModuleDict({"f": nn.ModuleList(nn.LayerNorm(4) for _ in range(4))})
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)

    def report(*names):
        scope = {name: {"scale": leaf, "bias": leaf} for name in names}
        return str(plan(module, {"params": {"f": scope}}).report)

    assert 'rules=[Rename("f.*", "f.fc*"), ...]' in report("fc0", "fc1", "fc2", "fc3")
    assert 'rules=[Rename("f.0", <"f.fc0" or "f.fc1">), ...]' in report("fc0", "fc1", "2", "3")


class Distributed(torch.Tensor):
    """As one whose values lie elsewhere."""

    def tolist(self):
        raise AssertionError("the values were asked for")


def test_values_are_read_of_plain_tensors_alone():
    structures = Structures(lambda node: True)
    one, other = (WithTable(torch.ones(3).as_subclass(Distributed)) for _ in range(2))
    assert _number_of(one, structures) != _number_of(other, structures)
    plain = [WithTable(torch.ones(3)), WithTable(torch.ones(3)), WithTable(torch.zeros(3))]
    numbers = [_number_of(module, structures) for module in plain]
    assert numbers[0] == numbers[1] != numbers[2]
