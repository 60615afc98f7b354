"""What a rule names and is not there, on either side, is a fault that says what may have been meant."""

from typing import Any

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import plan
from torchjax_bridge.weights import Flatten, LayerType, Rename


class Twin(nnx.Module):
    def __init__(self, *names: str) -> None:
        rngs = nnx.Rngs(0)
        for name, widths in zip(names, ((3, 4), (4, 5)), strict=True):
            setattr(self, name, nnx.Linear(*widths, rngs=rngs))


def _torch() -> nn.Module:
    return nn.ModuleDict({"stem": nn.Linear(3, 4), "head": nn.Linear(4, 5)})


def _linen(*names: str) -> dict[str, Any]:
    shapes = ((3, 4), (4, 5))
    return {
        "params": {
            name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}
            for name, shape in zip(names, shapes, strict=True)
        }
    }


NOT_IN_FLAX = [
    (Rename("stem", "A"), "a"),  # its only partner is found by its shape whatever it is called
    (Rename("head", "bb"), "b"),
    (Rename("stem.*", "A.*"), "a"),
    (Rename("*em", "A"), "a"),
    (Rename("stem.weight", "A.kernel"), "a"),
    (Rename("stem.weight", "a.kernal"), "a.kernel"),
]


@pytest.mark.parametrize(("rename", "meant"), NOT_IN_FLAX)
@pytest.mark.parametrize("bare", [False, True], ids=["module", "state_dict"])
def test_a_rename_to_a_name_that_flax_has_not_is_a_fault(rename: Rename, meant: str, bare: bool) -> None:
    module = _torch()
    for template in (Twin("a", "b"), nnx.eval_shape(lambda: Twin("a", "b")), _linen("a", "b")):
        made = plan(module.state_dict() if bare else module, template, rules=[rename])
        said = [fault.message for fault in made.faults if fault.kind == "rules"]
        assert said == [f"{rename} names nothing on the Flax side; did you mean '{meant}'?"]
        assert not made.ok


def test_a_rename_to_a_place_that_another_layer_takes_is_a_fault() -> None:
    made = plan(_torch(), Twin("stem", "b"), rules=[Rename("head", "stem")])
    assert not made.ok
    rows = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    template = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(2)])
    assert not plan(rows, nnx.Dict(rows=template), rules=[Rename("1", "x")]).ok


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rename("stam", "a"), "matches nothing on the torch side; did you mean 'stem'?"),
        (Rename("Head.weight", "b.kernel"), "matches nothing on the torch side; did you mean 'head.weight'?"),
        (LayerType("haed", nn.Linear), "names no layer of the torch side; did you mean 'head'?"),
        (Flatten("STEM", None), "names no layer of the torch side; did you mean 'stem'?"),
    ],
)
def test_a_name_that_torch_has_not_is_a_fault(rule: Any, words: str) -> None:
    for source in (_torch(), _torch().state_dict()):
        made = plan(source, Twin("stem", "head"), rules=[rule])
        assert f"{rule} {words}" in [fault.message for fault in made.faults]


def test_the_spellings_that_the_pairing_knows_are_names() -> None:
    module = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(2))})
    linear = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    flat = {"params": {"blocks_0": linear, "blocks_1": linear}}
    sequential = {"params": {"net": {"layers_0": linear, "layers_1": linear}}}
    for template, rules in (
        (flat, [Rename("layers", "blocks")]),
        (flat, [Rename("layers.0", "blocks_0"), Rename("layers.1", "blocks_1")]),
        (flat, [Rename("layers.0", "layers.blocks_0"), Rename("layers.1", "layers.blocks_1")]),
        (sequential, [Rename("layers", "net")]),
        (
            nnx.Dict(net=nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in "ab"))),
            [Rename("layers", "net")],
        ),
    ):
        for source in (module, {key: torch.zeros_like(value) for key, value in module.state_dict().items()}):
            said = [LayerType("layers.*", nn.Linear)]
            assert plan(source, template, rules=[*rules, *said]).ok
