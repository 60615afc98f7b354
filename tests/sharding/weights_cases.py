"""Cases of weights in a job of several processes. Every process runs each of them, in this order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from exchange_cases import every_bit_pattern, line, raw, refused
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from torchjax_bridge import errors, jax_mesh, plan, to_flax, to_optax, to_optimizer_state, to_state_dict
from torchjax_bridge.exchange._dtypes import TORCH_TO_JAX
from torchjax_bridge.weights.sharded._moves import move
from torchjax_bridge.weights.sharded._spread import spread_of_tensor

P = PartitionSpec


class Block(nn.Module):
    """A block of a transformer, and a batch norm, whose buffers are not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.scale = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.scale(x.flatten(0, 1)).view_as(x)


class Model(nn.Module):
    """Two blocks; the 10 rows of the head do not divide by 4."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class FlaxBlock(nnx.Module):
    """Its twin."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.down = nnx.Linear(24, 16, rngs=rngs)
        self.scale = nnx.BatchNorm(16, momentum=0.9, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        x = x + self.down(jax.nn.relu(self.up(x)))
        return self.scale(x.reshape(-1, 16)).reshape(x.shape)


class FlaxModel(nnx.Module):
    """Its twin."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(12, 16, rngs=rngs)
        self.blocks = nnx.List([FlaxBlock(rngs), FlaxBlock(rngs)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    made = Model()
    made(torch.arange(24).view(2, 12) % 12)  # the batch norms have statistics
    return made.eval()


def sharded(mesh: Any) -> Model:
    made = model()
    for block in made.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def template() -> Any:
    return nnx.eval_shape(lambda: FlaxModel(nnx.Rngs(0)))


def flat(tree: Any) -> dict[str, Any]:
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return {
        ".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state) if "rngs" not in path
    }


def check_values(found: Any, wanted: Any) -> None:
    """Every shard here is its part of the whole value, bit for bit."""
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        assert array.shape == wanted[name].shape, name
        for shard in array.addressable_shards:
            part = np.asarray(wanted[name])[shard.index]
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(part).tobytes(), name


def with_shardings(spec_of: Callable[[str, tuple[int, ...]], PartitionSpec], mesh: Mesh) -> nnx.State:
    def put(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        spec = spec_of(name, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, nnx.state(template()))


def round_trip(source: Model, found: Any) -> None:
    """What comes back lies as in the module and has its bits."""
    back = to_state_dict(found, source)
    for key, value in source.state_dict().items():
        assert type(back[key]) is type(value), key
        assert (back[key].shape, back[key].dtype) == (value.shape, value.dtype), key
        if type(value) is DTensor:
            assert back[key].placements == value.placements, key
            assert raw(back[key].to_local()) == raw(value.to_local()), key
        else:
            assert torch.equal(back[key], value), key


def case_a_sharded_module_is_planned_like_a_whole_one() -> None:
    whole, parts = plan(model(), template()), plan(sharded(line()), template())
    assert parts.ok
    assert parts.moves == whole.moves
    assert parts.ties == whole.ties == ()
    assert not parts.assumed


def case_every_leaf_stays_where_it_lies_and_computes_what_torch_computes() -> None:
    mesh = line()
    source = sharded(mesh)
    twin = to_flax(source, template())
    twin.eval()
    check_values(twin, to_flax(model(), template()))
    assert twin.blocks[0].up.kernel[...].sharding.spec == P(None, "x")
    assert twin.blocks[0].scale.mean[...].sharding == NamedSharding(jax_mesh(mesh), P())
    tokens = torch.arange(24).view(2, 12) % 12
    with torch.no_grad():
        wanted = model()(tokens)
        assert torch.allclose(source(tokens), wanted, atol=1e-5)
    out = nnx.jit(lambda m, x: jax.lax.with_sharding_constraint(m(x), NamedSharding(jax_mesh(mesh), P())))
    found = out(twin, jnp.asarray(tokens.numpy()))
    assert np.allclose(found.addressable_shards[0].data, wanted, atol=1e-5)
    round_trip(source, twin)


def case_the_shardings_of_the_template_decide() -> None:
    mesh = line()
    source = sharded(mesh)
    size = mesh.size()
    over = Mesh(jax_mesh(mesh).devices.reshape(1, -1), ("a", "b"))
    turned = Mesh(jax_mesh(mesh).devices[::-1], ("x",))  # the same devices in another order

    def last(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        return P(*[None] * (len(shape) - 1), "b") if shape and shape[-1] % size == 0 else P()

    def first(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        return P("x") if shape and shape[0] % size == 0 else P()

    wanted = to_flax(model(), template())
    for spec_of, on in ((last, over), (first, turned)):
        asked = with_shardings(spec_of, on)
        found = to_flax(source, asked)
        check_values(found, wanted)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert leaf.sharding.mesh == on, path
        round_trip(source, found)


def case_moves_keep_every_bit_of_every_dtype() -> None:
    mesh = line()
    size = mesh.size()
    kinds = [[Shard(0)], [Shard(1)], [Replicate()]]
    for dtype in TORCH_TO_JAX:
        for shape in ((32 * size, 64), (2 * size + 1, 3 * size - 1), (1, 2)):
            full = every_bit_pattern(dtype, shape)
            for of in kinds:
                source = spread_of_tensor(mesh, of, shape)
                local = full[source.here]
                for to in kinds:
                    target = spread_of_tensor(mesh, to, shape)
                    assert raw(move(local, source, target)) == raw(full[target.here]), (dtype, shape, of, to)


def case_a_module_may_be_filled_again() -> None:
    mesh = line()
    source = sharded(mesh)
    back = to_state_dict(to_flax(source, template()), source)
    other = sharded(mesh)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    for assign in (False, True):
        other.load_state_dict(back, assign=assign)
        tokens = torch.arange(24).view(2, 12) % 12
        with torch.no_grad():
            assert torch.equal(other(tokens), source(tokens))


def case_a_module_without_memory_can_be_filled() -> None:
    mesh = line()
    source = sharded(mesh)
    twin = to_flax(source, template())
    with torch.device("meta"):
        empty = Model()
    for block in empty.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(empty, mesh=mesh)
    back = to_state_dict(twin, empty)
    for key, value in source.state_dict().items():
        if type(value) is DTensor:
            assert raw(back[key].to_local()) == raw(value.to_local()), key


def case_tied_weights_stay_tied() -> None:
    mesh = line()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8, bias=False)
            self.b = nn.Linear(8, 8, bias=False)
            self.c = nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

    class Twin(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.a, self.b, self.c = (nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(3))

    source = fully_shard(Tied(), mesh=mesh)
    for side in (source, source.state_dict()):
        found = to_flax(side, Twin())
        assert np.array_equal(
            found.a.kernel[...].addressable_shards[0].data, found.b.kernel[...].addressable_shards[0].data
        )
    back = to_state_dict(found, source)
    assert raw(back["a.weight"].to_local()) == raw(back["b.weight"].to_local())
    found.b.kernel[...] = found.b.kernel[...] + 1
    refused(errors.PlanError, "Flax holds two values", lambda: to_state_dict(found, source))


def case_copy_false_shares_and_refuses_what_must_move() -> None:
    mesh = line()
    source = fully_shard(nn.Linear(16, 4 * mesh.size()), mesh=mesh)
    twin = to_flax(
        source, nnx.eval_shape(lambda: nnx.Linear(16, 4 * mesh.size(), rngs=nnx.Rngs(0))), copy=False
    )
    shard = twin.kernel[...].addressable_shards[0].data
    assert shard.unsafe_buffer_pointer() == source.weight.to_local().data_ptr()
    refused(errors.ShareError, "it must move", lambda: to_flax(sharded(mesh), template(), copy=False))
    asked = {"kernel": P(None, None), "bias": P()}
    struct = nnx.state(nnx.eval_shape(lambda: nnx.Linear(16, 4 * mesh.size(), rngs=nnx.Rngs(0))))
    placed_ = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(jax_mesh(mesh), asked[path[0].key])
        ),
        struct,
    )
    refused(errors.ShareError, "it must move", lambda: to_flax(source, placed_, copy=False))


def case_processes_that_differ_are_all_told() -> None:
    mesh = line()
    rank = torch.distributed.get_rank()
    source = sharded(mesh)
    with torch.no_grad():
        source.blocks[1].scale.running_mean += rank
    refused(
        errors.PlanError,
        "'blocks.1.scale.running_mean' is not sharded, and rank 1 has other values",
        lambda: to_flax(source, template()),
    )
    replica = torch.full((8,), float(rank))
    drifted = {
        "weight": DTensor.from_local(torch.ones(8 // mesh.size(), 8), mesh, [Shard(0)], run_check=False),
        "bias": DTensor.from_local(replica, mesh, [Replicate()], run_check=False),
    }
    linear = nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    said = "'bias' is replicated, and rank 1 has other values of it than rank 0"
    refused(errors.PlanError, said, lambda: to_flax(drifted, linear))
    torch.distributed.broadcast(replica, 0)
    good = to_flax(drifted, linear)
    pieces = [jnp.full((8,), float(rank))]
    lies = good.bias[...].sharding
    good.bias.set_value(jax.make_array_from_single_device_arrays((8,), lies, pieces))
    refused(errors.PlanError, said, lambda: to_state_dict(good, drifted))
    spec = P("x") if rank else P()
    asked = with_shardings(lambda name, shape: spec if shape == (16,) else P(), jax_mesh(mesh))
    refused(errors.PlanError, "do not plan the same moves", lambda: to_flax(sharded(mesh), asked))
    small = fully_shard(nn.Linear(8, 8).to(torch.bfloat16), mesh=mesh)
    twin = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    if rank:
        local = Mesh(np.array(jax.local_devices()), ("x",))
        twin = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(local, P())),
            nnx.state(twin),
        )
        refused(errors.PlanError, "make the template over jax_mesh", lambda: to_flax(small, twin))
    else:
        refused(errors.PlanError, "refused: ", lambda: to_flax(small, nnx.state(twin)))


def case_the_state_of_the_optimizer_crosses_as_the_weights_do() -> None:
    mesh = line()
    source = sharded(mesh).train()
    tokens = torch.arange(24).view(2, 12) % 12

    def advance(module: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(tokens).square().mean().backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(source.parameters(), lr=1e-2)
    whole = model().train()
    reference = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    advance(source, optimizer)
    advance(whole, reference)
    states = []
    for module, of in ((source, optimizer), (whole, reference)):
        twin = to_flax(module, template())
        empty = nnx.Optimizer(twin, optax.adamw(1e-2), wrt=nnx.Param)
        states.append(to_optax(of, empty, module=module, template=twin))
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(state))) for state in states)
    found = {path: leaf[...] for path, leaf in ours.items() if "mu" in path or "nu" in path}
    assert any(not array.sharding.is_fully_replicated for array in found.values())
    for path, array in found.items():
        shard = array.addressable_shards[0]
        assert np.allclose(shard.data, theirs[path][...][shard.index], atol=1e-6), path
    back = to_optimizer_state(states[0], optimizer, module=source, template=twin)
    for place, entry in optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert back["state"][place][name].placements == entry[name].placements
            assert raw(back["state"][place][name].to_local()) == raw(entry[name].to_local())
    optimizer.load_state_dict(back)
    advance(source, optimizer)


def case_a_sharding_that_does_not_divide_is_refused() -> None:
    mesh = line()
    source = fully_shard(nn.Linear(4, 3), mesh=mesh)
    struct = nnx.state(nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    asked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(jax_mesh(mesh), P(*[None] * (len(leaf.shape) - 1), "x")),
        ),
        struct,
    )
    refused(errors.PlanError, "cannot lie as", lambda: to_flax(source, asked))


# --- of four processes -------------------------------------------------------------------------------


def four_tensor_parallelism_under_fsdp_crosses_and_comes_back() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    source = model()
    for block in source.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(source, mesh=mesh["dp"])
    placements = source.blocks[0].up.weight.placements
    assert isinstance(placements[0], _StridedShard)
    twin = to_flax(source, template())
    check_values(twin, to_flax(model(), template()))
    assert twin.blocks[0].up.kernel[...].sharding.spec == P(None, ("tp", "dp"))
    assert twin.embed.embedding[...].sharding == NamedSharding(jax_mesh(mesh), P("dp", None))
    round_trip(source, twin)

    def halves(name: str, shape: tuple[int, ...]) -> PartitionSpec:
        axes = ["tp", "dp"] if len(shape) > 1 else ["tp"]
        return P(*[axis if size % 2 == 0 else None for axis, size in zip(axes, shape, strict=False)])

    found = to_flax(source, with_shardings(halves, jax_mesh(mesh)))
    check_values(found, to_flax(model(), template()))
    round_trip(source, found)


def four_nested_unequal_shards_move_bit_for_bit() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    kinds = [
        [Shard(0), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [Shard(0), Shard(1)],
        [Replicate(), Shard(1)],
        [Replicate(), Replicate()],
    ]
    for shape in ((10, 7), (5, 3), (3, 2), (1, 1), (0, 4), (16, 8)):
        full = torch.arange(float(np.prod(shape))).reshape(shape)
        for of in kinds:
            source = spread_of_tensor(mesh, of, shape)
            for to in kinds:
                target = spread_of_tensor(mesh, to, shape)
                assert torch.equal(move(full[source.here], source, target), full[target.here]), (
                    shape,
                    of,
                    to,
                )


def four_hybrid_sharding_replicates_over_the_other_axis() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    source = fully_shard(model(), mesh=mesh)
    twin = to_flax(source, template())
    check_values(twin, to_flax(model(), template()))
    assert twin.blocks[0].up.kernel[...].sharding.spec == P(None, "shard")
    round_trip(source, twin)
    if torch.distributed.get_rank() == 3:
        with torch.no_grad():
            source.embed.weight.to_local().add_(1)
    said = "'embed.weight' is replicated, and rank 3 has other values of it than rank 1"
    refused(errors.PlanError, said, lambda: to_flax(source, template()))
