"""A JAX function called on tensors: what goes in, what comes out, what is compiled, what an error says."""

import copy
import dataclasses
import doctest
import enum
import functools
import gc
import pickle
import threading
import traceback
import weakref
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import errors
from torchjax_bridge.wrap import _cache, as_torch_function
from torchjax_bridge.wrap.jax_in_torch import _function, _registry

# torch scripts some of its own functions when torch.func is first used, and warns that one should not.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Pair = namedtuple("Pair", "left right")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    x: object
    step: object


class Mode(enum.Enum):
    SUM = 1
    MEAN = 2


def t(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=dtype).reshape(shape) / 7


# --- arguments and results -----------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [False, True])
def test_a_function_gives_what_jax_gives(jit):
    def f(x, w):
        return jnp.tanh(x @ w)

    x, w = t(4, 3), t(3, 2)
    y = as_torch_function(jax.jit(f) if jit else f)(x, w)
    assert type(y) is torch.Tensor
    assert np.array_equal(y.numpy(), np.asarray(jax.jit(f)(x.numpy(), w.numpy())))


def test_a_pytree_goes_in_with_gradients_for_every_leaf():
    @as_torch_function
    def f(tree, *, scale):
        return (tree["a"] * tree["b"][0] + tree["b"][1].left * tree["b"][1].right.x).sum() * scale["k"]

    leaves = [torch.tensor(float(i), requires_grad=True) for i in range(2, 7)]
    a, b, left, x, k = leaves
    tree = {"b": (b, Pair(left, State(x, None))), "a": a}
    f(tree, scale={"k": k}).backward()
    assert [leaf.grad.item() for leaf in leaves] == [18.0, 12.0, 30.0, 24.0, 26.0]


def test_any_pytree_comes_out():
    @as_torch_function
    def f(x):
        return {"pair": Pair(x + 1, (x * 2, None)), "state": State(x.sum(), 3), "list": [x > 1, x.argmax()]}

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = f(x)
    assert isinstance(y["pair"], Pair)
    assert y["pair"].right[1] is None
    assert isinstance(y["state"], State)
    assert y["state"].step.dtype is torch.int32
    assert y["list"][0].tolist() == [False, True]
    assert y["list"][1].item() == 1
    assert all(not leaf.requires_grad for leaf in (*y["list"], y["state"].step))
    (y["pair"].left.sum() + y["pair"].right[0].sum() + y["state"].x).backward()
    assert x.grad.tolist() == [4.0, 4.0]


def test_none_alone_comes_out_and_goes_in():
    f = as_torch_function(lambda x, y: None if y is None else x)
    assert f(t(2), None) is None
    assert f(t(2), t(1)) is not None


def test_python_numbers_are_traced_weakly_typed_and_once_for_all_values():
    calls = []

    @as_torch_function
    def f(x, scale, flag, n):
        calls.append(1)
        return jnp.where(flag, x * scale, x) + n

    half = torch.ones(2, dtype=torch.bfloat16)
    for scale, flag, n, expected in ((2.0, True, 1, 3.0), (3.0, True, 0, 3.0), (9.0, False, 4, 5.0)):
        y = f(half, scale, flag, n)
        assert y.dtype is torch.bfloat16
        assert y.tolist() == [expected] * 2
    assert len(calls) == 1


def test_a_numpy_scalar_is_a_number_and_a_numpy_array_a_constant():
    f = as_torch_function(lambda x, s, a: x * s + a)
    x = torch.ones(2, dtype=torch.float16, requires_grad=True)
    y = f(x, np.float64(2.0), np.ones(2, np.float16))
    assert y.dtype is torch.float16
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    frozen = np.ones(2, np.float32)
    frozen.flags.writeable = False
    assert f(torch.ones(2), 1, frozen).tolist() == [2.0, 2.0]


def test_a_wide_numpy_array_is_not_narrowed_in_silence(x64_off):
    f = as_torch_function(lambda x, a: x + a["k"])
    with pytest.raises(errors.DtypeError, match=r"args\[1\]\['k'\]"):
        f(torch.ones(2), {"k": np.ones(2)})
    with pytest.raises(errors.NarrowingError, match=r"args\[1\]\['k'\]"):
        f(torch.ones(2), {"k": np.array([2**40])})
    assert f(torch.ones(2), {"k": np.array([3])}).tolist() == [4.0, 4.0]
    with pytest.raises(errors.ArgumentError, match="args\\[1\\]\\['k'\\] is a numpy array of dtype <U1"):
        f(torch.ones(2), {"k": np.array(["a"])})


def test_jax_arrays_and_prng_keys_are_constants_with_new_values_each_call():
    calls = []

    @as_torch_function
    def f(x, key, shift):
        calls.append(1)
        return x * jax.random.bernoulli(key, 0.5, x.shape) + shift, jax.random.split(key)[0]

    x = torch.ones(64, requires_grad=True)
    for seed in (0, 1):
        key = jax.random.key(seed)
        y, new = f(x, key, jnp.float32(seed))
        mask = np.asarray(jax.random.bernoulli(key, 0.5, (64,)))
        assert np.array_equal(y.detach().numpy(), mask + np.float32(seed))
        assert isinstance(new, jax.Array)
        assert jnp.array_equal(jax.random.key_data(new), jax.random.key_data(jax.random.split(key)[0]))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert np.array_equal(grad.numpy(), mask)
    assert len(calls) == 1


def test_strings_functions_enums_and_dtypes_are_static():
    @as_torch_function
    def f(x, how, *, act, mode, dtype):
        x = act(x)
        x = x * 2 if how == "double" else x
        return (x.sum() if mode is Mode.SUM else x.mean()).astype(dtype)

    x = t(4)
    for how, act, mode in (("double", jnp.sin, Mode.SUM), ("no", jnp.cos, Mode.MEAN)):
        y = f(x, how, act=act, mode=mode, dtype=jnp.float16)
        assert y.dtype is torch.float16
        expected = np.asarray(act(x.numpy())) * (2 if how == "double" else 1)
        expected = expected.sum() if mode is Mode.SUM else expected.mean()
        assert y.item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "how", [{"static_argnums": 1}, {"static_argnames": "n"}, {"static_argnames": ("n",)}]
)
def test_static_arguments_are_python_values(how):
    @functools.partial(as_torch_function, **how)
    def f(x, n):
        assert isinstance(n, int)
        return sum((x for _ in range(n)), start=jnp.zeros_like(x))

    assert f(t(2), 3).tolist() == pytest.approx((3 * t(2)).tolist())
    assert f(t(2), n=2).tolist() == pytest.approx((2 * t(2)).tolist())
    assert f.cache_info().currsize == 2


def test_keyword_only_arguments_have_gradients():
    f = as_torch_function(lambda x, *, w: (x * w).sum())
    w = t(3).requires_grad_()
    f(t(3), w=w).backward()
    assert torch.equal(w.grad, t(3))


def test_every_dtype_crosses():
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
    ):
        x = torch.ones(3, dtype=dtype)
        y = as_torch_function(lambda x: x + x)(x)
        assert y.dtype is dtype
        assert y.tolist() == [2, 2, 2]
    assert as_torch_function(lambda x: ~x)(torch.tensor([True, False])).tolist() == [False, True]
    with jax.enable_x64(True):
        for dtype in (torch.float64, torch.int64, torch.complex128):
            assert as_torch_function(lambda x: x + x)(torch.ones(3, dtype=dtype)).dtype is dtype


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(()),
        lambda: torch.ones(0),
        lambda: torch.ones(3, 0),
        lambda: torch.arange(1.0, 9)[::2],
        lambda: torch.arange(1.0, 9)[1:],
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(3, 4, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    ],
    ids=[
        "0d",
        "empty",
        "3x0",
        "sliced",
        "unaligned",
        "expanded",
        "transposed",
        "channels_last",
        "conj",
        "neg",
    ],
)
def test_any_strides_go_in_and_gradients_fit_them(make):
    x = make().detach().requires_grad_()
    y = as_torch_function(lambda x: x * x + 1)(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, x * x + 1)
    (mine,) = torch.autograd.grad(y.abs().sum(), x)
    (theirs,) = torch.autograd.grad((x * x + 1).abs().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_a_parameter_and_a_tensor_are_the_same_argument():
    f = as_torch_function(lambda x: x * 2)
    f(t(2))
    f(torch.nn.Parameter(t(2)))
    assert f.cache_info() == (1, 1, 256, 1)


# --- the dtype policy ------------------------------------------------------------------------------------


def test_wide_floats_raise_and_name_the_leaf_with_x64_off(x64_off):
    f = as_torch_function(lambda x: x["a"][0])
    with pytest.raises(errors.DtypeError, match=r"args\[0\]\['a'\]\[0\].*float64 needs x64.*torch.float32"):
        f({"a": [t(2, dtype=torch.float64)]})
    with pytest.raises(errors.DtypeError, match="complex64"):
        f({"a": [torch.ones(2, dtype=torch.complex128)]})


def test_wide_integers_become_narrow_only_where_they_fit(x64_off):
    f = as_torch_function(lambda x: x + 1)
    assert f(torch.tensor([1, 2])).tolist() == [2, 3]
    assert f(torch.tensor([1, 2])).dtype is torch.int32
    with pytest.raises(errors.NarrowingError, match=r"args\[0\]"):
        f(torch.tensor([2**40]))


def test_int64_labels_work_as_residuals_too(x64_off):
    f = as_torch_function(lambda logits, i: jnp.take_along_axis(logits**2, i[:, None], 1).sum())
    logits, labels = t(3, 4).requires_grad_(), torch.tensor([0, 3, 1])
    f(logits, labels).backward()
    expected = torch.zeros(3, 4).scatter(1, labels[:, None], 2 * logits.detach().gather(1, labels[:, None]))
    torch.testing.assert_close(logits.grad, expected)


def test_a_program_is_of_the_x64_it_was_traced_with():
    f = as_torch_function(lambda x: x + jnp.arange(3))
    with jax.enable_x64(True):
        assert f(torch.ones(3, dtype=torch.int32)).dtype is torch.int64
    with jax.enable_x64(False):
        assert f(torch.ones(3, dtype=torch.int32)).dtype is torch.int32
    assert f.cache_info().misses == 2


def test_matmul_precision_is_part_of_what_is_compiled():
    f = as_torch_function(lambda x: x @ x)
    f(t(2, 2))
    with jax.default_matmul_precision("highest"):
        f(t(2, 2))
    assert f.cache_info().misses == 2


# --- what is compiled, and how long it lives -------------------------------------------------------------


def test_a_function_is_traced_once_per_structure_shape_dtype_and_static_value():
    seen = []

    def f(x, mode, y=None):
        seen.append((x.shape, str(x.dtype), mode))
        return x if y is None else x + y

    g = as_torch_function(f)
    calls = [
        lambda: g(t(2), "a"),
        lambda: g(t(3), "a"),
        lambda: g(t(2).half(), "a"),
        lambda: g(t(2), "b"),
        lambda: g(t(2), "a", t(2)),
        lambda: g(t(2), mode="a"),
    ]
    for call in calls * 3:
        call()
    assert len(seen) == len(calls)
    assert g.cache_info() == (12, 6, 256, 6)
    g.cache_clear()
    assert g.cache_info() == (0, 0, 256, 0)
    calls[0]()
    assert g.cache_info() == (0, 1, 256, 1)


def test_gradients_do_not_trace_the_function_again():
    seen = []

    @as_torch_function
    def f(x):
        seen.append(1)
        return jnp.sin(x).sum()

    x = t(3).requires_grad_()
    for _ in range(2):
        (g,) = torch.autograd.grad(f(x), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)
    torch.func.hessian(f)(t(3))
    assert len(seen) == 1


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(_function, "CACHE_SIZE", 2)
    f = as_torch_function(lambda x: x)
    for n in (1, 2, 3, 1):
        f(t(n))
    assert f.cache_info() == (0, 4, 2, 2)


def test_what_a_failed_build_leaves_is_tried_again():
    cache = _cache.Cache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get("k", lambda: 1 / 0)
    assert cache.get("k", lambda: 5) == 5
    assert cache.info() == (0, 2, 2, 1)


def test_one_key_is_built_once_by_many_threads():
    cache, built, gate = _cache.Cache(2), [], threading.Barrier(8)

    def build():
        built.append(1)
        return object()

    def work(found):
        gate.wait()
        found.append(cache.get("k", build))

    found: list[object] = []
    threads = [threading.Thread(target=work, args=(found,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(set(map(id, found))) == 1


class Big:
    """A closed-over object to watch."""

    def __call__(self, x):
        return jnp.sin(x) * 2


def test_the_function_and_all_it_compiled_die_with_the_wrapper():
    big = Big()
    f = as_torch_function(big)
    x = t(3).requires_grad_()
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.autograd.grad(g.sum(), x)
    torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sum()))(t(2, 3))
    program = next(iter(f._traces._entries.values())).value.program
    watched = [weakref.ref(f), weakref.ref(big), weakref.ref(program), weakref.ref(program.run)]
    watched += [weakref.ref(entry.value) for entry in program.derived._entries.values()]
    assert len(watched) > 5
    name = f._name
    assert _registry.find(name) is f
    del f, big, program, g
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    with pytest.raises(KeyError):
        _registry.find(name)


def test_eight_threads_run_forward_and_backward_at_once():
    calls = []

    def f(x, w):
        calls.append(1)
        return jnp.tanh(x @ w).sum()

    g = as_torch_function(f)
    gate, failures = threading.Barrier(8), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        gate.wait()
        for _ in range(15):
            x = torch.randn(4, 3, generator=generator)
            w = torch.randn(3, 2, generator=generator).requires_grad_()
            g(x, w).backward()
            expected = torch.autograd.grad(torch.tanh(x @ w).sum(), w)[0]
            if not torch.allclose(w.grad, expected, atol=1e-5):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(calls) == 1
    assert g.cache_info().hits == 119


# --- errors ----------------------------------------------------------------------------------------------


def test_an_error_while_tracing_is_the_users_own_with_the_arguments_noted():
    def broken(x, w):
        return x["a"] @ w  # the frame that the user must see

    with pytest.raises(TypeError, match="dot_general") as caught:
        as_torch_function(broken)({"a": t(2, 3)}, t(4, 2))
    frames = traceback.extract_tb(caught.tb)
    assert any(frame.name == "broken" and frame.filename == __file__ for frame in frames)
    note = caught.value.__notes__[-1]
    assert "args[0]['a']: float32[2,3]" in note
    assert "args[1]: float32[4,2]" in note
    assert "broken" in note


def test_an_error_for_a_traced_number_says_how_to_make_it_static():
    @as_torch_function
    def f(x, number, flag):
        return x if flag and number else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        f(t(2), 1.0, True)  # the bool is no longer at fault
    assert "static_argnames" in caught.value.__notes__[-1]
    assert as_torch_function(f.__wrapped__, static_argnames="number")(t(2), 1.0, True).shape == (2,)
    with pytest.raises(jax.errors.TracerIntegerConversionError) as caught:
        as_torch_function(lambda x, times: [x for _ in range(times)])(t(2), 3)
    assert "static_argnames" in caught.value.__notes__[-1]


def host_failure(x):
    raise ZeroDivisionError("the host function failed")


def test_an_error_while_running_shows_the_users_frame():
    @as_torch_function
    def f(x):
        return jax.pure_callback(host_failure, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        f(t(2))
    text = "".join(traceback.format_exception(caught.value))
    assert "host_failure" in text
    assert "the host function failed" in text
    assert "args[0]: float32[2]" in caught.value.__notes__[-1]


def test_a_leaf_that_cannot_cross_is_named():
    f = as_torch_function(lambda tree: tree["a"][1])
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(errors.UnsupportedLeafError, match=r"args\[0\]\['a'\]\[1\].*sparse"):
        f({"a": (t(1), sparse)})
    with pytest.raises(errors.DtypeError, match=r"args\[0\]\['a'\]\[1\].*int4"):
        f({"a": (t(1), torch.empty(2, dtype=torch.int4))})


def test_an_unhashable_leaf_is_named():
    with pytest.raises(errors.ArgumentError, match=r"kwargs\['options'\] is a builtins.set"):
        as_torch_function(lambda x, options: x)(t(1), options={1, 2})


def test_a_result_that_torch_cannot_hold_is_named():
    f = as_torch_function(lambda x: {"ok": x, "bad": [x.astype(jnp.int4)]})
    with pytest.raises(
        errors.OutputError, match=r"the result\['bad'\]\[0\] of .* torch has no dtype for int4"
    ):
        f(t(2))


def _endless(x):
    tree = [x]
    tree.append(tree)
    return tree


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_endless, "the result of _endless is no pytree: .*contains itself"),
        (lambda x: {1: x, "a": x}, "no pytree: .*must sort"),
        (lambda x: {"a": [x, "text"]}, r"the result\['a'\]\[1\] of .* is a builtins.str"),
        (lambda x: torch.ones(1), "is a torch.Tensor"),
    ],
)
def test_a_result_that_is_no_pytree_of_arrays_is_named(function, words):
    with pytest.raises(errors.OutputError, match=words):
        as_torch_function(function)(torch.ones(2))
    assert as_torch_function(lambda t: t["a"][0]["b"])({"a": [{"b": torch.ones(2)}]}).shape == (2,)


def test_python_numbers_come_out_as_tensors():
    results = as_torch_function(lambda x: (1, 2.0, True, np.float32(3)))(torch.ones(2))
    assert [result.item() for result in results] == [1, 2.0, True, 3.0]
    assert results[2].dtype == torch.bool


def test_a_number_that_does_not_fit_is_named(x64_off):
    f = as_torch_function(lambda x, n: x * n)
    for warm in (False, True):
        if warm:
            f(torch.ones(1), 2)
        with pytest.raises(
            errors.NarrowingError, match=rf"'args\[1\]' to JAX: {2**40} does not fit in 32 bits"
        ):
            f(torch.ones(1), 2**40)


@pytest.mark.parametrize("value", [np.str_("sum"), np.datetime64("2020-01-01"), np.longdouble(1)])
def test_a_numpy_scalar_that_is_no_number_of_jaxs_is_named(value):
    with pytest.raises(errors.ArgumentError, match=rf"args\[1\] is a numpy.{type(value).__name__}"):
        as_torch_function(lambda x, y: x)(torch.ones(1), value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_named(layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    f = as_torch_function(jnp.sin)
    with pytest.raises(errors.ArgumentError, match=r"args\[0\] is a nested tensor"):
        f(nested)
    with pytest.raises(errors.ArgumentError, match=r"args\[0\] is a lazy parameter"):
        f(torch.nn.parameter.UninitializedParameter())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_jit_trace_is_refused_as_it_would_record_constants():
    f = as_torch_function(jnp.sin)
    with pytest.raises(errors.TransformError, match=r"torch\.export"):
        torch.jit.trace(lambda x: f(x) + 1, torch.ones(2))


def test_a_tracer_is_refused_with_the_way_out():
    f = as_torch_function(lambda x: x)
    with pytest.raises(errors.ArgumentError, match="as_jax_function"):
        jax.jit(lambda x: f(x))(1.0)


@pytest.mark.parametrize("thing", [3, torch.nn.Linear(1, 1), as_torch_function(lambda x: x)])
def test_only_a_jax_function_is_wrapped(thing):
    with pytest.raises(errors.ArgumentError, match="as_torch_function wraps a function of JAX arrays"):
        as_torch_function(thing)


@dataclasses.dataclass(frozen=True)
class Spring:
    stiffness: float

    @as_torch_function
    def energy(self, x):
        return (self.stiffness * x**2).sum()


def test_a_method_is_bound_to_its_instance():
    x = t(3).requires_grad_()
    Spring(2.0).energy(x).backward()
    torch.testing.assert_close(x.grad, 4 * x.detach())
    torch.testing.assert_close(Spring.energy(Spring(3.0), x), 3 * x.square().sum())
    assert Spring.energy.cache_info().currsize == 2  # the instance is a static value
    compiled = torch.compile(Spring(2.0).energy, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * x.square().sum())


def test_the_wrapper_keeps_the_name_and_the_documentation():
    def f(x):
        """What f does."""

    g = as_torch_function(f)
    assert g.__name__ == "f"
    assert g.__doc__ == "What f does."
    assert repr(g).endswith("f>")


def test_the_examples_in_the_docstrings_run():
    for module in (_function, _cache):
        assert doctest.testmod(module).failed == 0


@as_torch_function
def decorated(x):
    return x + 1


def plain(x, n):
    return x * n


def test_a_wrapper_is_copied_as_functions_are_and_pickled_by_name():
    assert copy.deepcopy(decorated) is decorated
    layer = torch.nn.Sequential()
    layer.act = as_torch_function(plain, static_argnames="n")
    assert copy.deepcopy(layer).act is layer.act
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    again = pickle.loads(pickle.dumps(layer.act))
    assert again(torch.ones(2), n=3).tolist() == [3.0, 3.0]
    assert again is not layer.act
