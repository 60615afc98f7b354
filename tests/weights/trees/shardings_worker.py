"""Runs in a process of its own, with four CPU devices: see test_shardings."""

import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torch import nn

from torchjax_bridge.errors import ExchangeError, PlanError, ShareError
from torchjax_bridge.weights import load_flax, save_flax, to_flax, to_optax, to_state_dict

MESH = jax.make_mesh((4,), ("x",))
AUTO = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
COLUMNS = NamedSharding(MESH, P(None, "x"))


class TorchNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(8, width)


class FlaxNet(nnx.Module):
    def __init__(self, names: Any = None, width: int = 8) -> None:
        init = nnx.initializers.lecun_normal()
        kernel_init = init if names is None else nnx.with_partitioning(init, names)
        self.fc = nnx.Linear(8, width, kernel_init=kernel_init, rngs=nnx.Rngs(0))


def check(array: jax.Array, value: torch.Tensor, sharding: Any) -> None:
    assert array.sharding == sharding, (array.sharding, sharding)
    whole = value.detach().numpy()
    for shard in array.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(whole[shard.index]).tobytes()


def structs(sharding: Any) -> Any:
    _, state = nnx.split(nnx.eval_shape(FlaxNet))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), state
    )


def structs_of_a_state_and_a_module() -> None:
    module = TorchNet()
    state = structs(lambda leaf: COLUMNS if len(leaf.shape) == 2 else NamedSharding(MESH, P("x")))
    model = nnx.merge(nnx.graphdef(nnx.eval_shape(FlaxNet)), state)
    for filled in (to_flax(module, state), to_flax(module, model)):
        layer = filled["fc"] if isinstance(filled, nnx.State) else nnx.state(filled.fc)
        check(layer["kernel"][...], module.fc.weight.T, COLUMNS)
        check(layer["bias"][...], module.fc.bias, NamedSharding(MESH, P("x")))
        back = to_state_dict(filled, module)  # gathered on the host
        assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())
        with pytest.raises(ExchangeError, match="4 devices"):
            to_state_dict(filled, module, copy=False)


def structs_of_linen_and_a_struct_that_says_nothing() -> None:
    module = TorchNet()
    variables = {
        "params": {
            "fc": {
                "kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=COLUMNS),
                "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
            }
        }
    }
    filled = to_flax(module, variables)["params"]["fc"]
    check(filled["kernel"], module.fc.weight.T, COLUMNS)
    assert filled["bias"].sharding == SingleDeviceSharding(jax.devices()[0])
    device = SingleDeviceSharding(jax.devices()[2])
    variables["params"]["fc"]["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=device)
    check(to_flax(module, variables)["params"]["fc"]["bias"], module.fc.bias, device)


def names_of_axes_in_nnx() -> None:
    module = TorchNet()
    for mesh in (MESH, AUTO):
        with jax.set_mesh(mesh):
            abstract = nnx.eval_shape(lambda: FlaxNet((None, "x")))
            concrete = FlaxNet((None, "x"))
            templates = (abstract, nnx.state(abstract), concrete, nnx.state(concrete))
            for template in templates:
                filled = to_flax(module, template)
                state = nnx.state(filled) if isinstance(filled, nnx.Module) else filled
                check(state["fc"]["kernel"][...], module.fc.weight.T, NamedSharding(mesh, P(None, "x")))
        filled = to_flax(module, concrete)  # its arrays say it outside too
        check(filled.fc.kernel[...], module.fc.weight.T, NamedSharding(mesh, P(None, "x")))
    with jax.set_mesh(MESH):
        abstract = nnx.eval_shape(lambda: FlaxNet((None, "x")))
    with pytest.raises(
        PlanError, match=r"'fc.bias' of the template is sharded over .* convert under jax.set_mesh"
    ):
        to_flax(module, abstract)


def logical_names_in_nnx_follow_the_rules() -> None:
    module = TorchNet()
    with jax.set_mesh(AUTO), nnx.logical_axis_rules([("out", "x"), ("in", None)]):
        filled = to_flax(module, nnx.eval_shape(lambda: FlaxNet(("in", "out"))))
    check(filled.fc.kernel[...], module.fc.weight.T, NamedSharding(AUTO, P(None, "x")))


def boxes_of_linen() -> None:
    module, x = TorchNet(), jnp.ones((1, 8))
    init = flax.linen.initializers.lecun_normal()

    def variables(kernel_init: Any) -> Any:
        class Net(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                return flax.linen.Dense(8, name="fc", kernel_init=kernel_init)(x)

        return jax.eval_shape(Net().init, jax.random.key(0), x)

    boxed = variables(flax.linen.with_partitioning(init, (None, "x")))
    for mesh in (MESH, AUTO):
        with jax.set_mesh(mesh):
            filled = to_flax(module, boxed)["params"]["fc"]["kernel"]
        assert filled.names == (None, "x")
        check(filled.value, module.fc.weight.T, NamedSharding(mesh, P(None, "x")))
    assert to_flax(module, boxed)["params"]["fc"]["kernel"].value.sharding == SingleDeviceSharding(
        jax.devices()[0]
    )
    named = variables(flax.linen.with_partitioning(init, (None, "x"), mesh=AUTO))
    check(
        to_flax(module, named)["params"]["fc"]["kernel"].value,
        module.fc.weight.T,
        NamedSharding(AUTO, P(None, "x")),
    )
    logical = variables(flax.linen.with_logical_partitioning(init, ("in", "out")))
    with jax.set_mesh(AUTO), flax.linen.logical_axis_rules([("in", None), ("out", "x")]):
        filled = to_flax(module, logical)["params"]["fc"]["kernel"]
    check(filled.value, module.fc.weight.T, NamedSharding(AUTO, P(None, "x")))


def arrays_of_several_devices() -> None:
    module = TorchNet()
    for sharding in (NamedSharding(MESH, P()), NamedSharding(MESH, P("x"))):
        template = jax.device_put(nnx.state(FlaxNet()), sharding)
        check(to_flax(module, template)["fc"]["kernel"][...], module.fc.weight.T, sharding)


def memory_is_as_copy_says() -> None:
    module = nn.Module()
    module.table = nn.Parameter(torch.rand(16, 16))
    pointer = module.table.data_ptr()

    def template(sharding: Any) -> Any:
        return {"params": {"table": jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=sharding)}}

    for sharding in (NamedSharding(MESH, P()), NamedSharding(MESH, P("x"))):
        with pytest.raises(
            ShareError, match=r"'params.table' under copy=False: the template has it on 4 devices"
        ):
            to_flax(module, template(sharding), copy=False)
        for copy in (True, None):
            array = to_flax(module, template(sharding), copy=copy)["params"]["table"]
            for shard in array.addressable_shards:
                assert not pointer <= shard.data.unsafe_buffer_pointer() < pointer + 1024
    home = SingleDeviceSharding(jax.devices()[0])
    for copy, same in ((True, False), (None, True), (False, True)):
        array = to_flax(module, template(home), copy=copy)["params"]["table"]
        assert (array.unsafe_buffer_pointer() == pointer) is same
        assert array.sharding == home


def half_precision_and_integers() -> None:
    module = nn.Module()
    module.wide = nn.Parameter(torch.rand(8, 8).to(torch.bfloat16))
    module.register_buffer("count", torch.arange(8))
    template = {
        "params": {"wide": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=COLUMNS)},
        "batch_stats": {"count": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=NamedSharding(MESH, P("x")))},
    }
    filled = to_flax(module, template)
    assert filled["params"]["wide"].sharding == COLUMNS
    assert (
        np.asarray(filled["params"]["wide"]).tobytes()
        == module.wide.detach().view(torch.int16).numpy().tobytes()
    )
    assert filled["batch_stats"]["count"].tolist() == list(range(8))


def a_shape_that_does_not_divide_is_named() -> None:
    struct = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=NamedSharding(MESH, P("x")))
    module = nn.Module()
    module.w = nn.Parameter(torch.rand(6))
    with pytest.raises(PlanError, match=r"'params.w' cannot be placed as the template has it"):
        to_flax(module, {"params": {"w": struct}})


def files() -> None:
    module = TorchNet()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "net.safetensors"
        save_flax(path, to_flax(module, FlaxNet()))
        with jax.set_mesh(MESH):
            filled = load_flax(path, nnx.eval_shape(lambda: FlaxNet((None, "x"))))
        check(filled.fc.kernel[...], module.fc.weight.T, COLUMNS)
        state = structs(lambda leaf: NamedSharding(MESH, P("x")))
        check(load_flax(path, state)["fc"]["bias"][...], module.fc.bias, NamedSharding(MESH, P("x")))


def moments_of_an_optimizer() -> None:
    module = TorchNet()
    optimizer = torch.optim.Adam(module.parameters())
    module.fc(torch.rand(2, 8)).sum().backward()
    optimizer.step()
    with jax.set_mesh(MESH):
        model = to_flax(module, nnx.eval_shape(lambda: FlaxNet((None, "x"))))
        tx = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        handed = to_optax(optimizer, tx, module=module, template=model)
        moment = handed.opt_state[0].mu["fc"]["kernel"]
        check(moment[...], optimizer.state[module.fc.weight]["exp_avg"].T, COLUMNS)


CASES: list[Callable[[], None]] = [
    structs_of_a_state_and_a_module,
    structs_of_linen_and_a_struct_that_says_nothing,
    names_of_axes_in_nnx,
    logical_names_in_nnx_follow_the_rules,
    boxes_of_linen,
    arrays_of_several_devices,
    memory_is_as_copy_says,
    half_precision_and_integers,
    a_shape_that_does_not_divide_is_named,
    files,
    moments_of_an_optimizer,
]

if __name__ == "__main__":
    assert len(jax.devices()) == 4
    for case in CASES:
        try:
            case()
            sys.stdout.write(f"{case.__name__}: holds\n")
        except Exception:
            traceback.print_exc()
            sys.stdout.write(f"{case.__name__}: fails\n")
