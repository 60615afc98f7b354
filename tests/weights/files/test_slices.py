"""A part of a leaf is read without the rest, through every layout; a template with shardings reads only parts."""

import itertools
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchjax_bridge.errors import PlanError, ShareError
from torchjax_bridge.weights import (
    Flip,
    Permute,
    Reshape,
    Split,
    Stack,
    Sum,
    load_flax,
    open_checkpoint,
    save_flax,
)
from torchjax_bridge.weights.files._boxes import Box, box_shape, pieces, whole
from torchjax_bridge.weights.files._lay_out_box import forward_box, inverse_box
from torchjax_bridge.weights.files._leaf import Leaf
from torchjax_bridge.weights.layouts import Each, Layout, Rows, then

from .bits import bits, random_bits

Folder = pathlib.Path


class Source:
    """A tensor that is read by boxes, and counts the elements that were asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read, self.wholes = tensor, 0, 0
        self.leaf = Leaf("w", ("w",), tensor.dtype, tuple(tensor.shape), self._all, read_box=self._box)

    def _all(self) -> torch.Tensor:
        self.wholes += 1
        return self.tensor

    def _box(self, box: Box) -> torch.Tensor:
        self.read += math.prod(box_shape(box))
        return self.tensor[box].clone()


def sources(*shapes: tuple[int, ...]) -> list[Source]:
    return [Source(torch.randn(shape)) for shape in shapes]


@st.composite
def boxes_of(draw: Any, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    return tuple(
        slice(start, draw(st.integers(start, size))) for start, size in zip(starts, shape, strict=True)
    )


@st.composite
def views(draw: Any) -> tuple[tuple[int, ...], Layout]:
    """A shape, and a chain of permutations and reshapes of it."""
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4)))
    now, steps = shape, []
    for kind in draw(st.lists(st.sampled_from(("permute", "split", "merge")), max_size=3)):
        axis = draw(st.integers(0, len(now) - 1))
        if kind == "permute":
            axes = tuple(draw(st.permutations(range(len(now)))))
            steps.append(Permute(axes))
            now = tuple(now[axis] for axis in axes)
            continue
        if kind == "split":
            factor = draw(st.sampled_from([f for f in range(1, now[axis] + 1) if now[axis] % f == 0]))
            new = (*now[:axis], factor, now[axis] // factor, *now[axis + 1 :])
        else:
            new = (*now[:axis], math.prod(now[axis : axis + 2]), *now[axis + 2 :])
        steps.append(Reshape(now, new))
        now = new
    return shape, then(*steps)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_box_through_permutations_and_reshapes_is_that_of_the_whole(data: Any) -> None:
    shape, layout = data.draw(views())
    source = Source(torch.arange(math.prod(shape)).view(shape))
    (there,) = layout.forward([source.tensor])
    box = data.draw(boxes_of(tuple(there.shape)))
    assert torch.equal(forward_box(layout, [source.leaf], 0, box), there[box])
    copy = Source(there.contiguous())
    box = data.draw(boxes_of(shape))
    assert torch.equal(inverse_box(layout, [copy.leaf], 0, box), source.tensor[box])


@pytest.mark.parametrize(
    ("shape", "layout", "box"),
    [
        ((4, 6), Reshape((4, 6), (24,)), (slice(3, 10),)),
        ((2, 3, 4), then(Reshape((2, 3, 4), (6, 4)), Permute((1, 0))), (slice(1, 3), slice(1, 5))),
        ((2, 2, 2, 2), Reshape((2, 2, 2, 2), (2, 8)), (slice(0, 2), slice(3, 5))),
    ],
)
def test_a_box_that_steps_over_the_end_of_an_axis_has_that_axis_whole(
    shape: tuple[int, ...], layout: Layout, box: Box
) -> None:
    (source,) = sources(shape)
    assert torch.equal(forward_box(layout, [source.leaf], 0, box), layout.forward([source.tensor])[0][box])
    assert source.wholes == 0


@pytest.mark.parametrize(
    ("shape", "layout", "box"),
    [
        ((8, 6), Permute((1, 0)), (slice(1, 3), slice(2, 6))),
        ((8, 6), then(Permute((1, 0)), Reshape((6, 8), (6, 2, 4))), (slice(0, 6), slice(1, 2), slice(0, 4))),
        ((8, 6), then(Permute((1, 0)), Reshape((6, 8), (2, 3, 8))), (slice(0, 1), slice(0, 3), slice(5, 8))),
        ((8, 6), Split(2), (slice(1, 3), slice(0, 6))),
        ((5, 4, 3, 2), Permute((2, 3, 1, 0)), (slice(0, 3), slice(0, 2), slice(0, 4), slice(2, 4))),
    ],
)
def test_only_the_elements_of_the_box_are_read(shape: tuple[int, ...], layout: Layout, box: Box) -> None:
    (source,) = sources(shape)
    index = len(layout.forward([source.tensor])) - 1
    found = forward_box(layout, [source.leaf], index, box)
    assert torch.equal(found, layout.forward([source.tensor])[index][box])
    assert (source.read, source.wholes) == (math.prod(box_shape(box)), 0)


def test_a_stack_reads_only_its_own_layers_and_a_sum_both_terms() -> None:
    layers = sources(*[(4, 6)] * 3)
    stack = Stack(3, Permute((1, 0)))
    box = (slice(1, 2), slice(0, 3), slice(0, 4))
    leaves = [source.leaf for source in layers]
    assert torch.equal(forward_box(stack, leaves, 0, box), stack.forward([s.tensor for s in layers])[0][box])
    assert [source.read for source in layers] == [0, 12, 0]
    stacked = Source(torch.randn(3, 6, 4))
    back = inverse_box(stack, [stacked.leaf], 2, (slice(0, 2), slice(0, 6)))
    assert torch.equal(back, stacked.tensor[2].t()[:2])
    assert stacked.read == 12
    terms = sources((8,), (8,))
    total = forward_box(Sum(), [source.leaf for source in terms], 0, (slice(2, 5),))
    assert torch.equal(total, (terms[0].tensor + terms[1].tensor)[2:5])
    assert [(source.read, source.wholes) for source in terms] == [(3, 0), (3, 0)]


QKV = Rows((4, 4, 6), heads=2)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 6), then(Flip((0,)), Permute((1, 0)))),
        ((4, 6), then(Permute((1, 0)), Flip((-1, 0)))),
        ((14,), QKV),
        ((14, 6), QKV),
        ((14, 6), then(QKV, Each(Permute((1, 0))))),
        ((6, 14), Rows((4, 4, 6), heads=2, columns=True)),
        ((6, 14), then(Permute((1, 0)), QKV)),
    ],
)
def test_rows_by_heads_and_flips_read_only_what_they_give(shape: tuple[int, ...], layout: Layout) -> None:
    (source,) = sources(shape)
    results = layout.forward([source.tensor])
    for index, result in enumerate(results):
        box = tuple(slice(max(size // 2 - 1, 0), size // 2 + 1) for size in result.shape)
        source.read = 0
        assert torch.equal(forward_box(layout, [source.leaf], index, box), result[box])
        assert (source.read, source.wholes) == (math.prod(box_shape(box)), 0)
    parts = [Source(result.contiguous()) for result in results]
    leaves = [part.leaf for part in parts]
    for box in itertools.product(*([slice(0, size), slice(1, size - 1)] for size in shape)):
        assert torch.equal(inverse_box(layout, leaves, 0, box), source.tensor[box])
    assert not any(part.wholes for part in parts)


class Doubled(Layout):
    def forward(self, tensors: Any) -> Any:
        return tuple(tensor * 2 for tensor in tensors)

    def inverse(self, tensors: Any, was: Any = None) -> Any:
        return tuple(tensor / 2 for tensor in tensors)


def test_a_layout_that_computes_reads_its_source_whole() -> None:
    (source,) = sources((4, 6))
    box = (slice(1, 3), slice(0, 2))
    layout = then(Doubled(), Permute((1, 0)))
    assert torch.equal(forward_box(layout, [source.leaf], 0, box), (source.tensor * 2).t()[box])
    assert source.wholes == 1


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 20))
@settings(deadline=None)
def test_pieces_are_bounded_and_follow_each_other(shape: list[int], count: int) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    found = [numbers[box].reshape(-1) for box in pieces(shape, count)]
    assert all(0 < part.size <= count for part in found)
    assert np.array_equal(np.concatenate([*found, np.empty(0, int)]), numbers.reshape(-1))


# --- templates with shardings --------------------------------------------------------------------------

SPECS = (("x", None), (None, "x"), ("x", "y"), (("x", "y"), None), (None, None))


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))


def struct(value: jax.Array, spec: tuple[Any, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        value.shape, value.dtype, sharding=NamedSharding(mesh(), PartitionSpec(*spec))
    )


@pytest.mark.parametrize("name", ["m.safetensors", "m.msgpack", "orbax"])
def test_a_template_with_shardings_is_filled_to_the_bit(tmp_path: Folder, name: str) -> None:
    raw = [random_bits(torch.int16, (8, 12), place).numpy() for place in range(len(SPECS))]
    tree = {
        "params": {
            f"{place}": {"kernel": jax.numpy.asarray(one).view("bfloat16")} for place, one in enumerate(raw)
        }
    }
    save_flax(tmp_path / name, tree, format="orbax" if name == "orbax" else None)
    template = {
        "params": {
            f"{place}": {"kernel": struct(tree["params"][f"{place}"]["kernel"], spec)}
            for place, spec in enumerate(SPECS)
        }
    }
    for copy in (None, True):
        found = load_flax(tmp_path / name, template, copy=copy)["params"]
        for place, spec in enumerate(SPECS):
            array, want = found[f"{place}"]["kernel"], tree["params"][f"{place}"]["kernel"]
            assert array.sharding == NamedSharding(mesh(), PartitionSpec(*spec))
            assert bits(array) == bits(want), spec
    with pytest.raises(ShareError, match="copy=False: the template has it on 4 devices"):
        load_flax(tmp_path / name, template, copy=False)


def test_a_sharding_that_does_not_divide_the_leaf_is_refused(tmp_path: Folder) -> None:
    save_flax(tmp_path / "m.safetensors", {"params": {"kernel": jax.numpy.ones((3, 2))}})
    struct_of_other = jax.ShapeDtypeStruct(
        (3, 2), "float32", sharding=NamedSharding(mesh(), PartitionSpec("x"))
    )
    with pytest.raises(PlanError, match=r"'params\.kernel' cannot be placed"):
        load_flax(tmp_path / "m.safetensors", {"params": {"kernel": struct_of_other}})


def test_a_replica_is_read_once(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    value = jax.numpy.arange(96.0).reshape(8, 12)
    save_flax(tmp_path / "m.safetensors", {"params": {"kernel": value}})
    asked: list[Box] = []
    slice_of = Leaf.slice
    monkeypatch.setattr(Leaf, "slice", lambda leaf, index: asked.append(index) or slice_of(leaf, index))
    load_flax(tmp_path / "m.safetensors", {"params": {"kernel": struct(value, ("x", None))}})
    assert len(asked) == 2


@pytest.mark.parametrize("layout", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_a_part_of_an_orbax_leaf_is_read_from_its_own_chunks(
    tmp_path: Folder, layout: dict[str, bool]
) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    value = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    array = jax.device_put(value, NamedSharding(mesh(), PartitionSpec("x", "y")))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, **layout)) as checkpointer:
        checkpointer.save(tmp_path / "orbax", ocp.args.PyTreeSave({"kernel": array}))
    leaf = open_checkpoint(tmp_path / "orbax").leaves["kernel"]
    leaf.slice((slice(0, 1), slice(0, 1)))  # opens the store
    before = _bytes_read()
    part = leaf.slice((slice(32, 64), slice(0, 2048)))
    assert np.array_equal(part.numpy(), value[32:, :2048])
    if before is not None:
        assert (_bytes_read() or 0) - before < 1.05 * value.nbytes / 4 + 20_000
    assert torch.equal(leaf.slice(whole(leaf.shape)), leaf.read())


def _bytes_read() -> int | None:
    try:
        text = pathlib.Path("/proc/self/io").read_text()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in text.splitlines())["rchar"])


def test_an_nnx_module_with_named_axes_is_read_in_parts(tmp_path: Folder) -> None:
    def make() -> nnx.Linear:
        init = nnx.with_partitioning(nnx.initializers.normal(), (None, "x"))
        return nnx.Linear(8, 12, kernel_init=init, rngs=nnx.Rngs(0))

    plain = nnx.Linear(8, 12, rngs=nnx.Rngs(1))
    save_flax(tmp_path / "m.safetensors", plain)
    with jax.set_mesh(mesh()):
        model = load_flax(tmp_path / "m.safetensors", nnx.eval_shape(make))
    assert model.kernel.sharding.spec == PartitionSpec(None, "x")
    assert bits(model.kernel[...]) == bits(plain.kernel[...])
