"""How every layer is tested: the same outputs on both sides, and the same bits when the weights come back."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import plan, to_flax, to_state_dict
from torchjax_bridge.weights import PairingWarning

Flax = ln.Module | Callable[[nnx.Rngs], nnx.Module]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that no default has: scales that are not 1, statistics that are not 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
        elif key.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            spread = 0.5 if tensor.ndim < 2 else 1 / max(1.0, (tensor.numel() / tensor.shape[0]) ** 0.5)
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * spread)
    return module


def template(flax: Flax, *inputs: Any, **settings: Any) -> Any:
    """The twin without values: linen variables, or an abstract nnx module."""
    if isinstance(flax, ln.Module):
        return jax.eval_shape(lambda: flax.init(jax.random.key(0), *inputs, **settings))
    return nnx.eval_shape(lambda: flax(nnx.Rngs(0)))


def run(flax: Flax, filled: Any, *inputs: Any, **settings: Any) -> Any:
    """The outputs of the twin with these weights."""
    if isinstance(flax, ln.Module):
        return jax.jit(lambda variables, *xs: flax.apply(variables, *xs, **settings))(filled, *inputs)
    graph, state = nnx.split(filled)
    return jax.jit(lambda state, *xs: nnx.merge(graph, state)(*xs, **settings))(state, *inputs)


def last(x: torch.Tensor) -> np.ndarray:
    """``(N, C, *space)`` to ``(N, *space, C)``."""
    return x.detach().movedim(1, -1).contiguous().numpy()


def as_is(x: torch.Tensor) -> np.ndarray:
    """The same axes on both sides."""
    return x.detach().numpy()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    """Standard normal float32 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference, of arrays of one shape."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert theirs.size == 1 or np.ptp(theirs) > 0
    return float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    )


def assert_returns(module: nn.Module, filled: Any, rules: Sequence[Any] = ()) -> None:
    """The way back gives the module's own ``state_dict``: keys, order and bits."""
    before = module.state_dict()
    back = to_state_dict(filled, module, rules=rules)
    assert list(back) == list(before)
    changed = [key for key, value in before.items() if not same_bits(back[key], value)]
    assert not changed


def assert_same_leaves(ours: Any, theirs: Any) -> None:
    """Two filled templates hold the same bits."""
    ours, theirs = (tree if isinstance(tree, dict) else nnx.state(tree) for tree in (ours, theirs))
    leaves = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert leaves
    for one, other in leaves:
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert np.array_equal(np.asarray(one), np.asarray(other))


def assert_twins(
    module: nn.Module,
    flax: Flax,
    *inputs: torch.Tensor,
    within: float,
    axes: Callable[[torch.Tensor], np.ndarray] = last,
    bare: bool = True,
    rules: Sequence[Any] = (),
    call: Callable[..., Any] | None = None,
    warm: int = 0,
    **settings: Any,
) -> Any:
    """Fill the twin, compare outputs, bring the weights back.

    Args:
        module: The torch module; its tensors are drawn anew.
        flax: A linen module, or a function from ``rngs`` to an nnx module.
        inputs: What the torch module is called with.
        within: The bound of the largest absolute difference of the outputs.
        axes: Where the axes of inputs and outputs lie on the Flax side.
        bare: Whether the keys alone say enough to convert the ``state_dict``.
        rules: As for `to_flax`.
        call: Calls the torch module, where it is not just called.
        warm: How often the torch module runs in training mode first.
        settings: How the Flax module is called.

    Returns:
        The filled twin.
    """
    randomise(module).train()
    with torch.no_grad():
        for _ in range(warm):
            (call or module)(*inputs)
    module.eval()
    xs = [axes(x) if x.is_floating_point() else x.numpy() for x in inputs]
    empty = template(flax, *xs, **settings)
    filled = to_flax(module, empty, rules=rules)
    with torch.no_grad():
        want = axes((call or module)(*inputs))
    assert difference(run(flax, filled, *xs, **settings), want) <= within
    assert_returns(module, filled, rules)
    if bare:
        state = module.state_dict()
        doubt = plan(state, empty, rules=rules).assumed  # what the module's classes settled
        with pytest.warns(PairingWarning) if doubt else nullcontext():
            assert_same_leaves(to_flax(state, empty, rules=rules), filled)
    return filled
