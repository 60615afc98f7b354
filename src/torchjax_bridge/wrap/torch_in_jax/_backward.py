"""Backward passes that leave torch, by NumPy, ``.tolist()`` or ``.item()``.

Forward mode differentiates the backward in its cotangents, and torch cannot differentiate a backward that
leaves torch. It then raises, or takes the result for a constant, and the tangent would silently be zero. Owns
the check that a pushforward is the transpose of its backward, and the error that names the function. Traces
need no check: fake tensors have no values with which to leave torch.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

__all__ = ["explaining_numpy", "probes", "refuse_wrong_pushforward"]

_Tensors = Sequence[torch.Tensor]


@contextmanager
def explaining_numpy() -> Iterator[None]:
    """Turn torch's error about ``.numpy()`` under differentiation into one that says where, and what to do."""
    try:
        yield
    except RuntimeError as err:
        if "numpy() on Tensor that requires grad" not in str(err):
            raise
        where = _last_of_the_code(err)
        raise TransformError(
            f"{where}the code calls .numpy() on a tensor that is being differentiated. {_FIX}"
        ) from err


def _last_of_the_code(err: BaseException) -> str:
    """The innermost place of an error in code that is neither torch's nor ours."""
    where = ""
    for frame, line in traceback.walk_tb(err.__traceback__):
        if str(frame.f_globals.get("__name__")).split(".")[0] not in ("torch", "torchjax_bridge"):
            where = f"'{frame.f_code.co_qualname}', line {line}: "
    return where


def probes(cotangents: _Tensors) -> list[torch.Tensor]:
    """Test cotangents of the same shapes, all nonzero and different, without drawing from torch's generators."""
    return [
        torch.cos(torch.arange(1.0, 1.0 + ct.numel(), device=ct.device) * (1.7 + i))
        .reshape(ct.shape)
        .to(ct.dtype)
        for i, ct in enumerate(cotangents)
    ]


def refuse_wrong_pushforward(
    outputs: _Tensors,
    cotangents: _Tensors,
    pulled: _Tensors,
    pulled_twice: _Tensors,
    tangents: _Tensors,
    pushed: _Tensors,
) -> None:
    """Raise if ``tangents -> pushed`` is not the transpose of ``cotangents -> pulled``.

    Args:
        outputs: The outputs with their autograd graph, to name the functions in it.
        cotangents: Test cotangents of the outputs.
        pulled: The backward's gradients for ``cotangents``.
        pulled_twice: The backward's gradients for twice ``cotangents``. A backward that is not linear (it clips,
            say) has no transpose, and is not checked.
        tangents: The tangents of the inputs.
        pushed: The tangents that were found for the outputs.
    """
    left, right = _inner(pulled, tangents), _inner(cotangents, pushed)
    bound = _inner(pulled, tangents, absolute=True) + _inner(cotangents, pushed, absolute=True)
    eps = max((torch.finfo(t.dtype).eps for t in (*pulled, *pushed)), default=0.0)
    pairs = zip(pulled, pulled_twice, strict=True)
    linear = all(torch.allclose(b, 2 * a, rtol=10 * eps, atol=0.0) for a, b in pairs)
    if linear and abs(left - right) > eps**0.5 * bound:
        names = sorted(_own_functions(outputs))
        raise TransformError(
            f"the backward of this torch function{' (' + ', '.join(names) + ')' if names else ''} leaves torch "
            f"(.numpy(), .tolist(), .item() or the like), so its tangent would be wrong. {_FIX}"
        )


_FIX = (
    "Forward mode (jax.jvp, jacfwd, linearize) and second derivatives differentiate the backward, too. Write it in "
    "torch operations, or take first derivatives in reverse mode (jax.grad, vjp, jacrev) of code whose backward is "
    "a torch.autograd.Function's own."
)


def _inner(left: _Tensors, right: _Tensors, absolute: bool = False) -> float:
    """The real inner product of two lists of tensors; with ``absolute``, a bound of it."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        product = a.detach().to(torch.complex128) * b.detach().conj().to(torch.complex128)
        total += float(product.abs().sum() if absolute else product.real.sum())
    return total


def _own_functions(outputs: _Tensors) -> set[str]:
    """The names of the ``torch.autograd.Function`` classes in the graph of these tensors."""
    todo: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    own = torch.autograd.function.BackwardCFunction
    return {node.name().removesuffix("Backward") for node in seen if issubclass(type(node), own)}
