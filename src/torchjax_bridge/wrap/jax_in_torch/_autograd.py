"""A program called on tensors, under every transform that torch has in eager mode.

Three roads, from the plainest to the most general, and `call` picks the first that serves:

* nothing is differentiated: run the compiled forward pass;
* reverse mode: `_Reverse`, whose forward pass is compiled together with its residuals, and whose backward
  pass is the compiled pullback of them;
* ``torch.func`` or forward AD: `_Transformed`, whose backward, jvp and vmap call a derived program.

Wherever a derivative must itself be differentiable, it is `call` of a derived program, so the three roads
are closed under each other and no depth is built in. Owns what is saved for a derivative;
how a program runs is in ``_run``, and what it computes in ``_program``.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .._settings import x64_as
from ._linearized import Linearized
from ._program import JaxProgram
from ._run import run, run_keeping
from ._state import dual_level_active, functorch_active, saving_hooks_active, unseen

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
    @unseen
    def forward(ctx: Any, program: JaxProgram, *leaves: Any) -> tuple[Any, ...]:
        """Run the forward pass and save its residuals where torch can see them."""
        ctx.set_materialize_grads(False)
        wrt = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        linear = Linearized.of(program, wrt)
        everything, arrays = run_keeping(linear.forward, leaves)
        count = len(program.outputs)
        results, residuals = everything[:count], everything[count:]
        ctx.linear = program.origin.pin(linear, linear) if is_compiling() else linear
        # The same memory as JAX sees it, which saves lending it again; not where hooks move it elsewhere.
        ctx.arrays = None
        if arrays is not None and not saving_hooks_active():
            ctx.arrays = [arrays[i] for i in linear.array_places]
        # Tensors are saved by torch, which checks that nobody writes to them; the rest is immutable.
        values = [*leaves, *(results[i] for i in linear.kept), *residuals]
        ctx.others = [None if isinstance(value, _Tensor) else value for value in values]
        ctx.save_for_backward(*(value for value in values if isinstance(value, _Tensor)))
        _mark(ctx, program, results)
        return tuple(results)

    @staticmethod
    @unseen
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        """Pull the cotangents back; differentiably where torch asks for that (``create_graph=True``)."""
        linear: Linearized = ctx.linear
        program = linear.program
        count = len(program.inputs)
        seen = tuple(i for i in program.smooth_outputs if cotangents[i] is not None)
        gradients: list[Any] = [None] * (count + 1)
        if not seen:
            return tuple(gradients)
        values = _unpack(ctx)
        given = [cotangents[i] for i in seen]
        with x64_as(program.x64):
            if is_grad_enabled():
                found = call(program.vjp(linear.wrt, seen), [*values[:count], *given])
            else:
                residuals = [values[i] for i in linear.places]
                if ctx.arrays is not None:
                    residuals = list(map(_same_memory, residuals, ctx.arrays))
                    ctx.arrays = (
                        None  # torch frees what it saved after this pass, or keeps it without our help
                    )
                found = run(linear.pullback(seen), [*residuals, *given])
        for position, gradient in zip(linear.wrt, found, strict=True):
            gradients[position + 1] = gradient
        return tuple(gradients)


class _Transformed(torch.autograd.Function):
    """Reverse mode, forward mode and vmap, in any nesting."""

    @staticmethod
    @unseen
    def forward(program: JaxProgram, *leaves: Any) -> tuple[Any, ...]:
        """Run the forward pass; no residuals, since a transform above this one could not see them."""
        return tuple(run(program, leaves))

    @staticmethod
    @unseen
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the arguments, from which every derivative is computed anew."""
        program, *leaves = inputs
        ctx.set_materialize_grads(False)
        ctx.program = program
        ctx.others = [None if isinstance(leaf, _Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, _Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        _mark(ctx, program, output)

    @staticmethod
    @unseen
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        """Call the program's vjp."""
        program: JaxProgram = ctx.program
        seen = tuple(i for i in program.smooth_outputs if cotangents[i] is not None)
        wrt = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        gradients: list[Any] = [None] * (len(program.inputs) + 1)
        if not seen:
            return tuple(gradients)
        with x64_as(program.x64):
            found = call(program.vjp(wrt, seen), [*_unpack(ctx), *(cotangents[i] for i in seen)])
        for position, gradient in zip(wrt, found, strict=True):
            gradients[position + 1] = gradient
        return tuple(gradients)

    @staticmethod
    @unseen
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        """Call the program's jvp."""
        program: JaxProgram = ctx.program
        wrt = tuple(i for i in program.smooth_inputs if tangents[i + 1] is not None)
        results: list[Any] = [None] * len(program.outputs)
        with x64_as(program.x64):
            found = call(program.jvp(wrt), [*_unpack(ctx), *(tangents[i + 1] for i in wrt)])
        for position, tangent in zip(program.smooth_outputs, found, strict=True):
            results[position] = tangent
        return tuple(results)

    @staticmethod
    @unseen
    def vmap(info: Any, in_dims: tuple[Any, ...], program: JaxProgram, *leaves: Any) -> tuple[Any, Any]:
        """Call the program's vmap."""
        axes = tuple(
            None if dim is None else dim % leaf.ndim for dim, leaf in zip(in_dims[1:], leaves, strict=True)
        )
        results = tuple(call(program.vmap(axes, info.batch_size), leaves))
        return results, tuple(0 if isinstance(result, _Tensor) else None for result in results)


def _same_memory(value: Any, array: Any) -> Any:
    """The array in the place of the saved tensor, unless torch has moved the tensor's memory meanwhile."""
    if isinstance(value, _Tensor) and value.data_ptr() != array.unsafe_buffer_pointer():
        return value
    return array


def _unpack(ctx: Any) -> list[Any]:
    saved = iter(ctx.saved_tensors)
    return [next(saved) if other is None else other for other in ctx.others]


def _mark(ctx: Any, program: JaxProgram, results: Sequence[Any]) -> None:
    if len(program.smooth_outputs) < len(results):
        smooth = set(program.smooth_outputs)
        ctx.mark_non_differentiable(
            *(r for i, r in enumerate(results) if i not in smooth and isinstance(r, _Tensor))
        )
