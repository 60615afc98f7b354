"""The joint graph of a forward and its backward, cut in two.

One half is the forward, which also returns residuals; the other is the backward, which takes them. The values
on the cut are the residuals. They cross to JAX as arrays, so that a gradient runs the forward once. Owns the
choice of what is saved. The derivatives that need no residuals are in ``_program``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ._autograd import conj, gradients, vjp
from ._graph import Graph, Spec, is_view
from ._program import TorchProgram
from ._random import check_no_draws
from ._trace import NeedsValues, trace

__all__ = ["Residuals"]

_Tensors = Sequence[torch.Tensor]


class Residuals:
    """A forward graph that also returns residuals, and the linear graphs that take them.

    Attributes:
        forward: ``inputs -> (*outputs, *extra)``.
        saved: What the linear graphs take after the inputs. ``("out", i)`` is output ``i`` itself;
            ``("extra", k)`` is the ``k``-th tensor that the forward returns after its outputs.
        extra: Shapes and dtypes of the extra tensors.
    """

    @classmethod
    def of(cls, program: TorchProgram, wrt: tuple[int, ...]) -> "Residuals | None":
        """The residuals for the derivative in the inputs ``wrt``, found once and kept with the program.

        None where the backward must run the forward again.
        """
        return program.memoized(("residuals", wrt), lambda: cls._of(program, wrt))

    @classmethod
    def _of(cls, program: TorchProgram, wrt: tuple[int, ...]) -> "Residuals | None":
        if not (program.traceable and program.save):
            return None
        try:
            return cls(program, wrt)
        except NeedsValues:
            return None

    def __init__(self, program: TorchProgram, wrt: tuple[int, ...]) -> None:
        self.program = program
        self.wrt = wrt
        n, k, smooth_outs = len(program.ins), len(program.outs), program.smooth_outs

        def joint(*flat: torch.Tensor) -> _Tensors:
            outputs, grads = vjp(program.fn, flat[:n], flat[n:], wrt, smooth_outs)
            return [*outputs, *grads]

        specs = (*program.ins, *(program.outs[i] for i in smooth_outs))
        whole = check_no_draws(trace(joint, specs, program.device))
        inputs, cotangents = whole.inputs[:n], whole.inputs[n:]
        outputs, grads = whole.outputs[:k], whole.outputs[k:]
        saved = _saved(whole, inputs, cotangents, grads)

        out_of = {node: i for i, node in reversed(list(enumerate(outputs))) if node not in inputs}
        extra = [node for node in saved if node not in out_of]
        self.saved = tuple(
            ("out", out_of[node]) if node in out_of else ("extra", extra.index(node)) for node in saved
        )
        self.extra = tuple(Spec.of(node.meta["val"]) for node in extra)
        self.forward = whole.cut(inputs, [*outputs, *extra])
        self._joint_pullback = whole.cut([*inputs, *saved, *cotangents], grads)
        self._saved_specs = [Spec.of(node.meta["val"]) for node in saved]
        self._complex = any(spec.dtype.is_complex for spec in specs)
        self._memo: dict[Any, Graph] = {}

    def pullback(self, ins: tuple[int, ...]) -> Graph:
        """``(*inputs, *saved, *cotangents) -> cotangents of the inputs ins``, by JAX's convention."""
        key = ("pullback", ins)
        if key not in self._memo:
            graph = self._joint_pullback
            if ins != self.wrt:
                outputs = graph.outputs
                graph = graph.cut(graph.inputs, [outputs[self.wrt.index(i)] for i in ins])
            self._memo[key] = self._conjugated(graph) if self._complex else graph
        return self._memo[key]

    def pushforward(self, ins: tuple[int, ...]) -> Graph:
        """``(*inputs, *saved, *tangents of ins) -> tangents of the program's smooth_outs``."""
        key = ("pushforward", ins)
        if key not in self._memo:
            self._memo[key] = self._pushforward(ins)
        return self._memo[key]

    def _pushforward(self, ins: tuple[int, ...]) -> Graph:
        program = self.program
        fixed = [*program.ins, *self._saved_specs]
        specs = [program.outs[i] for i in program.smooth_outs]

        def fn(*flat: torch.Tensor) -> _Tensors:
            with torch.enable_grad():
                cotangents = [
                    torch.zeros(spec.shape, dtype=spec.dtype, device=program.device).requires_grad_()
                    for spec in specs
                ]
                grads = self._joint_pullback(*flat[: len(fixed)], *cotangents)
                chosen = [grads[self.wrt.index(i)] for i in ins]
                return gradients(chosen, cotangents, flat[len(fixed) :], keep=False)

        return trace(fn, [*fixed, *(program.ins[i] for i in ins)], program.device)

    def _conjugated(self, graph: Graph) -> Graph:
        n = len(self.program.ins) + len(self.saved)
        cotangents = [self.program.outs[i] for i in self.program.smooth_outs]

        def fn(*flat: torch.Tensor) -> _Tensors:
            return [conj(grad) for grad in graph(*flat[:n], *map(conj, flat[n:]))]

        return trace(fn, [*self.program.ins, *self._saved_specs, *cotangents], self.program.device)


def _saved(
    whole: Graph, inputs: list[fx.Node], cotangents: list[fx.Node], grads: list[fx.Node]
) -> list[fx.Node]:
    """The nodes of the forward that the backward takes. Views and constants are computed again instead.

    Raises:
        NeedsValues: One of them is no tensor, or an operator reads it by strides that it will not have.
    """
    backward = whole.reachable(cotangents)
    given = set(inputs)
    saved: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def save(node: fx.Node) -> None:
        if node in seen or node in given or node.op == "get_attr":
            return
        seen.add(node)
        if is_view(node) or not node.all_input_nodes:
            for parent in node.all_input_nodes:
                save(parent)
            return
        saved.append(node)

    for node in whole.nodes.nodes:
        if node in backward and node.op != "output":
            for parent in node.all_input_nodes:
                if parent not in backward:
                    save(parent)
    for grad in grads:
        if grad not in backward:
            save(grad)
    if not all(isinstance(node.meta.get("val"), torch.Tensor) for node in saved):
        raise NeedsValues
    if whole.reads_strides and not all(node.meta["val"].is_contiguous() for node in saved):
        raise NeedsValues
    return saved
