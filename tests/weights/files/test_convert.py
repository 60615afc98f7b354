"""Converting from disk to disk: the same bits as in memory, in both directions, complete or not at all."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import CheckpointError, PlanError
from torchjax_bridge.weights import (
    Flatten,
    Rename,
    compare_checkpoints,
    convert,
    load_flax,
    load_state_dict,
    open_checkpoint,
    save_flax,
    save_state_dict,
    to_flax,
    to_state_dict,
)
from torchjax_bridge.weights.files import _pipeline

from ..models import IMAGE, LinenNet, Net, NnxNet, net
from .bits import assert_same, bits
from .mlp import Mlp, NnxMlp, sharded

Folder = pathlib.Path
HEAD = [Flatten("fc1", (4, 2, 2))]


def _meta_net() -> nn.Module:
    with torch.device("meta"):
        return Net()


def _nnx_net() -> nnx.Module:
    return nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))


def _linen() -> object:
    return jax.eval_shape(LinenNet().init, jax.random.key(0), jax.ShapeDtypeStruct(IMAGE, jnp.float32))


def _meta_mlp() -> nn.Module:
    with torch.device("meta"):
        return Mlp(dtype=torch.float32)


@pytest.mark.every(2)
@pytest.mark.parametrize("format", ["safetensors", "msgpack", "orbax"])
@pytest.mark.parametrize("middle", ["model", "names"])
def test_a_sharded_bf16_checkpoint_comes_back_to_the_bit(tmp_path: Folder, format: str, middle: str) -> None:
    state = sharded(tmp_path / "torch")
    there = tmp_path / ("flax.msgpack" if format == "msgpack" else "flax")
    template = nnx.eval_shape(NnxMlp)
    model = _meta_mlp() if middle == "model" else None
    done = convert(tmp_path / "torch", there, to="flax", format=format, template=template, model=model)
    assert done.plan is not None
    assert done.nbytes == sum(tensor.nbytes for tensor in state.values())
    filled = load_flax(there, template)
    assert filled.layers[2].kernel.get_value().dtype == jnp.bfloat16
    assert bits(filled.layers[2].kernel.get_value())[2] == bits(state["layers.2.weight"].t())[2]
    convert(there, tmp_path / "back", to="torch", model=_meta_mlp())
    assert_same(load_state_dict(tmp_path / "back"), state)


def test_a_large_kernel_is_laid_out_and_written_piece_by_piece(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch, laid_out: list[torch.Size]
) -> None:
    monkeypatch.setattr(_pipeline, "_PIECE_BYTES", 1000)
    weights = torch.randn(30, 40).bfloat16()
    save_state_dict(tmp_path / "torch", {"weight": weights, "bias": torch.zeros(30).bfloat16()})
    template = nnx.eval_shape(lambda: nnx.Linear(40, 30, rngs=nnx.Rngs(0)))
    convert(tmp_path / "torch", tmp_path / "flax", to="flax", template=template)
    assert sorted(laid_out) == [(8, 30)] + 2 * [(16, 30)]
    assert bits(load_flax(tmp_path / "flax", template).kernel.get_value())[2] == bits(weights.t())[2]


def test_shards_stay_as_the_source_had_them(tmp_path: Folder) -> None:
    sharded(tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "flax", to="flax", template=nnx.eval_shape(NnxMlp))
    before, after = open_checkpoint(tmp_path / "torch"), open_checkpoint(tmp_path / "flax")
    assert len(before.shards) == len(after.shards) > 2
    kinds = {"layers": "kernel", "embed": "embedding", "norm": "scale"}
    place = {shard: n for n, shard in enumerate(before.shards)}
    for name, leaf in before.leaves.items():
        kind = next(kind for part, kind in kinds.items() if part in name)
        flax_name = name.replace("weight", kind)
        assert after.shards.index(after.leaves[flax_name].shard) == place[leaf.shard]


def test_converting_gives_what_to_flax_gives(tmp_path: Folder) -> None:
    module = net()
    save_state_dict(tmp_path / "m.pt", module)
    for template, folder in ((_nnx_net(), "nnx"), (_linen(), "linen")):
        convert(
            tmp_path / "m.pt", tmp_path / folder, to="flax", template=template, model=_meta_net(), rules=HEAD
        )
        ours, theirs = load_flax(tmp_path / folder, template), to_flax(module, template, rules=HEAD)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                assert bits(one) == bits(other)


def test_a_network_with_counters_comes_back_whole(tmp_path: Folder) -> None:
    module = net()
    save_state_dict(tmp_path / "m.pt", module)
    convert(
        tmp_path / "m.pt",
        tmp_path / "f.safetensors",
        to="flax",
        template=_linen(),
        model=_meta_net(),
        rules=HEAD,
    )
    convert(tmp_path / "f.safetensors", tmp_path / "b.pth", to="torch", model=_meta_net(), rules=HEAD)
    back = torch.load(tmp_path / "b.pth", weights_only=True)
    assert int(back["blocks.0.bn1.num_batches_tracked"]) == 7
    assert_same(back, module.state_dict())


def test_wrapped_keys_fit_the_module_that_was_written(tmp_path: Folder) -> None:
    module = net()
    state = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "m.th")
    convert(tmp_path / "m.th", tmp_path / "f", to="flax", template=_nnx_net(), model=_meta_net(), rules=HEAD)
    found = load_flax(tmp_path / "f", _nnx_net()).stem.bias.get_value()
    assert bits(found)[1:] == bits(module.stem.bias)[1:]


def test_tied_tensors_of_a_module_on_the_meta_device_come_back_tied(tmp_path: Folder) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    module = Tied()
    save_state_dict(tmp_path / "m.pt", module)
    with torch.device("meta"):
        meta = Tied()
    template = {"params": {"embed": {"embedding": jax.ShapeDtypeStruct((6, 4), jnp.float32)}}}
    convert(tmp_path / "m.pt", tmp_path / "f", to="flax", template=template, model=meta)
    assert list(open_checkpoint(tmp_path / "f").leaves) == ["params.embed.embedding"]
    convert(tmp_path / "f", tmp_path / "b.pt", to="torch", model=meta)
    back = load_state_dict(tmp_path / "b.pt")
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert_same(back, module.state_dict())


def test_within_one_framework_nothing_is_needed(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "one.safetensors", to="torch")
    convert(tmp_path / "one.safetensors", tmp_path / "two.pt", to="torch")
    convert(tmp_path / "two.pt", tmp_path / "three", to="torch", shard_size=4096)
    assert_same(load_state_dict(tmp_path / "three"), state)
    assert len(open_checkpoint(tmp_path / "three").shards) == 2


def test_a_dtype_casts_floats_and_leaves_integers(tmp_path: Folder) -> None:
    state = {"w": torch.randn(3, 4), "n": torch.tensor(2**40)}
    save_state_dict(tmp_path / "m.pt", state)
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", to="torch", dtype=torch.bfloat16)
    assert_same(load_state_dict(tmp_path / "m.safetensors"), {"w": state["w"].bfloat16(), "n": state["n"]})


def test_64_bit_weights_cross_on_disk_with_x64_off(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", {"d.weight": torch.randn(3, 4, dtype=torch.float64)})
    template = {"params": {"d": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}}}
    convert(tmp_path / "m.pt", tmp_path / "f", to="flax", template=template)
    assert open_checkpoint(tmp_path / "f").leaves["params.d.kernel"].dtype == torch.float64


def test_rules_serve_files_too(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", {"old.weight": torch.randn(3, 4), "old.bias": torch.randn(3)})
    template = nnx.eval_shape(lambda: nnx.Dict(new=nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    convert(tmp_path / "m.pt", tmp_path / "f", to="flax", template=template, rules=[Rename("old", "new")])
    assert sorted(open_checkpoint(tmp_path / "f").leaves) == ["new.bias", "new.kernel"]


# --- what is refused -----------------------------------------------------------------------------------


def test_without_the_other_side_one_is_told_what_to_give(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", {"w": torch.ones(2)})
    save_flax(tmp_path / "f.msgpack", {"params": {"w": jnp.ones(2)}})
    with pytest.raises(CheckpointError, match="template="):
        convert(tmp_path / "m.pt", tmp_path / "o", to="flax")
    with pytest.raises(CheckpointError, match="model="):
        convert(tmp_path / "f.msgpack", tmp_path / "o", to="torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.msgpack", "m.pt"]


def test_a_file_that_is_not_the_models_is_told_every_key(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", {"fc.weight": torch.ones(2, 2), "extra": torch.ones(1)})
    with torch.device("meta"):
        model = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    template = nnx.eval_shape(lambda: nnx.Dict(fc=nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "m.pt", tmp_path / "o", to="flax", template=template, model=model)
    for line in ("mismatch: (2, 2) in the file, (2, 3) in the model @ fc.weight", "missing: (2,) @ fc.bias",
                 "unexpected: (1,) @ extra"):  # fmt: skip
        assert line in str(caught.value)


def test_a_plan_with_faults_writes_nothing(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "m.pt", {"fc.weight": torch.ones(2, 2)})
    template = nnx.eval_shape(lambda: nnx.Dict(fc=nnx.Linear(3, 2, rngs=nnx.Rngs(0))))
    with pytest.raises(PlanError, match="mismatch"):
        convert(tmp_path / "m.pt", tmp_path / "o", to="flax", template=template)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_what_is_there_is_replaced_only_when_told(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "torch", tmp_path / "out", to="torch")  # an empty folder is no loss
    with pytest.raises(CheckpointError, match="overwrite=True"):
        convert(tmp_path / "torch", tmp_path / "out", to="torch", dtype=torch.float32)
    assert_same(load_state_dict(tmp_path / "out"), state)
    convert(tmp_path / "torch", tmp_path / "out", to="torch", dtype=torch.float32, overwrite=True)
    assert load_state_dict(tmp_path / "out")["norm.bias"].dtype == torch.float32
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        convert(tmp_path / "torch", tmp_path / "out", to="torch", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


# --- comparing -----------------------------------------------------------------------------------------


def test_checkpoints_of_two_frameworks_are_compared_bit_by_bit(tmp_path: Folder) -> None:
    state = sharded(tmp_path / "torch")
    template = nnx.eval_shape(NnxMlp)
    convert(tmp_path / "torch", tmp_path / "flax", to="flax", template=template)
    assert compare_checkpoints(tmp_path / "torch", tmp_path / "flax", template=template).ok
    assert compare_checkpoints(tmp_path / "flax", tmp_path / "torch", model=_meta_mlp()).same == len(state)
    state["layers.1.weight"] = state["layers.1.weight"].clone()
    state["layers.1.weight"][0, 0] = 5.0
    state["layers.1.weight"][0, 1] = 1.0
    state["norm.bias"] = state["norm.bias"].clone().view(torch.int16).bitwise_xor(1).view(torch.bfloat16)
    save_state_dict(tmp_path / "other", {name: t for name, t in state.items() if name != "embed.weight"})
    found = compare_checkpoints(tmp_path / "torch", tmp_path / "other")
    assert found.differences[0].name == "embed.weight"
    counts = {one.name: one.elements for one in found.differences}
    assert counts == {"embed.weight": 0, "layers.1.weight": 2, "norm.bias": 24}
    assert found.same == len(state) - 3


def test_signed_zeros_and_nan_payloads_are_differences(tmp_path: Folder) -> None:
    raw = torch.tensor([0x7FC00000, 0x7FC00001, 0], dtype=torch.int32)
    save_state_dict(tmp_path / "a.pt", {"w": raw.view(torch.float32)})
    raw = torch.tensor([0x7FC00000, 0x7FC00002, -(2**31)], dtype=torch.int32)
    save_state_dict(tmp_path / "b.pt", {"w": raw.view(torch.float32)})
    (found,) = compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt").differences
    assert found.elements == 2
    assert found.largest == 0.0


def test_notes_of_ours_survive_a_change_of_format(tmp_path: Folder) -> None:
    save_flax(tmp_path / "a.safetensors", {"params": {"0": {"w.x": jnp.ones(2)}}})
    convert(tmp_path / "a.safetensors", tmp_path / "b", to="flax")
    assert load_flax(tmp_path / "b")["params"]["0"]["w.x"].shape == (2,)
    assert json.loads(open_checkpoint(tmp_path / "b").metadata["torchjax_bridge.paths"])


def test_metadata_of_others_goes_along_and_is_named_where_it_cannot(tmp_path: Folder) -> None:
    notes = {"licence": "MIT", "epoch": "90"}
    save_state_dict(tmp_path / "a", Mlp().state_dict(), shard_size=2048, metadata=notes)
    template = nnx.eval_shape(NnxMlp)
    done = convert(tmp_path / "a", tmp_path / "b", to="flax", template=template)
    assert done.left == ()
    for file in done.files[1:]:
        assert notes.items() <= open_checkpoint(file).metadata.items()
    convert(tmp_path / "b", tmp_path / "c.safetensors", to="torch", model=_meta_mlp())
    assert open_checkpoint(tmp_path / "c.safetensors").metadata == {"format": "pt", **notes}
    done = convert(tmp_path / "a", tmp_path / "d.msgpack", to="flax", template=template)
    assert done.left == ("licence", "epoch")


def test_a_record_of_a_tie_is_no_metadata_of_others(tmp_path: Folder) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(2)}, metadata={"tied": "v"})
    raw = (tmp_path / "a.safetensors").read_bytes().replace(b'"tied":"v"', b'"tied":"w"')
    (tmp_path / "a.safetensors").write_bytes(raw)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="torch")
    found = open_checkpoint(tmp_path / "b.safetensors")
    assert set(found.leaves) == {"w", "tied"}
    assert "tied" not in found.metadata


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def _meta_tied() -> nn.Module:
    with torch.device("meta"):
        return _Tied()


def _two_leaves() -> dict[str, object]:
    leaf = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    return {"params": {"embed": {"embedding": leaf}, "head": {"kernel": jax.ShapeDtypeStruct((4, 6), "f4")}}}


@pytest.mark.parametrize("template", ["one leaf", "two leaves"])
def test_values_that_contradict_a_tie_of_the_model_are_refused_on_the_way_to_flax(
    tmp_path: Folder, template: str
) -> None:
    state = {"embed.weight": torch.randn(6, 4), "head.weight": torch.randn(6, 4)}
    save_state_dict(tmp_path / "m.pt", state)
    target = _two_leaves()
    if template == "one leaf":
        del target["params"]["head"]  # type: ignore[attr-defined]
    match = "the same tensor as 'embed.weight' in the model, but the file holds two values @ head.weight"
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "m.pt", tmp_path / "f", to="flax", template=target, model=_meta_tied())
    # Equal values under both names, in memory of their own, are what many files hold.
    save_state_dict(tmp_path / "m.pt", {name: state["embed.weight"].clone() for name in state})
    convert(tmp_path / "m.pt", tmp_path / "f", to="flax", template=target, model=_meta_tied())


def test_values_that_contradict_a_tie_of_the_model_are_refused_on_the_way_to_torch(tmp_path: Folder) -> None:
    embed, head = torch.randn(6, 4), torch.randn(6, 4)
    kernel = jnp.asarray(head.t().numpy())
    save_flax(
        tmp_path / "f.msgpack",
        {"params": {"embed": {"embedding": jnp.asarray(embed.numpy())}, "head": {"kernel": kernel}}},
    )
    with pytest.raises(PlanError, match=r"same tensor as 'embed\.weight'.* two values @ head\.weight"):
        convert(tmp_path / "f.msgpack", tmp_path / "m.pt", to="torch", model=_meta_tied())
    assert not (tmp_path / "m.pt").exists()
    kernel = jnp.asarray(embed.t().numpy())
    save_flax(
        tmp_path / "f.msgpack",
        {"params": {"embed": {"embedding": jnp.asarray(embed.numpy())}, "head": {"kernel": kernel}}},
    )
    convert(tmp_path / "f.msgpack", tmp_path / "m.pt", to="torch", model=_meta_tied())
    back = load_state_dict(tmp_path / "m.pt")
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert torch.equal(back["head.weight"], embed)


@pytest.mark.every(2)
@pytest.mark.parametrize("prefix", ["model", "module", "_orig_mod", "student.net"])
def test_a_level_around_the_whole_file_is_looked_through_with_a_note(tmp_path: Folder, prefix: str) -> None:
    module = net()
    torch.save(
        {f"{prefix}.{key}": value for key, value in module.state_dict().items()}, tmp_path / "wrapped.pt"
    )
    done = convert(
        tmp_path / "wrapped.pt",
        tmp_path / "out",
        to="flax",
        model=_meta_net(),
        template=_nnx_net(),
        rules=HEAD,
    )
    assert f"looked through the prefix '{prefix}.' of the keys" in done.plan.notes
    back = to_state_dict(load_flax(tmp_path / "out", _nnx_net()), module, rules=HEAD)
    assert_same(back, module.state_dict())


def test_a_file_in_which_another_tensor_stands_beside_the_prefix_is_refused(tmp_path: Folder) -> None:
    state = {f"model.{key}": value for key, value in net().state_dict().items()}
    torch.save({**state, "loss.weight": torch.ones(3)}, tmp_path / "wrapped.pt")
    with pytest.raises(CheckpointError, match=r"unexpected: \(3,\) @ loss\.weight"):
        convert(
            tmp_path / "wrapped.pt",
            tmp_path / "out",
            to="flax",
            model=_meta_net(),
            template=_nnx_net(),
            rules=HEAD,
        )
