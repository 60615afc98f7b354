"""Whoever types every line that a plan proposes never ends in a wrong conversion: in a right one, or refused."""

import itertools
import random
import re
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import plan, to_flax
from torchjax_bridge.weights import Flatten, LayerType, Rename

Spec = dict[str, Any]  # a layer as (kind, *sizes), a module as a dict, a list of modules as a list


def _mlp(*widths: int) -> Spec:
    return {f"fc{i + 1}": ("linear", a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}


def _encoder(width: int = 4, wide: int = 8) -> Spec:
    return {
        "norm1": ("layernorm", width),
        "attn": dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), ("linear", width, width)),
        "norm2": ("layernorm", width),
        "mlp": {"fc1": ("linear", width, wide), "fc2": ("linear", wide, width)},
    }


def _basic(a: int, b: int) -> Spec:
    block: Spec = {"conv1": ("conv", a, b, 3), "bn1": ("batchnorm", b), "conv2": ("conv", b, b, 3)}
    block["bn2"] = ("batchnorm", b)
    return block | ({"down": [("conv", a, b, 1), ("batchnorm", b)]} if a != b else {})


ARCHITECTURES: dict[str, Spec] = {
    "two norms": {"norm1": ("layernorm", 4), "norm2": ("layernorm", 4)},
    "qkv": dict.fromkeys(("query", "key", "value", "out"), ("linear", 4, 4)),
    "mlp": _mlp(3, 4, 5),
    "square mlp": _mlp(4, 4, 4, 4),
    "bottleneck mlp": _mlp(8, 4, 4, 8),
    "encoder": _encoder(),
    "three encoders": {"layers": [_encoder() for _ in range(3)], "norm": ("layernorm", 4)},
    "vit": {
        "patch": ("conv", 3, 4, 2),
        "blocks": [_encoder() for _ in range(2)],
        "norm": ("layernorm", 4),
        "head": ("linear", 4, 5),
    },
    "bert": {
        "word": ("embed", 9, 4),
        "position": ("embed", 9, 4),
        "kind": ("embed", 2, 4),
        "norm": ("layernorm", 4),
        "layer": [_encoder(4, 8) for _ in range(2)],
        "pooler": ("linear", 4, 4),
    },
    "gpt": {"wte": ("embed", 9, 4), "wpe": ("embed", 9, 4), "h": [_encoder()], "ln_f": ("layernorm", 4)},
    "encoder and decoder": {"encoder": [_encoder()], "decoder": [_encoder()], "norm": ("layernorm", 4)},
    "two towers": {"text": {"proj": ("linear", 4, 4)}, "image": {"proj": ("linear", 4, 4)}},
    "siamese heads": {"body": _mlp(3, 4), "left": ("linear", 4, 2), "right": ("linear", 4, 2)},
    "resnet": {
        "conv1": ("conv", 3, 4, 3),
        "bn1": ("batchnorm", 4),
        "layer1": [_basic(4, 4), _basic(4, 4)],
        "layer2": [_basic(4, 6), _basic(6, 6)],
        "fc": ("linear", 6, 5),
    },
    "vgg": {"features": [("conv", 3, 4, 3), ("conv", 4, 4, 3), ("conv", 4, 4, 3)], "fc": ("linear", 4, 2)},
    "densenet": {f"conv{i}": ("conv", 4 + i, 4, 3) for i in range(3)},
    "inception": {name: ("conv", 4, 4, size) for name, size in (("a", 1), ("b", 3), ("c", 3), ("d", 5))},
    "autoencoder": {"encoder": _mlp(6, 4, 2), "decoder": _mlp(2, 4, 6)},
    "actor and critic": {"actor": _mlp(3, 4, 4, 2), "critic": _mlp(3, 4, 4, 1)},
    "mixer": {
        "blocks": [
            {
                "norm1": ("layernorm", 4),
                "token": _mlp(4, 4, 4),
                "norm2": ("layernorm", 4),
                "channel": _mlp(4, 4, 4),
            }
            for _ in range(2)
        ]
    },
    "gated": dict.fromkeys(("gate", "up"), ("linear", 4, 8)) | {"down": ("linear", 8, 4)},
    "experts": {"experts": [_mlp(4, 4, 4) for _ in range(3)], "router": ("linear", 4, 3)},
    "unet": {
        "down": [("conv", 3, 4, 3), ("conv", 4, 4, 3)],
        "middle": ("conv", 4, 4, 3),
        "up": [("conv", 4, 4, 3), ("conv", 4, 3, 3)],
    },
}


class Module(nn.Module):
    pass


class Scope(nnx.Module):
    pass


def _torch(spec: Any) -> nn.Module:
    if isinstance(spec, tuple):
        kind, *sizes = spec
        made = {
            "linear": nn.Linear,
            "layernorm": nn.LayerNorm,
            "batchnorm": nn.BatchNorm2d,
            "embed": nn.Embedding,
            "conv": nn.Conv2d,
        }[kind](*sizes)
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
        return made
    if isinstance(spec, list):
        return nn.ModuleList(map(_torch, spec))
    module = Module()
    for name, child in spec.items():
        setattr(module, name, _torch(child))
    return module


def _flax(spec: Any, rngs: nnx.Rngs) -> Any:
    if isinstance(spec, tuple):
        kind, *sizes = spec
        if kind == "conv":
            return nnx.Conv(*sizes[:2], (sizes[2],) * 2, padding="VALID", rngs=rngs)
        settings = {"layernorm": {"epsilon": 1e-5}, "batchnorm": {"momentum": 0.9}}.get(kind, {})
        made = {
            "linear": nnx.Linear,
            "layernorm": nnx.LayerNorm,
            "batchnorm": nnx.BatchNorm,
            "embed": nnx.Embed,
        }
        return made[kind](*sizes, **settings, rngs=rngs)
    if isinstance(spec, list):
        return nnx.List([_flax(child, rngs) for child in spec])
    module = Scope()
    for name, child in spec.items():
        setattr(module, name, _flax(child, rngs))
    return module


WORDS = ("ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "yew")
# In sorted order these run against, or beside, the order in which they are given.
FRESH = {
    "layernorm": ("layernorm_before", "layernorm_after", "final_layernorm"),
    "linear": ("query", "key", "value", "dense", "proj", "after", "before"),
}


def _renamed(spec: Spec, how: str, draw: random.Random) -> tuple[Spec, dict[tuple, tuple]]:
    """The same architecture under other names, and where each layer of it has gone."""
    names: dict[str, str] = {}
    places: dict[tuple, tuple] = {}

    def name_for(name: str, taken: set[str], child: Any) -> str:
        if how == "words in another order":
            free = [word for word in WORDS if word not in names.values()] or [f"w{len(names)}x"]
            return names.setdefault(name, draw.choice(free))
        if how == "usual":
            kind = child[0] if isinstance(child, tuple) else ""
            return next((one for one in FRESH.get(kind, ()) if one not in taken), f"z_{name}")
        if how == "shifted":
            stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
            return f"{stem}{int(number) - 1}" if number and int(number) else name
        return name

    def walk(one: Any, old: tuple, new: tuple) -> Any:
        if isinstance(one, tuple):
            places[old] = new
            return one
        if isinstance(one, list):
            return [walk(child, (*old, i), (*new, i)) for i, child in enumerate(one)]
        found: Spec = {}
        for name, child in one.items():
            fresh = name_for(name, set(found), child)
            found[fresh] = walk(child, (*old, name), (*new, fresh))
        if how in ("order", "words in another order"):
            found = dict(draw.sample(list(found.items()), len(found)))
        return found

    return walk(spec, (), ()), places


def _filled(tree: Any) -> dict[tuple, np.ndarray]:
    if isinstance(tree, dict):
        return {
            tuple(int(k.key) if k.key.isdigit() else k.key for k in path[1:]): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    state = nnx.to_flat_state(nnx.state(tree, (nnx.Param, nnx.BatchStat)))
    return {path: np.asarray(leaf[...]) for path, leaf in state}


def _as_linen(model: Any) -> dict[str, Any]:
    """The variables that a linen model of these names has, with its items flat: ``blocks_0``."""
    found: dict[str, Any] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        place = found.setdefault("params" if isinstance(leaf, nnx.Param) else "batch_stats", {})
        for part in path[:-1]:
            place = place.setdefault(str(part), {})
        place[path[-1]] = leaf.get_value()
    return found


LINE = re.compile(r"(Rename|LayerType|Flatten)\((\"[^()<>]*\"(?:, [^()<>]+?)?)\)")


def _proposed(text: str) -> list[Any]:
    """Every rule in a text that can be typed as it stands."""
    kinds = {"Rename": Rename, "LayerType": LayerType, "Flatten": Flatten}
    return [
        eval(f"{kind}({arguments})", {**vars(nn), "nn": nn, **kinds})
        for kind, arguments in LINE.findall(text)
    ]


def _bot(source: Any, template: Any) -> list[Any] | None:
    """Type every line that is proposed, round by round; None where that ends refused."""
    rules: list[Any] = []
    for _ in range(20):
        made = plan(source, template, rules=rules)
        if made.ok:
            return None if made.assumed else rules
        new = [rule for rule in _proposed(str(made)) if rule not in rules]
        if not new:
            return None
        rules = [*new, *rules]
    return None


HOWS = ("usual", "order", "shifted", "words in another order")


@pytest.mark.every(5)
@pytest.mark.parametrize("how", slow_but(["usual", "words in another order"], HOWS))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_line_that_a_plan_proposes_leads_to_a_wrong_conversion(name: str, how: str) -> None:
    torch.manual_seed(0)
    spec = ARCHITECTURES[name]
    module = _torch(spec)
    right = _filled(to_flax(module, nnx.eval_shape(lambda: _flax(spec, nnx.Rngs(0)))))
    other, places = _renamed(spec, how, random.Random(f"{name} {how}"))
    live = nnx.eval_shape(lambda: _flax(other, nnx.Rngs(0)))
    for template in (live, _ordered(other), _as_linen(live)):
        for source in (module, module.state_dict()):
            rules = _bot(source, template)
            if rules is None:
                continue
            filled = _filled(to_flax(source, template, rules=rules))
            for old, new in places.items():
                for path, value in right.items():
                    if path[: len(old)] == old:
                        np.testing.assert_array_equal(filled[(*new, *path[len(old) :])], value, str(rules))


def _ordered(spec: Spec) -> Any:
    """An abstract template with its attributes as they were defined, in an order that ``nnx.eval_shape`` loses."""

    def order(model: Any, one: Any) -> None:
        if isinstance(one, list):
            for child, inner in zip(model, one, strict=True):
                order(child, inner)
        elif isinstance(one, dict):
            for name, inner in one.items():
                child = getattr(model, name)
                vars(model)[name] = vars(model).pop(name)
                order(child, inner)

    model = nnx.eval_shape(lambda: _flax(spec, nnx.Rngs(0)))
    order(model, spec)
    return model


def test_the_bot_reaches_right_conversions_and_reads_what_is_proposed() -> None:
    assert _proposed('say rules=[Rename("a.*", "b*"), ...] or [LayerType("x", nn.Linear)]') == [
        Rename("a.*", "b*"),
        LayerType("x", nn.Linear),
    ]
    assert not _proposed('Rename("a", <"b" or "c">)')
    module = _torch(ARCHITECTURES["encoder"])
    assert _bot(module, _ordered(ARCHITECTURES["encoder"])) == []
    state = _torch(ARCHITECTURES["qkv"]).state_dict()
    template = _as_linen(nnx.eval_shape(lambda: _flax(ARCHITECTURES["qkv"], nnx.Rngs(0))))
    rules = _bot(state, template)
    assert rules
    assert all(isinstance(rule, LayerType) for rule in rules)


def test_the_order_of_definition_is_a_hint_in_words_and_sorted_names_give_none() -> None:
    spec = {"norm1": ("layernorm", 4), "norm2": ("layernorm", 4)}
    other = {"layernorm_before": ("layernorm", 4), "layernorm_after": ("layernorm", 4)}
    module = _torch(spec)
    text = str(plan(module, _flax(other, nnx.Rngs(0))))
    assert 'Rename("norm1", <"layernorm_before" or "layernorm_after">)' in text
    assert "'norm1' as 'layernorm_before', 'norm2' as 'layernorm_after', which proves nothing" in text
    sorted_by_nnx = nnx.eval_shape(lambda: _flax(other, nnx.Rngs(0)))
    assert "proves nothing" not in str(plan(module, sorted_by_nnx))
    assert "proves nothing" not in str(plan(module.state_dict(), _flax(other, nnx.Rngs(0))))
