"""A program called on tensors, under every transform that torch has in eager mode.

There are three cases, and `call` picks the first that applies:

* Nothing is differentiated: the compiled forward pass runs.
* Reverse mode: `_Reverse`. Its forward pass is compiled together with its residuals, and its backward pass is
  the compiled pullback, which takes them.
* ``torch.func`` or forward AD: `_Transformed`. Its backward, jvp and vmap call derived programs.

A derivative that must itself be differentiable is a `call` of a derived program, so derivatives nest to any
depth. Owns what is saved for a derivative. ``_run`` runs a program, and ``_program`` says what it computes.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .._settings import x64_as
from ._linearized import Linearized
from ._program import JaxProgram
from ._run import run, run_with_arrays
from ._state import dual_level_active, functorch_active, hidden_from_dynamo, saving_hooks_active

__all__ = ["call"]

_Tensor = torch.Tensor
is_grad_enabled = torch.is_grad_enabled
is_compiling = torch.compiler.is_compiling


def call(program: JaxProgram, leaves: Sequence[Any]) -> Sequence[Any]:
    """The results of ``program`` on tensors, arrays and numbers, under whatever transforms are active."""
    if functorch_active() or dual_level_active():
        return _Transformed.apply(program, *leaves)
    if program.smooth_outputs and is_grad_enabled():
        for leaf in leaves:
            if isinstance(leaf, _Tensor) and leaf.requires_grad:
                return _Reverse.apply(program, *leaves)
    return run(program, leaves)


class _Reverse(torch.autograd.Function):
    """Reverse mode outside ``torch.func``."""

    @staticmethod
    @hidden_from_dynamo
    def forward(ctx: Any, program: JaxProgram, *leaves: Any) -> tuple[Any, ...]:
        """Run the forward pass, and let torch save its residuals."""
        ctx.set_materialize_grads(False)
        wrt = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        linear = Linearized.of(program, wrt)
        everything, arrays = run_with_arrays(linear.forward, leaves)
        count = len(program.outputs)
        results, residuals = everything[:count], everything[count:]
        ctx.linear = program.origin.pin(linear, linear) if is_compiling() else linear
        # The same memory as JAX arrays, so that it need not be imported again; not if hooks may move it.
        ctx.arrays = None
        if arrays is not None and not saving_hooks_active():
            ctx.arrays = [arrays[i] for i in linear.array_places]
        # torch saves tensors and checks that nobody writes to them. All other values are immutable.
        values = [*leaves, *(results[i] for i in linear.kept), *residuals]
        ctx.others = [None if isinstance(value, _Tensor) else value for value in values]
        ctx.save_for_backward(*(value for value in values if isinstance(value, _Tensor)))
        _mark_non_differentiable(ctx, program, results)
        return tuple(results)

    @staticmethod
    @hidden_from_dynamo
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        """Pull the cotangents back; with ``create_graph=True``, differentiably."""
        linear: Linearized = ctx.linear
        program = linear.program
        count = len(program.inputs)
        seen = tuple(i for i in program.smooth_outputs if cotangents[i] is not None)
        gradients: list[Any] = [None] * (count + 1)
        if not seen:
            return tuple(gradients)
        values = _saved_leaves(ctx)
        given = [cotangents[i] for i in seen]
        with x64_as(program.x64):
            if is_grad_enabled():
                found = call(program.vjp(linear.wrt, seen), [*values[:count], *given])
            else:
                residuals = [values[i] for i in linear.places]
                if ctx.arrays is not None:
                    residuals = list(map(_same_memory, residuals, ctx.arrays))
                    ctx.arrays = None  # torch alone decides how long its saved tensors live
                found = run(linear.pullback(seen), [*residuals, *given])
        for position, gradient in zip(linear.wrt, found, strict=True):
            gradients[position + 1] = gradient
        return tuple(gradients)


class _Transformed(torch.autograd.Function):
    """Reverse mode, forward mode and vmap, in any nesting."""

    @staticmethod
    @hidden_from_dynamo
    def forward(program: JaxProgram, *leaves: Any) -> tuple[Any, ...]:
        """Run the forward pass without residuals, because outer transforms could not see them."""
        return tuple(run(program, leaves))

    @staticmethod
    @hidden_from_dynamo
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the arguments. Every derivative starts from them."""
        program, *leaves = inputs
        ctx.set_materialize_grads(False)
        ctx.program = program
        ctx.others = [None if isinstance(leaf, _Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, _Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _mark_non_differentiable(ctx, program, output)

    @staticmethod
    @hidden_from_dynamo
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        """Call the program's vjp."""
        program: JaxProgram = ctx.program
        seen = tuple(i for i in program.smooth_outputs if cotangents[i] is not None)
        wrt = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        gradients: list[Any] = [None] * (len(program.inputs) + 1)
        if not seen:
            return tuple(gradients)
        with x64_as(program.x64):
            found = call(program.vjp(wrt, seen), [*_saved_leaves(ctx), *(cotangents[i] for i in seen)])
        for position, gradient in zip(wrt, found, strict=True):
            gradients[position + 1] = gradient
        return tuple(gradients)

    @staticmethod
    @hidden_from_dynamo
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Call the program's jvp."""
        program: JaxProgram = ctx.program
        wrt = tuple(i for i in program.smooth_inputs if tangents[i + 1] is not None)
        results: list[Any] = [None] * len(program.outputs)
        with x64_as(program.x64):
            found = call(program.jvp(wrt), [*_saved_leaves(ctx), *(tangents[i + 1] for i in wrt)])
        for position, tangent in zip(program.smooth_outputs, found, strict=True):
            results[position] = tangent
        return tuple(results)

    @staticmethod
    @hidden_from_dynamo
    def vmap(info: Any, in_dims: tuple[Any, ...], program: JaxProgram, *leaves: Any) -> tuple[Any, Any]:
        """Call the program's vmap."""
        axes = tuple(
            None if dim is None else dim % leaf.ndim for dim, leaf in zip(in_dims[1:], leaves, strict=True)
        )
        results = tuple(call(program.vmap(axes, info.batch_size), leaves))
        return results, tuple(0 if isinstance(result, _Tensor) else None for result in results)


def _same_memory(value: Any, array: Any) -> Any:
    """The array instead of the saved tensor, unless torch has moved the tensor's memory since."""
    if isinstance(value, _Tensor) and value.data_ptr() != array.unsafe_buffer_pointer():
        return value
    return array


def _saved_leaves(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if other is None else other for other in ctx.others]


def _mark_non_differentiable(ctx: Any, program: JaxProgram, results: Sequence[Any]) -> None:
    if len(program.smooth_outputs) < len(results):
        smooth = set(program.smooth_outputs)
        ctx.mark_non_differentiable(
            *(r for i, r in enumerate(results) if i not in smooth and isinstance(r, _Tensor))
        )
