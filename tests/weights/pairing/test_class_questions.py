"""Bare keys: the square layers of a model are one question, and its answer reaches no layer beside them."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from torchjax_bridge import plan, to_flax
from torchjax_bridge.weights import Entry, Identity, LayerType, Rename, Rule


def _dense(before: int, after: int) -> dict[str, Any]:
    return {"kernel": jax.ShapeDtypeStruct((before, after), jnp.float32), "bias": _vector(after)}


def _vector(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.float32)


def _norm(size: int) -> dict[str, Any]:
    return {"scale": _vector(size), "bias": _vector(size)}


class Bert(nn.Module):
    """The names and the shapes of a BERT of a model hub."""

    def __init__(self, depth: int, wide: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(self._layer(wide) for _ in range(depth))
        self.pooler = nn.ModuleDict({"dense": nn.Linear(4, 4)})

    @staticmethod
    def _layer(wide: int) -> nn.Module:
        self_attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")})
        output = {"dense": nn.Linear(4, 4), "LayerNorm": nn.LayerNorm(4)}
        return nn.ModuleDict(
            {
                "attention": nn.ModuleDict({"self": self_attention, "output": nn.ModuleDict(output)}),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(4, wide)}),
                "output": nn.ModuleDict({"dense": nn.Linear(wide, 4), "LayerNorm": nn.LayerNorm(4)}),
            }
        )


def _flax_bert(depth: int, wide: int = 12) -> dict[str, Any]:
    layer = {
        "attention": {
            "self": {name: _dense(4, 4) for name in ("query", "key", "value")},
            "output": {"dense": _dense(4, 4), "LayerNorm": _norm(4)},
        },
        "intermediate": {"dense": _dense(4, wide)},
        "output": {"dense": _dense(wide, 4), "LayerNorm": _norm(4)},
    }
    return {
        "params": {
            "encoder": {"layer": {str(number): layer for number in range(depth)}},
            "pooler": {"dense": _dense(4, 4)},
        }
    }


def _layer_types(text: str) -> list[LayerType]:
    return [
        LayerType(path, getattr(nn, kind))
        for path, kind in re.findall(r'LayerType\("([^"]+)", nn\.(\w+)\)', text)
    ]


def test_the_square_layers_of_a_bert_are_one_line_with_patterns_that_settle_them() -> None:
    module, template = Bert(12), _flax_bert(12)
    made = plan(module.state_dict(), template)
    assert len(made.faults) == 49  # as data, each
    (line,) = str(made.report).splitlines()
    assert len(line) < 700
    patterns = ["encoder.layer.*.attention.self.*", "encoder.layer.*.attention.output.dense", "pooler.dense"]
    assert {rule.torch for rule in _layer_types(line.partition("the same in 48 more layers")[2])} == set(
        patterns
    )
    rules = [LayerType(pattern, nn.Linear) for pattern in patterns]
    filled = to_flax(module.state_dict(), template, rules=rules)
    whole = to_flax(module, template)
    for ours, theirs in zip(jax.tree.leaves(filled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_pattern_reaches_no_layer_that_is_not_in_doubt() -> None:
    """``mix.*`` would also speak of the norm, and ``blocks.*`` of a block that is no square layer."""
    module = nn.ModuleDict(
        {
            "mix": nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}),
            "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 8)]),
        }
    )
    template = {
        "params": {
            "mix": {"a": _dense(4, 4), "b": _dense(4, 4), "norm": _norm(4)},
            "blocks": {"0": _dense(4, 4), "1": _dense(4, 4), "2": _dense(4, 8)},
        }
    }
    text = str(plan(module.state_dict(), template).report)
    assert {rule.torch for rule in _layer_types(text)} == {"mix.a", "mix.b", "blocks.0", "blocks.1"}
    assert plan(module.state_dict(), template, rules=_layer_types(text)).ok


def test_layers_that_the_caller_has_renamed_are_called_by_their_own_names() -> None:
    module = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "out": nn.Linear(4, 2)})
    template = {"params": {"blocks": {str(i): _dense(4, 4) for i in range(3)}, "out": _dense(4, 2)}}
    moved = Rename("h", "blocks")
    text = str(plan(module.state_dict(), template, rules=[moved]).report)
    assert LayerType("h.*", nn.Linear) in _layer_types(text)
    assert plan(module.state_dict(), template, rules=[moved, LayerType("h.*", nn.Linear)]).ok


def test_no_linear_is_advised_where_the_other_weights_lie_input_major() -> None:
    """As in a GPT-2, whose ``c_proj`` is square: taken for a Linear it would be transposed in silence."""
    state = {}
    for name, shape in {"c_attn": (4, 12), "c_proj": (4, 4)}.items():
        state |= {f"h.0.{name}.weight": torch.randn(shape), f"h.0.{name}.bias": torch.randn(shape[1])}
    template = {"params": {"h": {"0": {"c_attn": _dense(4, 12), "c_proj": _dense(4, 4)}}}}
    (fault,) = plan(state, template).faults
    assert not _layer_types(fault.message)
    assert "lie input-major" in fault.message

    class Conv1D(nn.Module):
        pass

    rules = [
        LayerType("h.*.c_proj", Conv1D),
        Rule(Conv1D, [Entry("weight", "kernel", Identity()), Entry("bias", "bias")]),
    ]
    filled = to_flax(state, template, rules=rules)
    np.testing.assert_array_equal(filled["params"]["h"]["0"]["c_proj"]["kernel"], state["h.0.c_proj.weight"])


@pytest.mark.parametrize("depth", [1, 2])
def test_one_layer_in_doubt_has_a_line_of_its_own(depth: int) -> None:
    module = nn.ModuleDict({"proj": nn.Linear(4, 4), "head": nn.Linear(4, depth + 1)})
    template = {"params": {"proj": _dense(4, 4), "head": _dense(4, depth + 1)}}
    text = str(plan(module.state_dict(), template).report)
    assert _layer_types(text) == [LayerType("proj", nn.Linear)]
