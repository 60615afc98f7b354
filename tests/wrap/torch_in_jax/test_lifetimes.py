"""What a wrapper registers dies with it, and what still needs it keeps it."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
import torch

from tests.marking import slow_but
from torchjax_bridge import as_jax_function, as_jax_module

X = jnp.ones((4, 3))


class Sine:
    def __call__(self, x):
        return torch.sin(x).sum()


USES = {
    "eager": lambda f: f(X),
    "jit": lambda f: jax.jit(lambda x: f(x))(X),
    "grad": lambda f: jax.grad(f)(X),
    "jit grad": lambda f: jax.jit(jax.grad(f))(X),
    "vmap": lambda f: jax.jit(jax.vmap(f))(X),
    "hessian": lambda f: jax.hessian(f)(X[0]),
    "scan": lambda f: jax.lax.scan(lambda c, _: (c + f(c), None), X, None, length=2),
}


@pytest.mark.every(2)
@pytest.mark.parametrize("name", slow_but(["grad", "jit", "vmap"], USES))
def test_the_function_dies_with_its_wrapper(name):
    fn = Sine()
    dead = weakref.ref(fn)
    wrapped = as_jax_function(fn)
    jax.block_until_ready(USES[name](wrapped))
    del fn, wrapped
    gc.collect()
    if name in ("scan",):  # JAX keeps the bodies of loops that it ran eagerly until its caches are cleared
        jax.clear_caches()
        gc.collect()
    assert dead() is None


@pytest.mark.slow
def test_a_compiled_function_keeps_what_it_calls():
    compiled = jax.jit(lambda x: as_jax_function(Sine())(x))
    assert compiled(X) == compiled(X + 0)
    gc.collect()
    assert jnp.allclose(jax.grad(compiled)(X), jnp.cos(X))
    assert jnp.allclose(compiled(X[:2]), jnp.sin(X[:2]).sum())


def test_a_module_dies_with_its_apply():
    module = torch.nn.Linear(3, 2)
    dead = weakref.ref(module), weakref.ref(module.weight)

    def use(module):
        apply, variables = as_jax_module(module)
        jax.block_until_ready(jax.jit(lambda v: apply(v, X))(variables))

    use(module)
    del module
    gc.collect()
    assert all(reference() is None for reference in dead)


def test_the_cache_of_kinds_of_call_is_bounded(monkeypatch):
    from torchjax_bridge.wrap.torch_in_jax import _function

    monkeypatch.setattr(_function, "CACHE_SIZE", 3)
    f = as_jax_function(lambda x, n: x * n)
    for n in range(6):
        assert jax.eval_shape(lambda x, n=n: f(x, n), X).shape == X.shape
    assert f.cache_info().currsize == 3
