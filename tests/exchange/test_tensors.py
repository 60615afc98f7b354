"""The contract of one tensor, by example; test_properties.py holds it for generated cases."""

import copy as copying
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from torchjax_bridge.errors import (
    BridgeError,
    DeviceError,
    DtypeError,
    ExchangeError,
    NarrowingError,
    ShareError,
    UnsupportedLeafError,
)
from torchjax_bridge.exchange import _dlpack, array_to_torch, tensor_to_jax, to_jax, to_torch
from torchjax_bridge.exchange._dtypes import NEEDS_X64, TORCH_TO_JAX


def aligned(*shape, dtype=torch.float32, offset=0):
    """A tensor of distinct bytes whose address is `offset` bytes past a multiple of 64."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.zeros(size + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    block = raw[start : start + size]
    if dtype is torch.bool:
        block.copy_(torch.arange(size) % 2)
    else:
        block.copy_((torch.arange(size) * 37 + 11) % 251)
    return block.view(dtype).view(shape)


def bits(tensor):
    """The values' bytes in row-major order."""
    flat = tensor.resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format)
    return torch.as_strided(flat, flat.shape, (1,)).view(torch.uint8).tolist()


def array_bits(array):
    return np.frombuffer(np.asarray(array).tobytes(), np.uint8).tolist()


def shares(tensor, array):
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


# --- values and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH_TO_JAX, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 1, 3)], ids=str)
def test_every_dtype_is_shared_bit_for_bit_both_ways(x64_on, dtype, shape):
    tensor = aligned(*shape, dtype=dtype)
    array = to_jax(tensor)
    assert array.shape == shape
    assert array.dtype == TORCH_TO_JAX[dtype]
    assert array_bits(array) == bits(tensor)
    assert shares(tensor, array)
    back = to_torch(array)
    assert back.dtype is dtype
    assert back.shape == tensor.shape
    assert bits(back) == bits(tensor)
    assert back.data_ptr() == tensor.data_ptr()


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", TORCH_TO_JAX, ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("copy", [None, False, True])
def test_an_empty_tensor_keeps_its_shape_and_dtype(x64_on, dtype, shape, copy):
    tensor = torch.empty(shape, dtype=dtype)
    array = to_jax(tensor, copy=copy)
    assert (array.shape, array.dtype) == (shape, TORCH_TO_JAX[dtype])
    back = to_torch(array, copy=copy)
    assert (back.shape, back.dtype) == (tensor.shape, dtype)


def test_nan_payloads_signed_zeros_and_subnormals_survive():
    words = torch.tensor(
        [0x7FC00001, -0x400000 + 5, 0x7F800001, -(2**31), 1, -(2**31) + 1], dtype=torch.int32
    )
    tensor = words.view(torch.float32)
    for copy in (None, True):
        assert array_bits(to_jax(tensor, copy=copy)) == bits(tensor)
        assert bits(to_torch(to_jax(tensor), copy=copy)) == bits(tensor)


def test_a_shared_array_sees_what_torch_writes():
    tensor = aligned(64)
    array = to_jax(tensor)
    tensor.fill_(7)
    assert array.tolist() == [7.0] * 64


def test_a_shared_tensor_is_the_memory_of_the_array():
    array = jnp.arange(64.0)
    tensor = to_torch(array)
    assert shares(tensor, array)
    tensor.fill_(7)
    assert np.asarray(array).tolist() == [7.0] * 64


@pytest.mark.parametrize("offset", [0, 4, 8, 16, 32])
def test_copy_true_is_fresh_memory_in_both_directions(offset):
    tensor = aligned(64, offset=offset)
    before = bits(tensor)
    array = to_jax(tensor, copy=True)
    assert not shares(tensor, array)
    tensor.zero_()
    assert array_bits(array) == before
    exported = to_torch(array, copy=True)
    assert not shares(exported, array)
    exported.zero_()
    assert array_bits(array) == before


@pytest.mark.parametrize("offset", [4, 8, 16, 32])
def test_unaligned_memory_is_copied_or_refused_with_the_offset(offset):
    tensor = aligned(64, offset=offset)
    before = bits(tensor)
    array = to_jax(tensor)
    tensor.zero_()
    assert array_bits(array) == before
    with pytest.raises(
        ShareError, match=rf"this leaf.*copy=False.*{offset} bytes past a multiple of 64.*copy=None"
    ):
        to_jax(tensor, copy=False)


LAYOUTS = {
    "transposed": lambda: aligned(6, 10).t(),
    "permuted": lambda: aligned(4, 3, 2, 5).permute(2, 3, 1, 0),
    "channels_last": lambda: aligned(2, 5, 4, 3).permute(0, 3, 1, 2),
    "one channel, channels_last": lambda: aligned(2, 1, 4, 3).to(memory_format=torch.channels_last),
    "size-1 axis with an odd stride": lambda: torch.as_strided(aligned(64), (4, 1, 4), (4, 99, 1)),
    "size-1 axis in front": lambda: torch.as_strided(aligned(64), (1, 16), (1, 1)),
    "all axes of size 1": lambda: torch.as_strided(aligned(64), (1, 1, 1), (5, 0, 3)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("copy", [None, False])
def test_a_gap_free_layout_is_shared_as_it_lies(make, copy):
    tensor = make()
    array = to_jax(tensor, copy=copy)
    assert array.shape == tensor.shape
    assert array_bits(array) == bits(tensor)
    assert array_bits(jnp.flip(array)) == bits(tensor.flip(tuple(range(tensor.ndim))))
    back = to_torch(array, copy=copy)
    assert bits(back) == bits(tensor)
    assert back.data_ptr() == tensor.data_ptr()
    tensor.fill_(1)
    assert jnp.flip(array).tolist() == tensor.tolist()  # not np.asarray, which JAX keeps from before


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_the_copy_of_a_permuted_layout_is_row_major(make):
    tensor = make()
    array = to_jax(tensor, copy=True)
    assert array_bits(array) == bits(tensor)
    assert array.format.layout.major_to_minor == tuple(range(tensor.ndim))
    assert to_torch(array).stride() == torch.empty(tensor.shape).stride()
    exported = to_torch(to_jax(tensor), copy=True)
    assert exported.stride() == torch.empty(tensor.shape).stride()
    assert bits(exported) == bits(tensor)
    again = to_jax(to_jax(tensor), copy=True)
    assert again.format.layout.major_to_minor == tuple(range(tensor.ndim))


def test_a_contiguous_tensor_with_odd_size_1_strides_imports_row_major():
    # Else each such tensor would be a layout of its own, and every new layout costs a compilation.
    for name in ("size-1 axis with an odd stride", "size-1 axis in front", "all axes of size 1"):
        array = to_jax(LAYOUTS[name]())
        assert array.format.layout.major_to_minor == tuple(range(array.ndim))


VIEWS_WITH_GAPS = {
    "step slice": lambda: aligned(128)[::2],
    "expanded scalar": lambda: aligned(1).expand(8),
    "expanded row": lambda: aligned(4).expand(3, 4),
    "expanded, then permuted": lambda: aligned(4, 1).expand(4, 3).t(),
    "expanded, with axes of size 1": lambda: aligned(1, 4, 1).expand(1, 4, 3),
    "inner columns": lambda: aligned(8, 16)[:, :8],
    "diagonal": lambda: aligned(8, 8).diagonal(),
    "overlapping": lambda: torch.as_strided(aligned(64), (4, 4), (1, 1)),
    "overlapping windows": lambda: aligned(64).unfold(0, 4, 2),
    "gap between two axes": lambda: torch.as_strided(aligned(64), (2, 3), (16, 1)),
}


@pytest.mark.parametrize("make", VIEWS_WITH_GAPS.values(), ids=VIEWS_WITH_GAPS)
def test_a_view_with_gaps_is_copied_or_refused_with_its_strides(make):
    tensor = make()
    for copy in (None, True):
        array = to_jax(tensor, copy=copy)
        assert array_bits(array) == bits(tensor)
        assert array.format.layout.major_to_minor == tuple(range(tensor.ndim))
        assert not shares(tensor, array)
    with pytest.raises(ShareError, match=r"strides .* leave gaps or overlap"):
        to_jax(tensor, copy=False)


def test_axes_of_size_1_with_a_stride_of_0_are_no_gap():
    tensor = torch.as_strided(aligned(12), (3, 1, 4), (1, 0, 3))
    assert shares(tensor, to_jax(tensor, copy=False))


def test_the_cotangent_that_sum_backward_sends_crosses():
    x = torch.ones(5, requires_grad=True)
    seen = []
    y = x * 2
    y.register_hook(lambda grad: seen.append((grad.stride(), to_jax(grad).tolist())))
    y.sum().backward()
    assert seen == [((0,), [1.0] * 5)]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("copy", [None, True])
def test_conjugate_and_negative_views_are_resolved(x64_on, dtype, copy):
    z = torch.randn(16, dtype=dtype)
    for view in (
        z.conj(),
        z.conj().imag,
        torch._neg_view(z),
        torch._neg_view(z.conj()),
        z.mH if z.ndim > 1 else z,
    ):
        array = to_jax(view, copy=copy)
        assert array.tolist() == view.tolist()
    assert to_jax(torch._neg_view(torch.ones(16)), copy=copy).tolist() == [-1.0] * 16


def test_conjugate_and_negative_views_are_not_shared():
    z = torch.ones(16, dtype=torch.complex64)
    with pytest.raises(ShareError, match="conjugate bit is set"):
        to_jax(z.conj(), copy=False)
    with pytest.raises(ShareError, match="negative bit is set"):
        to_jax(torch._neg_view(torch.ones(16)), copy=False)


def test_empty_conjugate_views_cross():
    assert to_jax(torch.ones(0, dtype=torch.complex64).conj()).shape == (0,)
    assert to_jax(torch._neg_view(torch.ones(3, 0))).shape == (3, 0)


def test_inputs_are_never_written_to_nor_changed():
    tensor = aligned(6, 10).t()
    before, version, stride = bits(tensor), tensor._version, tensor.stride()
    for copy in (None, True):
        to_jax(tensor, copy=copy)
        to_torch(to_jax(tensor), copy=copy)
    assert (bits(tensor), tensor._version, tensor.stride()) == (before, version, stride)
    assert not tensor.requires_grad


@pytest.mark.parametrize("copy", ["no", 0, 1, np.False_, "False"])
def test_a_copy_that_is_neither_none_nor_a_bool_raises(copy):
    for cross, value in ((to_jax, torch.ones(3)), (to_torch, jnp.ones(3)), (to_jax, [torch.ones(3)])):
        with pytest.raises(TypeError, match=r"copy must be None, True or False"):
            cross(value, copy=copy)


# --- 64-bit policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("shape", [(), (1,), (1000,)], ids=str)
def test_int64_that_fits_becomes_int32_with_x64_off(x64_off, value, shape):
    array = to_jax(torch.full(shape, value))
    assert array.dtype == jnp.int32
    assert np.asarray(array).reshape(-1).tolist() == [value] * max(1, *shape, 1)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40 + 5, 2**63 - 1, -(2**63)])
def test_int64_that_does_not_fit_raises_with_the_value(x64_off, value):
    for tensor in (torch.tensor(value), torch.tensor([0, value, 1])):
        for copy in (None, True):
            with pytest.raises(NarrowingError, match=rf"cannot hold {value}\. Set jax_enable_x64"):
                to_jax(tensor, copy=copy)
    assert issubclass(NarrowingError, OverflowError)


def test_one_value_out_of_range_among_many_raises(x64_off):
    tensor = torch.zeros(100_000, dtype=torch.int64)
    tensor[77_777] = 2**31
    with pytest.raises(NarrowingError):
        to_jax(tensor)


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_uint64_that_fits_becomes_uint32_with_x64_off(x64_off, value):
    for shape in ((), (5,)):
        tensor = torch.tensor(np.full(shape, value, np.uint64))
        array = to_jax(tensor)
        assert array.dtype == jnp.uint32
        assert set(np.asarray(array).reshape(-1).tolist()) == {value}


@pytest.mark.parametrize("value", [2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_uint64_that_does_not_fit_raises_with_the_value(x64_off, value):
    for values in ([value], [0, value, 3]):
        with pytest.raises(NarrowingError, match=rf"cannot hold {value}\."):
            to_jax(torch.tensor(np.array(values, np.uint64)))


def test_narrowed_integers_cannot_be_shared(x64_off):
    for dtype in (torch.int64, torch.uint64):
        with pytest.raises(ShareError, match="needs x64, which is off"):
            to_jax(torch.zeros(8, dtype=dtype), copy=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("shape", [(), (0,), (8,)], ids=str)
def test_wide_floats_raise_with_x64_off_and_say_both_ways_out(x64_off, dtype, copy, shape):
    with pytest.raises(
        DtypeError, match=r"needs x64, which is off\. Cast it to torch\.\w+ first, or .*jax_enable_x64"
    ):
        to_jax(torch.zeros(shape, dtype=dtype), copy=copy)


@pytest.mark.parametrize("dtype", NEEDS_X64, ids=str)
def test_64_bit_dtypes_cross_as_they_are_with_x64_on(x64_on, dtype):
    tensor = aligned(8, dtype=dtype)
    array = to_jax(tensor)
    assert array.dtype == TORCH_TO_JAX[dtype]
    assert array_bits(array) == bits(tensor)
    assert shares(tensor, array)


@pytest.mark.parametrize("copy", [None, True])
def test_x64_arrays_go_to_torch_whole_with_x64_off(copy):
    with jax.enable_x64(True):
        wide = jnp.asarray([2**40 + 5, -1])
        floats = jnp.asarray([0.1, 1e300])
    with jax.enable_x64(False):
        assert to_torch(wide, copy=copy).tolist() == [2**40 + 5, -1]
        assert to_torch(floats, copy=copy).tolist() == [0.1, 1e300]


@pytest.mark.parametrize("copy", [None, True])
def test_an_x64_array_passes_through_whole_with_x64_off(copy):
    with jax.enable_x64(True):
        wide = jnp.asarray([2**40 + 5, -1])
    with jax.enable_x64(False):
        through = to_jax(wide, copy=copy)
        assert through.dtype == np.int64
        assert np.asarray(through).tolist() == [2**40 + 5, -1]
        moved = to_jax(wide, copy=copy, device=jax.devices("cpu")[1])
        assert moved.dtype == np.int64
        assert np.asarray(moved).tolist() == [2**40 + 5, -1]


def test_the_policy_follows_the_context_of_the_thread():
    tensor = torch.tensor([2**40])
    with jax.enable_x64(True):
        assert to_jax(tensor).dtype == jnp.int64
    with jax.enable_x64(False), pytest.raises(NarrowingError):
        to_jax(tensor)


# --- what cannot cross -------------------------------------------------------------------------------


# torch's own forward mode loads scripts in a way that it calls deprecated.
FORWARD_AD = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class Subclass(torch.Tensor):
    pass


class Dispatching(torch.Tensor):
    """A wrapper without memory of its own, as DTensor and the quantized types of torchao are."""

    @staticmethod
    def __new__(cls, inner):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = [a.inner if isinstance(a, cls) else a for a in args]
        return func(*args, **(kwargs or {}))


def _freed():
    tensor = torch.ones(16)
    tensor.untyped_storage().resize_(0)
    return tensor


def _fake():
    with FakeTensorMode():
        return torch.ones(3)


def _graph():
    return torch.ones(3, requires_grad=True) * 2


NOT_FOR_JAX = {
    "parameter": (lambda: torch.nn.Parameter(torch.ones(3)), "requires grad", r"\.detach\(\)"),
    "requires_grad leaf": (lambda: torch.ones(3, requires_grad=True), "requires grad", r"\.detach\(\)"),
    "result with a grad_fn": (_graph, "requires grad", r"\.detach\(\)"),
    "sparse coo": (lambda: torch.eye(3).to_sparse(), "sparse", r"\.to_dense\(\)"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse", r"\.to_dense\(\)"),
    "sparse csc": (lambda: torch.eye(3).to_sparse_csc(), "sparse", r"\.to_dense\(\)"),
    "sparse bsr": (lambda: torch.eye(4).to_sparse_bsr((2, 2)), "sparse", r"\.to_dense\(\)"),
    "mkldnn": (lambda: torch.ones(3, 3).to_mkldnn(), "mkldnn", r"\.to_dense\(\)"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "quantized",
        r"\.dequantize\(\)",
    ),
    "quantized per channel": (
        lambda: torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8),
        "quantized",
        r"\.int_repr\(\)",
    ),
    "meta": (lambda: torch.ones(3, device="meta"), "meta tensor", "Pass a real tensor"),
    "fake": (_fake, "FakeTensor", "Pass a real tensor"),
    "nested, strided": (
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
        "nested tensor",
        "to_padded_tensor",
    ),
    "nested, jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
        "NestedTensor",
        "to_padded_tensor",
    ),
    "subclass": (lambda: torch.ones(3).as_subclass(Subclass), "Subclass", r"as_subclass\(torch\.Tensor\)"),
    "dispatching subclass": (lambda: Dispatching(torch.ones(3)), "Dispatching", "plain tensor"),
    "freed storage": (_freed, "without memory", "storage"),
    "lazy parameter": (lambda: torch.nn.LazyLinear(3).weight, "UninitializedParameter", "example input"),
    "uint4": (lambda: torch.empty(3, dtype=torch.uint4), "torch.uint4", r"torch\.(u)?int8"),
    "int4": (lambda: torch.empty(3, dtype=torch.int4), "torch.int4", r"torch\.(u)?int8"),
    "float4": (lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2), "float4_e2m1fn_x2", r"torch\.uint8"),
    "complex32": (lambda: torch.ones(3, dtype=torch.complex32), "complex32", r"torch\.complex64"),
    "module": (lambda: torch.nn.Linear(2, 2), "Linear", r"state_dict\(\)"),
    "object": (object, "an? object", "Every leaf must be"),
    "function": (lambda: len, "builtin_function", "Every leaf must be"),
    "storage": (lambda: torch.ones(3).untyped_storage(), "UntypedStorage", "Every leaf must be"),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that quantization, csr and nested tensors are old or new
@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize(("make", "kind", "fix"), NOT_FOR_JAX.values(), ids=NOT_FOR_JAX)
def test_what_jax_cannot_hold_raises_and_names_leaf_kind_and_fix(make, kind, fix, copy):
    thing = make()
    with pytest.raises((UnsupportedLeafError, DtypeError), match=rf"'net\.0\.w' with JAX.*{kind}.*{fix}"):
        tensor_to_jax(thing, copy=copy, path=("net", 0, "w"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize(("make", "kind", "fix"), NOT_FOR_JAX.values(), ids=NOT_FOR_JAX)
def test_what_jax_cannot_hold_raises_in_a_tree_and_alone(make, kind, fix, copy):
    thing = make()
    with pytest.raises(BridgeError, match=rf"this leaf|{kind}"):
        to_jax(thing, copy=copy)
    with pytest.raises(BridgeError, match=rf"'net\.0\.w'.*{kind}.*{fix}"):
        to_jax({"net": [{"w": thing}], "fine": torch.ones(2)}, copy=copy)


@FORWARD_AD
@pytest.mark.parametrize("copy", [None, True, False])
def test_a_tensor_inside_a_torch_func_transform_raises(copy):
    cross = lambda x: (to_jax(x, copy=copy), x.sum())[1]  # noqa: E731
    with pytest.raises(UnsupportedLeafError, match="as_torch_function"):
        torch.func.vmap(cross)(torch.ones(3, 3))
    with pytest.raises(UnsupportedLeafError, match="as_torch_function"):
        torch.func.grad(cross)(torch.ones(3))
    with pytest.raises(UnsupportedLeafError, match="as_torch_function"):
        torch.func.jvp(cross, (torch.ones(3),), (torch.ones(3),))
    with pytest.raises(UnsupportedLeafError, match="as_torch_function"):
        torch.func.functionalize(cross)(torch.ones(3))
    # and torch's transform state is sound afterwards
    assert torch.func.grad(lambda x: (x * x).sum())(torch.ones(3)).tolist() == [2.0] * 3


@FORWARD_AD
def test_a_tensor_with_a_forward_mode_tangent_raises():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(16), torch.ones(16))
        with pytest.raises(UnsupportedLeafError, match=r"tangent.*as_torch_function"):
            to_jax(dual)


@pytest.mark.parametrize("copy", [None, True, False])
def test_a_real_tensor_under_fake_mode_crosses_or_raises_a_clear_error(copy):
    tensor, unaligned = aligned(16), aligned(16, offset=4)
    values, messages = [], []
    with FakeTensorMode():
        for each in (tensor, unaligned):
            try:
                values.append(to_jax(each, copy=copy))
            except ExchangeError as err:
                messages.append(str(err))
    assert all(array.tolist() == tensor.tolist() for array in values)
    assert len(messages) == {None: 1, True: 2, False: 1}[copy]
    assert all("fake" in message.lower() or "bytes past" in message for message in messages)


class TestWithoutGradTheSameTensorCrosses:
    def test_detached(self):
        parameter = torch.nn.Parameter(torch.ones(16))
        assert shares(parameter, to_jax(parameter.detach()))

    def test_a_frozen_parameter(self):
        parameter = torch.nn.Parameter(torch.ones(16), requires_grad=False)
        assert shares(parameter, to_jax(parameter))

    def test_a_buffer(self):
        buffer = torch.nn.Buffer(torch.ones(16))
        assert shares(buffer, to_jax(buffer))

    def test_a_result_computed_under_no_grad(self):
        with torch.no_grad():
            result = torch.nn.Parameter(torch.ones(16)) * 2
        assert to_jax(result).tolist() == [2.0] * 16

    def test_a_leaf_that_requires_grad_raises_under_no_grad_too(self):
        with torch.no_grad(), pytest.raises(UnsupportedLeafError, match="requires grad"):
            to_jax(torch.nn.Parameter(torch.ones(16)))

    def test_an_inference_tensor(self):
        with torch.inference_mode():
            tensor = torch.ones(16)
            assert to_jax(tensor).tolist() == [1.0] * 16
        for copy in (None, True, False):
            assert to_jax(tensor, copy=copy).tolist() == [1.0] * 16
        assert to_jax(aligned(16)[::2]).shape == (8,)

    def test_under_inference_mode_every_copy_works(self):
        with torch.inference_mode():
            for copy in (None, True, False):
                assert to_torch(to_jax(torch.ones(4, 4).t(), copy=copy), copy=copy).shape == (4, 4)


def _deleted():
    array = jnp.arange(3) + 1
    array.delete()
    return array


def _donated():
    array = jnp.arange(64.0) + 1
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    return array


def _sharded(spec=("x",)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    return jax.device_put(
        jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )


NOT_FOR_TORCH = {
    "deleted": (_deleted, "deleted array", "donat"),
    "donated": (_donated, "deleted array", "donat"),
    "sharded": (_sharded, "4 devices", r"device_put\(.*addressable_data"),
    "replicated": (lambda: _sharded(()), "4 devices", r"device_put\(.*addressable_data"),
    "prng key": (lambda: jax.random.key(0), "PRNG key", r"jax\.random\.key_data"),
    "prng keys": (lambda: jax.random.split(jax.random.key(0), 3), "PRNG key", r"jax\.random\.key_data"),
    "int4": (lambda: jnp.ones(3, jnp.int4), "int4", r"jnp\.int8"),
    "uint4": (lambda: jnp.ones(3, jnp.uint4), "uint4", r"jnp\.int8"),
    "int2": (lambda: jnp.ones(3, jnp.int2), "int2", r"jnp\.int8"),
    "float4": (lambda: jnp.ones(3, jnp.float4_e2m1fn), "float4_e2m1fn", r"jnp\.float"),
    "float8_e3m4": (lambda: jnp.ones(3, jnp.float8_e3m4), "float8_e3m4", r"jnp\.float"),
    "float8_e4m3": (lambda: jnp.ones(3, jnp.float8_e4m3), "float8_e4m3", r"jnp\.float"),
    "float8_e4m3b11fnuz": (lambda: jnp.ones(3, jnp.float8_e4m3b11fnuz), "b11fnuz", r"jnp\.float"),
    "shape only": (lambda: jax.ShapeDtypeStruct((3,), jnp.float32), "ShapeDtypeStruct", "Every leaf must be"),
    "float0": (lambda: np.zeros(3, jax.dtypes.float0), "numpy.ndarray", "integer input"),
    "object": (object, "an? object", "Every leaf must be"),
    "function": (lambda: len, "builtin_function", "Every leaf must be"),
}


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize(("make", "kind", "fix"), NOT_FOR_TORCH.values(), ids=NOT_FOR_TORCH)
def test_what_torch_cannot_hold_raises_and_names_leaf_kind_and_fix(make, kind, fix, copy):
    thing = make()
    match = rf"(?s)'net\.0\.w' with torch.*{kind}.*{fix}"
    with pytest.raises((UnsupportedLeafError, DtypeError), match=match):
        array_to_torch(thing, copy=copy, path=("net", 0, "w"))
    with pytest.raises(BridgeError, match=match):
        to_torch({"net": [{"w": thing}], "fine": jnp.ones(2)}, copy=copy)
    with pytest.raises(BridgeError, match=kind):
        to_torch(thing, copy=copy)


@pytest.mark.parametrize("copy", [None, False, True])
def test_a_tracer_raises_whatever_the_transform(copy):
    cross = lambda x: (to_torch(x, copy=copy), x.sum())[1]  # noqa: E731
    linearize = lambda f: lambda x: jax.linearize(f, x)  # noqa: E731
    for transform in (jax.jit, jax.grad, jax.vmap, jax.make_jaxpr, linearize):
        with pytest.raises(
            UnsupportedLeafError, match=r"this leaf with torch: it is a tracer.*as_jax_function"
        ):
            transform(cross)(jnp.ones(3))
    assert float(jax.jit(lambda x: x.sum())(jnp.ones(3))) == 3


def test_a_constant_inside_a_trace_still_crosses():
    tensor, array = aligned(16), jnp.arange(16.0)

    @jax.jit
    def f(x):
        assert to_torch(array).tolist() == array.tolist()
        return x + to_jax(tensor)

    assert f(jnp.zeros(16)).tolist() == tensor.tolist()


def test_a_shard_of_a_sharded_array_crosses():
    sharded = _sharded()
    assert [to_torch(sharded.addressable_data(i)).tolist() for i in range(4)] == [
        [0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]
    ]  # fmt: skip


def test_an_array_sharded_over_a_mesh_of_one_device_crosses():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[1:2]), ("x",))
    array = jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    tensor = to_torch(array)
    assert tensor.tolist() == list(range(8))
    assert shares(tensor, array)


# --- devices and passing through ---------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_an_array_on_any_host_device_is_shared(index):
    array = jax.device_put(jnp.arange(32.0), jax.devices("cpu")[index])
    tensor = to_torch(array)
    assert tensor.device == torch.device("cpu")
    assert shares(tensor, array)
    assert tensor.tolist() == list(range(32))


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_requesting_the_cpu_from_torch_moves_nothing(name):
    array = jnp.arange(16.0)
    assert shares(to_torch(array, device=name, copy=False), array)
    tensor = torch.ones(3)
    assert to_torch(tensor, device=name, copy=False) is tensor


def test_requesting_the_arrays_own_device_moves_nothing():
    array = jax.device_put(jnp.arange(16.0), jax.devices()[2])
    assert shares(to_torch(array, device=jax.devices()[2], copy=False), array)


@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("how", ["device", "name"])
def test_to_jax_puts_the_array_on_the_device_asked_for(copy, how):
    tensor = aligned(16)
    before = tensor.tolist()
    device = jax.devices("cpu")[1]
    array = to_jax(tensor, copy=copy, device=device if how == "device" else "cpu:1")
    assert array.devices() == {device}
    assert not shares(tensor, array)
    tensor.zero_()
    assert array.tolist() == before


def test_moving_and_copy_false_contradict_each_other():
    with pytest.raises(ShareError, match=r"device=.*was asked for"):
        to_jax(torch.ones(16), device=jax.devices("cpu")[1], copy=False)
    with pytest.raises(ShareError, match="not on"):
        to_jax(jnp.ones(16), device=jax.devices("cpu")[1], copy=False)


@pytest.mark.parametrize("device", ["meta", "no device", 3])
def test_a_device_without_values_or_meaning_raises(device):
    for value in (jnp.ones(3), torch.ones(3)):
        for copy in (None, True):
            with pytest.raises(DeviceError):
                to_torch(value, device=device, copy=copy)
            with pytest.raises(DeviceError):
                to_jax(value, device=device, copy=copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_requesting_cuda_without_a_gpu_raises(device):
    for value in (jnp.ones(3), torch.ones(3)):
        for cross in (to_jax, to_torch):
            with pytest.raises(DeviceError, match="cuda"):
                cross(value, device=device)


def test_a_leaf_already_there_is_returned_as_it_is():
    tensor, array = torch.ones(3, requires_grad=True), jnp.ones(3)
    for copy in (None, False):
        assert to_torch(tensor, copy=copy) is tensor
        assert to_jax(array, copy=copy) is array
    assert to_jax([array, torch.ones(2)])[0] is array
    assert to_torch([tensor, jnp.ones(2)])[0] is tensor


def test_copy_true_copies_a_leaf_already_there():
    tensor, array = torch.arange(6.0).view(2, 3).t(), jnp.arange(64.0)
    copied = to_torch(tensor, copy=True)
    assert copied.data_ptr() != tensor.data_ptr()
    assert copied.is_contiguous()
    assert torch.equal(copied, tensor)
    again = to_jax(array, copy=True)
    assert again.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    assert again.tolist() == array.tolist()


@pytest.mark.parametrize("copy", [None, True])
def test_a_moved_tensor_is_row_major(copy):
    tensor = aligned(6, 10).t()
    for leaf in (tensor, to_jax(tensor)):
        moved = to_jax(leaf, device=jax.devices()[1], copy=copy)
        assert moved.format.layout.major_to_minor == (0, 1)
        assert array_bits(moved) == bits(tensor)


@pytest.mark.parametrize("memory", ["device", "pinned_host", "unpinned_host"])
def test_every_memory_of_the_host_is_shared(memory):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0], memory_kind=memory)
    array = jax.device_put(jnp.arange(16.0), sharding)
    assert shares(to_torch(array), array)
    assert to_torch(array).tolist() == list(range(16))


def test_copying_a_imported_array_is_done_when_the_call_returns():
    # The copy runs in the background, but torch may write to the source as soon as to_jax returns.
    for _ in range(20):
        tensor = torch.ones(1_000_000)
        array = to_jax(to_jax(tensor), copy=True)
        tensor.zero_()
        assert float(array.min()) == 1.0


@pytest.mark.parametrize(
    "move",
    [
        lambda tensor: to_jax(tensor, device=jax.devices()[1]),
        lambda tensor: to_jax(to_jax(tensor), device=jax.devices()[2]),
        lambda tensor: to_jax(to_jax(tensor), device=jax.devices()[3], copy=True),
    ],
    ids=["tensor", "imported array", "imported array, copy=True"],
)
def test_moving_imported_memory_is_done_when_the_call_returns(move):
    for _ in range(20):
        tensor = torch.ones(2_000_000)
        array = move(tensor)
        tensor.zero_()
        assert not shares(tensor, array)
        assert float(array.min()) == 1.0


def test_copy_true_passes_a_tracer_through():
    # to_jax may be called in a jitted function that gets only JAX values.
    assert jax.jit(lambda x: to_jax(x, copy=True) * 2)(jnp.ones(3)).tolist() == [2.0] * 3
    assert jax.jit(lambda x: to_jax({"a": x})["a"] * 2)(jnp.ones(3)).tolist() == [2.0] * 3


def test_a_tracer_goes_to_the_requested_device():
    device = jax.devices()[1]
    seen = jax.vmap(lambda x: to_jax(x, device=device))(jnp.ones(3))
    assert seen.devices() == {device}
    with pytest.raises(ShareError, match=r"it is a tracer.*was asked for"):
        jax.vmap(lambda x: to_jax(x, device=device, copy=False))(jnp.ones(3))


ASKED_INSIDE_JIT = {
    "copy=True of a imported array": lambda tensor: to_jax(to_jax(tensor), copy=True),
    "copy=True of a permuted one": lambda tensor: to_jax(to_jax(tensor.view(4, 4).t()), copy=True),
    "device= for a tensor": lambda tensor: to_jax(tensor, device=jax.devices()[1]),
    "device= for a imported array": lambda tensor: to_jax(to_jax(tensor), device=jax.devices()[1]),
    "unaligned tensor": lambda tensor: to_jax(tensor[1:]),
    "out and in again": lambda tensor: to_jax(to_torch(to_jax(tensor), copy=True)),
}


@pytest.mark.parametrize("cross", ASKED_INSIDE_JIT.values(), ids=ASKED_INSIDE_JIT)
def test_a_copy_inside_jit_is_made_during_tracing(cross):
    # A copy traced into the function would read what torch writes later.
    tensor, made = aligned(16).fill_(1), []
    jaxpr = jax.make_jaxpr(lambda x: (made.append(cross(tensor)), x)[1])(1.0)
    assert not isinstance(made[0], jax.core.Tracer)
    assert jaxpr.jaxpr.eqns == []
    tensor.zero_()
    assert set(np.asarray(made[0]).reshape(-1).tolist()) == {1.0}


def test_a_imported_array_is_copied_under_a_mesh_that_it_is_not_on():
    tensor = aligned(16)
    before = tensor.tolist()
    array = to_jax(tensor)
    with jax.set_mesh(jax.make_mesh((4,), ("x",))):
        copied = to_jax(array, copy=True)
        tensor.zero_()
        assert to_torch(copied, copy=True).tolist() == before
    assert copied.devices() == array.devices()


@pytest.mark.parametrize("copy", [None, True])
def test_nans_and_infinities_cross_while_jax_checks_for_them(copy):
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(16).view(8, 8)
    loose = jax.device_put(tensor.numpy())
    with jax.debug_nans(True), jax.debug_infs(True):
        for leaf in (tensor, tensor[1:], tensor.t(), to_jax(tensor), to_jax(tensor.t()), loose):
            crossed = to_jax(leaf, copy=copy)
            assert array_bits(crossed) == array_bits(leaf)
            assert bits(to_torch(crossed, copy=copy)) == array_bits(leaf)


@pytest.mark.parametrize("committed", [True, False])
def test_a_copy_is_committed_as_its_original_is(committed):
    array = to_jax(aligned(16)) if committed else jnp.arange(16.0)
    copied = to_jax(array, copy=True)
    assert copied.committed == array.committed == committed
    assert copied.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()


@pytest.mark.parametrize("copy", [None, True])
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_prng_keys_move_to_the_device_asked_for(copy, shape):
    keys = jax.random.split(jax.random.key(0), shape)
    moved = to_jax(keys, device=jax.devices()[1], copy=copy)
    assert moved.devices() == {jax.devices()[1]}
    assert np.array_equal(jax.random.key_data(moved), jax.random.key_data(keys))


def test_prng_keys_and_sharded_arrays_pass_through_to_jax():
    key, sharded = jax.random.key(0), _sharded()
    assert to_jax(key) is key
    assert to_jax(sharded) is sharded
    assert jnp.array_equal(jax.random.key_data(to_jax(key, copy=True)), jax.random.key_data(key))
    copied = to_jax(sharded, copy=True)
    assert copied.sharding == sharded.sharding
    assert copied.tolist() == sharded.tolist()


def test_a_deleted_array_that_must_be_copied_raises():
    array = _deleted()
    assert to_jax(array) is array
    with pytest.raises(UnsupportedLeafError, match="deleted array"):
        to_jax(array, copy=True)
    with pytest.raises(UnsupportedLeafError, match="deleted array"):
        to_jax(array, device=jax.devices()[1])


def test_weak_types_become_plain_tensors():
    assert to_torch(jnp.asarray(1.0)).dtype is torch.float32
    assert to_torch(jnp.asarray(1)).dtype is torch.int32
    assert not to_jax(torch.tensor(1.0)).weak_type


def test_imported_arrays_are_committed_as_from_dlpack_commits_them():
    stock = jax.dlpack.from_dlpack(torch.ones(16))
    for copy in (None, True):
        assert to_jax(torch.ones(16), copy=copy).committed == stock.committed


def test_results_never_require_grad():
    for copy in (None, True):
        assert not to_torch(jnp.ones(3), copy=copy).requires_grad
        assert to_torch(jnp.ones(3), copy=copy).is_leaf


# --- lifetime ----------------------------------------------------------------------------------------


def test_an_array_keeps_the_tensors_memory_alive():
    tensor = torch.full((1000,), 5.0)
    array = to_jax(tensor)
    del tensor
    gc.collect()
    junk = [torch.zeros(1000) for _ in range(20)]
    assert np.asarray(array).tolist() == [5.0] * 1000
    assert len(junk) == 20


def test_a_tensor_keeps_the_arrays_memory_alive():
    array = jnp.full((1000,), 5.0) + 0
    tensor = to_torch(array)
    del array
    gc.collect()
    junk = [jnp.zeros(1000) + i for i in range(20)]
    assert tensor.tolist() == [5.0] * 1000
    assert len(junk) == 20


def test_memory_is_freed_with_its_last_reference():
    class Owner:
        pass

    owner, gone = Owner(), []
    storage = np.zeros(1024 + 16, np.float32)
    finalizer = weakref.finalize(storage, gone.append, True)
    start = -storage.ctypes.data % 64 // 4
    array = to_jax(torch.from_numpy(storage[start : start + 1024]))
    back = to_torch(array)
    del storage, owner
    gc.collect()
    assert finalizer.alive
    del array
    gc.collect()
    assert finalizer.alive
    assert back.sum().item() == 0
    del back
    gc.collect()
    assert gone == [True]


def test_deleting_an_array_leaves_the_tensor_sound():
    array = jnp.full((1000,), 5.0) + 0
    tensor = to_torch(array)
    array.delete()
    junk = [jnp.zeros(1000) + i for i in range(20)]
    assert tensor.tolist() == [5.0] * 1000
    assert len(junk) == 20


def test_deleting_a_imported_array_leaves_the_tensor_sound():
    tensor = torch.full((1000,), 5.0)
    array = to_jax(tensor)
    array.delete()
    assert tensor.tolist() == [5.0] * 1000
    tensor.fill_(1)
    assert tensor.sum().item() == 1000


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donating_a_imported_array_leaves_the_tensor_as_it_was():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    tensor = torch.full((1000,), 5.0)
    result = step(to_jax(tensor))
    assert result.tolist() == [6.0] * 1000
    assert tensor.tolist() == [5.0] * 1000


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donating_an_exported_array_leaves_the_tensor_as_it_was():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jnp.full((1000,), 5.0) + 0
    tensor = to_torch(array)
    result = step(array)
    assert result.tolist() == [6.0] * 1000
    assert tensor.tolist() == [5.0] * 1000


def watched():
    """A plain tensor of 4,096 fives, and a finalizer that is alive as long as its memory is."""
    owner = np.full(4096 + 16, 5.0, np.float32)
    start = -owner.ctypes.data % 64 // 4
    return torch.from_numpy(owner[start : start + 4096]), weakref.finalize(owner, lambda: None)


NEW_MEMORY = {
    "module.double": lambda module: module.double(),
    "parameter.data =": lambda module: setattr(module.weight, "data", torch.zeros(3)),
    "parameter.set_": lambda module: module.weight.set_(torch.zeros(3)),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("replace", NEW_MEMORY.values(), ids=NEW_MEMORY)
@pytest.mark.parametrize("shape", [(64, 64), (4096, 1)], ids=str)
def test_a_parameter_that_gets_new_memory_leaves_the_old_memory_to_jax(replace, shape):
    tensor, memory = watched()
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor.view(shape), requires_grad=False)
    array = to_jax(module.weight)
    assert shares(module.weight, array)
    replace(module)
    del tensor
    gc.collect()
    assert memory.alive
    assert set(np.asarray(array).reshape(-1).tolist()) == {5.0}
    del array
    gc.collect()
    assert not memory.alive


def test_a_permuted_tensor_that_gets_new_memory_leaves_the_old_memory_to_jax():
    tensor, memory = watched()
    tensor = tensor.view(64, 64).t().data  # no view, whose base would keep the memory
    array = to_jax(tensor)
    assert shares(tensor, array)
    tensor.data = torch.zeros(3)
    gc.collect()
    assert memory.alive
    assert set(np.asarray(array).reshape(-1).tolist()) == {5.0}


def test_torch_refuses_to_resize_storage_behind_an_array():
    # torch forbids it for memory that DLPack handed out; were that to change, the docs must too.
    tensor = to_torch(jnp.ones(16))
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.untyped_storage().resize_(0)


def test_an_unfinished_array_is_waited_for():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 60, lambda _, y: y @ x / 400.0, x)

    x = jnp.ones((400, 400))
    slow(x).block_until_ready()
    for copy in (None, True, False):
        tensor = to_torch(slow(x), copy=copy)
        assert tensor.sum().item() == 160_000.0


def test_an_error_of_jax_names_the_leaf(monkeypatch):
    # As for an array whose computation failed in the background.
    def fail(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device's own words")

    monkeypatch.setattr(_dlpack, "export", fail)
    with pytest.raises(ExchangeError, match=r"'w\.0' with torch.*the device's own words") as caught:
        to_torch({"w": [jnp.ones(3)]})
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_an_error_of_torch_or_jax_on_import_names_the_leaf(monkeypatch):
    def fail(_):
        raise BufferError("the protocol's own words")

    monkeypatch.setattr(_dlpack, "import_cpu", fail)
    with pytest.raises(ExchangeError, match=r"'w\.0' with JAX.*the protocol's own words"):
        to_jax({"w": [torch.ones(16)]})


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_results_pickle_and_copy_as_any_other(make):
    tensor = make()
    array = to_jax(tensor)
    assert pickle.loads(pickle.dumps(array)).tolist() == tensor.tolist()
    assert copying.deepcopy(array).tolist() == tensor.tolist()
    assert copying.deepcopy(to_torch(array)).tolist() == tensor.tolist()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 3)], ids=str)
@pytest.mark.parametrize("bits_set", ["", "conj", "neg", "conj neg"])
def test_complex_numbers_at_odd_addresses_are_copied(x64_on, shape, bits_set):
    # As in a mapped file. torch's own clone crashes on some of these (see _copy_by_parts).
    raw = np.zeros(1024, np.uint8)
    start = -raw.ctypes.data % 64 + 8
    flat = torch.frombuffer(raw, dtype=torch.complex128, count=32, offset=start)
    flat.view(-1)[:] = torch.complex(torch.arange(32.0), -torch.arange(32.0) - 1)
    tensor = torch.as_strided(flat, shape, (1, 5)[: len(shape)])
    plain = np.lib.stride_tricks.as_strided(
        raw[start : start + 512].view(np.complex128), shape, (16, 80)[: len(shape)]
    )
    expected = plain.copy()
    if "conj" in bits_set:
        tensor, expected = tensor.conj(), expected.conj()
    if "neg" in bits_set:
        tensor, expected = torch._neg_view(tensor), -expected
    for copy in (None, True):
        assert np.array_equal(np.asarray(to_jax(tensor, copy=copy)), expected)
