"""Reverse-mode derivatives of a function of tensors, by ``torch.autograd.grad``.

Owns the calls of torch's autograd: the inputs to differentiate in, gradients that are zero because an output
does not depend on an input, and the conjugate between torch's and JAX's gradients of complex tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._backward import explaining_numpy

__all__ = ["any_requires_grad", "conj", "gradients", "run_with_graph", "vjp"]

_Tensors = Sequence[torch.Tensor]


def vjp(
    fn: Callable[..., _Tensors],
    inputs: _Tensors,
    cotangents: _Tensors,
    wrt: tuple[int, ...],
    smooth_outs: tuple[int, ...],
) -> tuple[_Tensors, _Tensors]:
    """The outputs of ``fn``, and torch's gradients in the inputs ``wrt``.

    Both can be differentiated in turn if an input or a cotangent requires grad.
    """
    keep = any_requires_grad((*inputs, *cotangents))
    primals, outputs = run_with_graph(fn, inputs, wrt)
    grads = gradients([outputs[i] for i in smooth_outs], [primals[i] for i in wrt], cotangents, keep)
    return [output.detach() if not keep else output for output in outputs], grads


def run_with_graph(
    fn: Callable[..., _Tensors], inputs: _Tensors, wrt: tuple[int, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs, requiring grad at ``wrt``, and the outputs of ``fn`` with their autograd graph."""
    with torch.enable_grad(), explaining_numpy():
        # An input of an outer derivative stays connected to it. Any other input starts a graph of its own.
        primals = [
            (x.view_as(x) if x.requires_grad else x.detach().requires_grad_()) if i in wrt else x
            for i, x in enumerate(inputs)
        ]
        with _KeepInnerGraphs():
            return primals, list(fn(*primals))


def gradients(outputs: _Tensors, inputs: _Tensors, cotangents: _Tensors, keep: bool) -> list[torch.Tensor]:
    """``torch.autograd.grad``, with a gradient of zeros where no output depends on an input."""
    pairs = [(y, ct) for y, ct in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    ys, cts = zip(*pairs, strict=True)
    grads = torch.autograd.grad(ys, inputs, cts, create_graph=keep, allow_unused=True)
    return [torch.zeros_like(x) if g is None else _dense(g) for g, x in zip(grads, inputs, strict=True)]


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """The gradient as a dense tensor, also where an embedding asked for a sparse one."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def any_requires_grad(tensors: _Tensors) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def conj(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj().resolve_conj() if tensor.is_complex() else tensor


class _KeepInnerGraphs(TorchFunctionMode):
    """While active, derivatives that the code itself takes keep their graph, to be differentiated as in JAX."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad or func is torch.Tensor.backward:
            kwargs = {**kwargs, "create_graph": True}
        return func(*args, **kwargs)
