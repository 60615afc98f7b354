"""What a plan says that is no fault: levels that were looked through, dtypes that differ."""

import pathlib

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.weights import Plan, convert, plan, save_flax, save_state_dict, to_flax


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5)


class FlaxNet(nnx.Module):
    def __init__(self, dtype: object = jnp.float32) -> None:
        rngs = nnx.Rngs(0)
        self.one = nnx.Linear(3, 4, param_dtype=dtype, rngs=rngs)
        self.two = nnx.Linear(4, 5, param_dtype=dtype, rngs=rngs)


class Holds(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, TorchNet())


class HoldsToo(nnx.Module):
    def __init__(self, name: str) -> None:
        setattr(self, name, FlaxNet())


@pytest.mark.parametrize("name", ["net", "model", "backbone"])
def test_a_level_of_one_side_alone_is_noted(name: str) -> None:
    module = Holds(name)
    for source in (module, module.state_dict()):
        found = plan(source, FlaxNet())
        assert found.ok
        assert found.notes == (f"looked through '{name}.', a level that the torch side alone has",)
    found = plan(TorchNet(), HoldsToo(name))
    assert found.notes == (f"looked through '{name}.', a level that the Flax side alone has",)
    assert not plan(module, HoldsToo(name)).notes


def test_dtypes_that_differ_are_one_note_however_many_tensors(tmp_path: pathlib.Path) -> None:
    half = TorchNet().to(torch.bfloat16)
    names = "one.weight, one.bias, two.weight, two.bias"
    differ = f"{names}: torch.bfloat16 in torch, float32 in Flax; values"
    assert plan(half, FlaxNet()).notes == (f"{differ} cross with the dtype they have",)
    save_state_dict(tmp_path / "half.safetensors", half)

    def converted(dtype: torch.dtype | None) -> Plan:
        source, target = tmp_path / "half.safetensors", tmp_path / "flax.safetensors"
        done = convert(source, target, to="flax", model=half, template=FlaxNet(), dtype=dtype, overwrite=True)
        assert done.plan is not None
        return done.plan

    assert converted(None).notes == (f"{differ} cross with the dtype they have",)
    assert converted(torch.float32).notes == (f"{differ} are cast to torch.float32",)
    save_flax(tmp_path / "back.safetensors", to_flax(half, FlaxNet()))
    done = convert(
        tmp_path / "back.safetensors", tmp_path / "x.pt", to="torch", model=TorchNet(), dtype=torch.float32
    )
    assert done.plan is not None
    assert done.plan.notes == (
        f"{names}: torch.float32 in torch, bfloat16 in Flax; values are cast to torch.float32",
    )
