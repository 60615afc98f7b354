"""Python bools in a call of a wrapped JAX function: traced as under ``jax.jit``, constants where code branches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge import as_torch_function, errors, to_torch

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A module as equinox has them: weights, a switch, a number and a function are all leaves."""

    weight: Any
    inference: Any
    rate: Any = 0.5
    activation: Any = jnp.tanh
    kind: Any = "dense"

    def __call__(self, x):
        assert isinstance(self.kind, str)
        y = self.activation(x @ self.weight)
        return y if self.inference else y * self.rate


ARGUMENTS = {
    "an argument": (lambda w, flag: (w, flag), lambda x, w, flag: Layer(w, flag)(x)),
    "in a dict": (lambda w, flag: ({"w": w, "flag": flag},), lambda x, d: Layer(d["w"], d["flag"])(x)),
    "in a module": (lambda w, flag: (Layer(w, flag),), lambda x, layer: layer(x)),
    "in a list of modules": (lambda w, flag: ([Layer(w, flag)],), lambda x, layers: layers[0](x)),
}
anywhere = pytest.mark.parametrize(("pack", "fn"), ARGUMENTS.values(), ids=ARGUMENTS)


def expected(x, w, flag):
    return torch.tanh(x @ w) * (1 if flag else 0.5)


@pytest.mark.every(2)
@anywhere
@pytest.mark.parametrize("kind", [bool, np.bool_])
def test_a_bool_that_the_function_branches_on_is_a_constant(pack, fn, kind):
    f = as_torch_function(fn)
    x = torch.randn(3, 4)
    w = torch.randn(4, 2, requires_grad=True)
    for flag in (True, False, True, False):
        y = f(x, *pack(w, kind(flag)))
        torch.testing.assert_close(y, expected(x, w, flag))
        mine, torchs = (torch.autograd.grad(z.square().sum(), w)[0] for z in (y, expected(x, w, flag)))
        torch.testing.assert_close(mine, torchs)
    assert f.cache_info().misses == 3  # once traced, and then once for each value
    assert f.cache_info().currsize == 3


@pytest.mark.every(3)
@anywhere
@pytest.mark.parametrize("flag", [True, False])
def test_a_branch_on_a_bool_stays_under_transforms(pack, fn, flag):
    torch.manual_seed(0)
    f = as_torch_function(fn)
    x, w = torch.randn(5, 3, 4), torch.randn(4, 2)
    torch.testing.assert_close(torch.func.vmap(lambda x: f(x, *pack(w, flag)))(x), expected(x, w, flag))
    torch.testing.assert_close(
        torch.func.jacfwd(torch.func.grad(lambda w: f(x, *pack(w, flag)).square().mean()))(w),
        torch.func.jacfwd(torch.func.grad(lambda w: expected(x, w, flag).square().mean()))(w),
    )


@pytest.mark.parametrize("how", ["an argument", "in a dict"])
def test_a_branch_on_a_bool_compiles_without_a_graph_break(how):
    pack, fn = ARGUMENTS[how]
    f = as_torch_function(fn)
    x, w = torch.randn(3, 4), torch.randn(4, 2, requires_grad=True)
    # In a graph a class of one's own is no argument; a bool in a dict is.
    compiled = torch.compile(lambda x, w, flag: f(x, *pack(w, flag)) * 2, fullgraph=True, backend="aot_eager")
    for flag in (True, False):
        torch.testing.assert_close(compiled(x, w, flag), 2 * expected(x, w, flag))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, w, flag).sum(), w),
            torch.autograd.grad(2 * expected(x, w, flag).sum(), w),
        )


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, flag: jnp.sum(x, axis=0, keepdims=flag),
        lambda x, flag: jax.nn.gelu(x, approximate=flag),
        lambda x, flag: {True: x, False: 2 * x}[flag],
        lambda x, flag: x[1 : 3 if flag else 2],
    ],
)
def test_a_bool_is_a_constant_wherever_a_tracer_fails(fn):
    f = as_torch_function(fn)
    x = torch.arange(4.0)
    for flag in (True, False, np.True_):
        assert f(x, flag).tolist() == fn(jnp.arange(4.0), bool(flag)).tolist()


def test_a_bool_that_is_computed_with_is_traced_as_under_jit():
    traces = []

    def fn(x, flags):
        traces.append(1)
        # To Python ~True is -2 and True + True is 2; to JAX they are False and True.
        return jnp.where(~flags["a"], x, -x) * (flags["a"] + flags["b"]).astype(jnp.float32)

    f = as_torch_function(fn)
    for a in (True, False):
        for b in (True, False):
            given = {"a": a, "b": b}
            assert f(torch.ones(2), given).tolist() == jax.jit(fn)(jnp.ones(2), given).tolist()
    assert f.cache_info().misses == 1
    assert len(traces) == 2  # one for JAX


def test_only_the_calls_that_branch_have_constant_bools():
    @as_torch_function
    def f(x, flag, how):
        if how == "branch":
            return x if flag else -x
        return jnp.where(~flag, x, -x)

    for _ in range(2):
        assert f(torch.ones(1), True, "branch").tolist() == [1]
        assert f(torch.ones(1), True, "where").tolist() == [-1]
        assert f(torch.ones(1), False, "branch").tolist() == [-1]
        assert f(torch.ones(1), False, "where").tolist() == [1]


def test_numbers_beside_a_constant_bool_stay_traced():
    calls = []

    @as_torch_function
    def f(x, flag, scale, count):
        calls.append(1)
        return x * scale + count if flag else x

    for scale, count in ((1.0, 2), (3.0, 4), (5.0, 6)):
        assert f(torch.ones(1), True, scale, count).tolist() == [scale + count]
    assert len(calls) == 2  # with the bool traced, and then with its value


def test_an_error_that_no_bool_is_to_blame_for_is_the_first_one():
    @as_torch_function
    def f(x, flag):
        return (flag.astype(jnp.float32) * x) @ x.reshape(1, -1, 1)[0, 0, 0, 0]

    with pytest.raises(IndexError, match="Too many indices") as caught:
        f(torch.ones(3), True)
    assert "args[1]: bool[]" in caught.value.__notes__[-1]


def test_a_number_in_a_module_is_advised_to_be_made_a_static_field():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Repeat:
        weight: Any
        times: Any

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Static(Repeat):
        times: Any = dataclasses.field(metadata={"static": True})

    f = as_torch_function(lambda module: sum(module.weight for _ in range(module.times)))
    with pytest.raises(jax.errors.TracerIntegerConversionError) as caught:
        f(Repeat(torch.ones(2), 3))
    assert "make it a static field of its class" in caught.value.__notes__[-1]
    with pytest.raises(errors.ArgumentError):  # what cannot work there
        as_torch_function(f.__wrapped__, static_argnums=0)(Repeat(torch.ones(2), 3))
    assert f(Static(torch.ones(2), 3)).tolist() == [3, 3]
    assert f(Static(torch.ones(2), 2)).tolist() == [2, 2]


# --- equinox ------------------------------------------------------------------------------------------------------


def network(key):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: Any
        bn: Any
        dropout: Any
        mlp: Any

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(1, 3, 3, key=a)
            self.bn = eqx.nn.BatchNorm(3, "batch", mode="batch")
            self.dropout = eqx.nn.Dropout(0.3)
            self.mlp = eqx.nn.MLP(3, 2, 8, 1, activation=jax.nn.gelu, key=b)

        def __call__(self, x, state, key):
            x, state = self.bn(self.conv(x), state)
            return self.mlp(self.dropout(jax.nn.relu(x).mean((1, 2)), key=key)), state

    return eqx, *eqx.nn.make_with_state(Net)(key)


def equinox_loss(model, state, x, y, key):
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    found, state = forward(x, state, jax.random.split(key, len(x)))
    return ((found - y) ** 2).mean(), state


@pytest.mark.slow
def test_an_equinox_network_trains_by_torch_optim_as_by_optax():
    import optax

    eqx, model, state = network(jax.random.key(0))
    x, y = jax.random.normal(jax.random.key(1), (4, 1, 6, 6)), jax.random.normal(jax.random.key(2), (4, 2))
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    parameters = jax.tree.map(lambda a: torch.nn.Parameter(torch.tensor(np.array(a))), weights)
    ours, our_state = eqx.combine(parameters, rest), jax.tree.map(lambda a: torch.tensor(np.array(a)), state)
    optimizer = torch.optim.SGD(jax.tree.leaves(parameters), lr=0.1, momentum=0.9)
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(weights)
    f = as_torch_function(equinox_loss)
    tx_step = eqx.filter_jit(eqx.filter_value_and_grad(equinox_loss, has_aux=True))
    for step in range(3):
        key = jax.random.key(step)
        optimizer.zero_grad()
        loss, our_state = f(ours, our_state, *map(torch.tensor, map(np.array, (x, y))), key)
        loss.backward()
        our_state = jax.tree.map(torch.Tensor.detach, our_state)
        (wanted, state), gradients = tx_step(eqx.combine(weights, rest), state, x, y, key)
        np.testing.assert_allclose(loss.item(), wanted, rtol=1e-5)
        for mine, theirs in zip(jax.tree.leaves(parameters), jax.tree.leaves(gradients), strict=True):
            np.testing.assert_allclose(mine.grad, theirs, rtol=1e-4, atol=1e-6)
        optimizer.step()
        updates, opt_state = tx.update(gradients, opt_state)
        weights = optax.apply_updates(weights, updates)
    for mine, theirs in zip(jax.tree.leaves(our_state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)

    # What the error for the activation, a leaf too, says to take out of the tree.
    with pytest.raises(errors.UnsupportedLeafError, match=r"mlp\.activation.*equinox\.partition"):
        to_torch(model)
    assert all(
        isinstance(leaf, torch.Tensor) for leaf in jax.tree.leaves(to_torch(eqx.filter(model, eqx.is_array)))
    )

    # In evaluation the switches of all parts are turned.
    ours, theirs = eqx.nn.inference_mode(ours), eqx.nn.inference_mode(eqx.combine(weights, rest))
    evaluated = f(ours, our_state, *map(torch.tensor, map(np.array, (x, y))), key)[0].item()
    np.testing.assert_allclose(evaluated, equinox_loss(theirs, state, x, y, key)[0], rtol=1e-4)
    assert abs(evaluated - loss.item()) > 1e-4
