"""Arrays of an nnx module that are no variables: filled where torch has them, and else left as they are."""

from typing import Any

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
    compare_checkpoints,
    convert,
    load_flax,
    parity,
    plan,
    save_flax,
    save_state_dict,
    to_flax,
    to_optax,
    to_state_dict,
)

X = torch.randn(2, 4)


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class WithBuffer(TorchNet):
    """The same with persistent buffers, where the Flax side holds the arrays of `_hold`."""

    def __init__(self, where: str) -> None:
        super().__init__()
        holder: nn.Module = self
        if where != "attribute":
            holder = self.scales = nn.Module()
        for name in {"attribute": ["scale"], "list": ["0", "1"]}.get(where, ["a"]):
            holder.register_buffer(name, torch.rand(2))


ARRAYS = {"jax": lambda: jnp.array([5.0, 6.0]), "numpy": lambda: np.array([5.0, 6.0], np.float32)}
PLACES = ["attribute", "list", "dict", "nnx dict"]


def _hold(where: str, make: Any) -> Any:
    return {
        "attribute": lambda: nnx.data(make()),
        "list": lambda: nnx.List([nnx.data(make()), nnx.data(make())]),
        "dict": lambda: nnx.data({"a": make()}),
        "nnx dict": lambda: nnx.Dict(a=nnx.data(make())),
    }[where]()


class FlaxNet(nnx.Module):
    def __init__(self, where: str, make: Any) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        setattr(self, "scale" if where == "attribute" else "scales", _hold(where, make))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x)


def _plain(model: Any) -> list[Any]:
    variables = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Variable))}
    return [leaf for leaf in jax.tree.leaves(model) if id(leaf) not in variables]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ARRAYS)
def test_what_torch_has_not_stays_the_templates_own_array(where: str, kind: str) -> None:
    module, template = TorchNet(), FlaxNet(where, ARRAYS[kind])
    held = _plain(template)
    assert plan(module, template).ok
    assert plan(module, template).flax_only
    for filled in (
        to_flax(module, template),
        nnx.merge(nnx.graphdef(template), to_flax(module, nnx.state(template))),
    ):
        assert all(one is other for one, other in zip(_plain(filled), held, strict=True))
        assert np.array_equal(filled.fc.kernel[...], module.fc.weight.detach().numpy().T)
        back = to_state_dict(filled, module)
        assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    assert parity(module, to_flax(module, template), X).ok


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("form", ["concrete", "abstract", "state"])
def test_a_buffer_of_its_name_fills_it_and_goes_back(where: str, kind: str, form: str) -> None:
    module, template = WithBuffer(where), FlaxNet(where, ARRAYS[kind])
    given: Any = template
    if form == "abstract":
        given = nnx.eval_shape(lambda: FlaxNet(where, ARRAYS[kind]))
    elif form == "state":
        given = nnx.state(template)
    filled = to_flax(module, given)
    model = nnx.merge(nnx.graphdef(template), filled) if form == "state" else filled
    wanted = [value.numpy() for name, value in module.named_buffers()]
    assert all(np.array_equal(one, other) for one, other in zip(_plain(model), wanted, strict=True))
    assert [np.asarray(leaf).tolist() for leaf in _plain(template)] == [[5.0, 6.0]] * len(wanted)
    back = to_state_dict(filled, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_a_numpy_scalar_that_is_data_is_kept_and_one_that_is_a_setting_is_none() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.scale = nnx.data(np.float32(5.0))
            self.count = nnx.data(7)
            self.setting = np.float32(2.0)

    template = Net(nnx.Rngs(0))
    filled = to_flax(TorchNet(), template)
    assert (filled.scale, filled.count, filled.setting) == (5.0, 7, 2.0)
    assert plan(TorchNet(), template).flax_only == (("scale",),)


def test_a_plain_array_of_a_shared_module_is_one_leaf() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.one = FlaxNet("attribute", ARRAYS["jax"])
            self.other = self.one

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = WithBuffer("attribute")
            self.other = self.one

    module = Twin()
    filled = to_flax(module, Net(nnx.Rngs(0)))
    assert filled.one is filled.other
    assert np.array_equal(filled.one.scale, module.one.scale.numpy())


def test_a_plain_array_without_value_is_named_before_anything_is_filled() -> None:
    class Bare(nnx.Module):  # nnx.eval_shape leaves a tracer where an array is assigned without nnx.data
        def __init__(self) -> None:
            self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.scale = jnp.array(5.0)

    for make in (Bare, lambda: FlaxNet("attribute", ARRAYS["jax"]), lambda: FlaxNet("dict", ARRAYS["numpy"])):
        template = nnx.eval_shape(make)
        found = plan(TorchNet(), template)
        assert found.ok
        assert "has no value for it" in str(found)
        with pytest.raises(PlanError, match="no value to keep; pass a concrete template") as raised:
            to_flax(TorchNet(), template)
        assert "scale" in str(raised.value)
    module = TorchNet()
    module.register_buffer("scale", torch.tensor(7.0))
    filled = to_flax(module, nnx.eval_shape(Bare))
    assert np.array_equal(filled.scale, module.scale.numpy())
    assert len(jax.tree.leaves(filled)) == 3


def test_files_hold_plain_arrays_and_need_not(tmp_path: Any) -> None:
    module, buffered = TorchNet(), WithBuffer("attribute")
    template = FlaxNet("attribute", ARRAYS["numpy"])
    save_state_dict(tmp_path / "net.safetensors", module)
    convert(tmp_path / "net.safetensors", tmp_path / "flax.safetensors", to="flax", template=template)
    filled = load_flax(tmp_path / "flax.safetensors", template)
    assert filled.scale is template.scale
    assert np.array_equal(filled.fc.kernel[...], module.fc.weight.detach().numpy().T)
    with pytest.raises(CheckpointError, match="has no 'scale'"):
        load_flax(tmp_path / "flax.safetensors", nnx.eval_shape(lambda: FlaxNet("attribute", ARRAYS["jax"])))
    save_flax(tmp_path / "whole.safetensors", to_flax(module, template))
    assert np.array_equal(load_flax(tmp_path / "whole.safetensors")["scale"], template.scale)
    assert compare_checkpoints(
        tmp_path / "net.safetensors", tmp_path / "whole.safetensors", template=template
    ).ok
    with pytest.raises(PlanError, match="'scale'"):  # the file that is to fill the buffer lacks it
        convert(
            tmp_path / "flax.safetensors", tmp_path / "x.pt", to="torch", model=buffered, template=template
        )
    convert(tmp_path / "whole.safetensors", tmp_path / "y.pt", to="torch", model=buffered, template=template)
    assert torch.equal(torch.load(tmp_path / "y.pt")["scale"], torch.tensor([5.0, 6.0]))


def test_optimizer_state_crosses_beside_plain_arrays() -> None:
    module, template = TorchNet(), FlaxNet("attribute", ARRAYS["jax"])
    optimizer = torch.optim.Adam(module.parameters())
    module(X).sum().backward()
    optimizer.step()
    model = to_flax(module, template)
    tx = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    handed = to_optax(optimizer, tx, module=module, template=model)
    (moment,) = [leaf for leaf in jax.tree.leaves(handed.opt_state) if leaf.shape == (4, 4)][:1]
    assert np.array_equal(moment, optimizer.state[module.fc.weight]["exp_avg"].numpy().T)


def test_a_plain_array_in_scanned_layers_is_kept() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.scale = nnx.data(jnp.ones(2))

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs: nnx.Rngs) -> Block:
                return Block(rngs)

            self.layers = make(rngs)

    class Row(nn.Module):
        def __init__(self, kind: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList([kind() for _ in range(3)])

    template = Net(nnx.Rngs(0))
    assert to_flax(Row(TorchNet), template).layers.scale is template.layers.scale
    module = Row(lambda: WithBuffer("attribute"))
    stacked = torch.stack([layer.scale for layer in module.layers])
    assert np.array_equal(to_flax(module, template).layers.scale, stacked.numpy())
