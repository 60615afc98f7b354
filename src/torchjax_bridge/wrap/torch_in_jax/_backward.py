"""Code that leaves torch where it is differentiated: a backward of NumPy, ``.tolist()`` or ``.item()``.

Forward mode is the derivative of the backward in its cotangents. A backward that leaves torch has none: torch then
raises, or takes what it got back for a constant, and the tangent would be zero in silence. Owns the check that a
backward and what was found to be its transpose agree, and the error that names the function. A trace is not
checked: fake tensors have no values to leave with.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

__all__ = ["explaining_numpy", "probes", "refuse_untrue"]

_Tensors = Sequence[torch.Tensor]


@contextmanager
def explaining_numpy() -> Iterator[None]:
    """Raise what torch says of ``.numpy()`` under differentiation as an error that says where and what to do."""
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
    """Where an error was raised in code that is neither torch's nor ours."""
    where = ""
    for frame, line in traceback.walk_tb(err.__traceback__):
        if str(frame.f_globals.get("__name__")).split(".")[0] not in ("torch", "torchjax_bridge"):
            where = f"'{frame.f_code.co_qualname}', line {line}: "
    return where


def probes(cotangents: _Tensors) -> list[torch.Tensor]:
    """Cotangents of the same shapes, none zero and no two alike; torch's generators stay as they are."""
    return [
        torch.cos(torch.arange(1.0, 1.0 + ct.numel(), device=ct.device) * (1.7 + i))
        .reshape(ct.shape)
        .to(ct.dtype)
        for i, ct in enumerate(cotangents)
    ]


def refuse_untrue(
    outputs: _Tensors,
    cotangents: _Tensors,
    sent: _Tensors,
    twice: _Tensors,
    tangents: _Tensors,
    pushed: _Tensors,
) -> None:
    """Raise if ``tangents -> pushed`` is not the transpose of ``cotangents -> sent``.

    Args:
        outputs: With the graph that was differentiated, to name the functions in it.
        cotangents: Some cotangents of the outputs,
        sent: and what the backward makes of them,
        twice: and of twice as much: a backward that is not linear (it clips, say) has no transpose to compare with.
        tangents: The tangents of the inputs,
        pushed: and those of the outputs that were found.
    """
    there, here = _inner(sent, tangents), _inner(cotangents, pushed)
    bound = _inner(sent, tangents, absolute=True) + _inner(cotangents, pushed, absolute=True)
    eps = max((torch.finfo(t.dtype).eps for t in (*sent, *pushed)), default=0.0)
    linear = all(torch.allclose(b, 2 * a, rtol=10 * eps, atol=0.0) for a, b in zip(sent, twice, strict=True))
    if linear and abs(there - here) > eps**0.5 * bound:
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
    """The real inner product of two lists of tensors; or a bound of it."""
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
