"""A torch function of plain tensors, and its derivatives as functions of the same kind.

A `TorchProgram` is a Python callable from tensors to tensors. Its *pullback* (vector-Jacobian product) and its
*pushforward* (Jacobian-vector product) are Programs again, made by reverse-mode autograd alone: the
pushforward is the derivative of the pullback in its cotangents, with which it is linear
(https://j-towns.github.io/2017/06/12/A-new-trick.html). So ``no_grad``, ``detach`` and every
``autograd.Function`` mean the same in both modes and at every order, and torch's forward AD, which is
global to the process and not safe from several threads, is never entered.

`Residuals` is the split of a TorchProgram's joint graph: a forward graph that also returns the saved tensors,
and the two linear graphs that take them. Knows nothing of JAX but its gradient convention for complex
numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from ._backward import explaining_numpy, probes, refuse_untrue
from ._graph import Graph, NeedsValues, Spec, is_fake, is_view, trace
from ._random import without_draws

__all__ = ["Residuals", "TorchProgram"]

_Tensors = Sequence[torch.Tensor]


class TorchProgram:
    """A pure function from tensors to tensors.

    Attributes:
        fn: Differentiable by torch's autograd; keeps its inputs as they are.
        ins: Shapes and dtypes of the inputs.
        outs: Shapes and dtypes of the outputs.
        traceable: Whether `graph` may be asked for.
        save: Whether residuals may cross; otherwise the pullback runs the forward again.
    """

    def __init__(
        self,
        fn: Callable[..., _Tensors],
        ins: Sequence[Spec],
        outs: Sequence[Spec],
        device: torch.device,
        *,
        traceable: bool,
        save: bool,
    ) -> None:
        self.fn = fn
        self.ins = tuple(ins)
        self.outs = tuple(outs)
        self.device = device
        self.traceable = traceable
        self.save = save
        self.live = tuple(i for i, spec in enumerate(self.outs) if spec.differentiable)
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, made once for ``key`` and kept as long as this program."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def graph(self) -> Graph:
        """The graph of `fn`.

        Raises:
            NeedsValues: `fn` depends on values.
        """
        if not self.traceable:
            raise NeedsValues
        return self.once("graph", lambda: without_draws(trace(self.fn, self.ins, self.device)))

    def pullback(self, wrt: tuple[int, ...]) -> "TorchProgram":
        """``(*inputs, *cotangents of the float outputs) -> cotangents of the inputs wrt``, by JAX's convention."""
        return self.once(("pullback", wrt), lambda: self._pullback(wrt))

    def pushforward(self, wrt: tuple[int, ...]) -> "TorchProgram":
        """``(*inputs, *tangents of the inputs wrt) -> tangents of the float outputs``."""
        return self.once(("pushforward", wrt), lambda: self._pushforward(wrt))

    def residuals(self, wrt: tuple[int, ...]) -> "Residuals | None":
        """The split for these inputs; None where the forward must run again."""
        return self.once(("residuals", wrt), lambda: self._residuals(wrt))

    def _pullback(self, wrt: tuple[int, ...]) -> "TorchProgram":
        n = len(self.ins)

        def fn(*flat: torch.Tensor) -> _Tensors:
            _, grads = _vjp(self.fn, flat[:n], [_conj(ct) for ct in flat[n:]], wrt, self.live)
            return [_conj(grad) for grad in grads]

        return self._derived(fn, (*self.ins, *(self.outs[i] for i in self.live)), [self.ins[i] for i in wrt])

    def _pushforward(self, wrt: tuple[int, ...]) -> "TorchProgram":
        n = len(self.ins)

        def fn(*flat: torch.Tensor) -> _Tensors:
            inputs, tangents = flat[:n], flat[n:]
            with torch.enable_grad():
                zeros = [
                    torch.zeros(self.outs[i].shape, dtype=self.outs[i].dtype, device=self.device)
                    for i in self.live
                ]
                cotangents = [zero.requires_grad_() for zero in zeros]
                primals, outputs = _run(self.fn, inputs, wrt)
                xs, ys = [primals[i] for i in wrt], [outputs[i] for i in self.live]
                real = not any(map(is_fake, flat))
                with explaining_numpy():
                    grads = _grad(ys, xs, cotangents, keep=True)
                    # Code that runs as Python may leave torch, which no trace can.
                    some = probes(cotangents) if real else []
                    sent, twice = [
                        _grad(ys, xs, [n * ct for ct in some], True) if real else [] for n in (1, 2)
                    ]
                    pushed = _grad(grads, cotangents, tangents, keep=_tracked(flat))
                if real:
                    refuse_untrue(ys, some, sent, twice, tangents, pushed)
                return pushed

        outs = [self.outs[i] for i in self.live]
        return self._derived(fn, (*self.ins, *(self.ins[i] for i in wrt)), outs)

    def _derived(
        self, fn: Callable[..., _Tensors], ins: Sequence[Spec], outs: Sequence[Spec]
    ) -> "TorchProgram":
        return TorchProgram(fn, ins, outs, self.device, traceable=self.traceable, save=self.save)

    def _residuals(self, wrt: tuple[int, ...]) -> "Residuals | None":
        if not (self.traceable and self.save):
            return None
        try:
            return Residuals(self, wrt)
        except NeedsValues:
            return None


class Residuals:
    """A forward graph that returns what the backward needs, and the linear graphs that take it.

    Attributes:
        forward: ``inputs -> (*outputs, *extra)``.
        saved: What the linear graphs take besides the inputs: ``("out", i)`` is output ``i`` itself,
            ``("extra", k)`` the ``k``-th tensor that the forward returns after its outputs.
        extra: Shapes and dtypes of the extra tensors.
    """

    def __init__(self, program: TorchProgram, wrt: tuple[int, ...]) -> None:
        self.program = program
        self.wrt = wrt
        n, k, live = len(program.ins), len(program.outs), program.live

        def joint(*flat: torch.Tensor) -> _Tensors:
            outputs, grads = _vjp(program.fn, flat[:n], flat[n:], wrt, live)
            return [*outputs, *grads]

        specs = (*program.ins, *(program.outs[i] for i in live))
        whole = without_draws(trace(joint, specs, program.device))
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
        self._pull = whole.cut([*inputs, *saved, *cotangents], grads)
        self._saved_specs = [Spec.of(node.meta["val"]) for node in saved]
        self._complex = any(spec.dtype.is_complex for spec in specs)
        self._made: dict[Any, Graph] = {}

    def pull(self, ins: tuple[int, ...]) -> Graph:
        """``(*inputs, *saved, *cotangents) -> cotangents of the inputs ins``, by JAX's convention."""
        key = ("pull", ins)
        if key not in self._made:
            graph = self._pull
            if ins != self.wrt:
                outputs = graph.outputs
                graph = graph.cut(graph.inputs, [outputs[self.wrt.index(i)] for i in ins])
            self._made[key] = self._conjugated(graph) if self._complex else graph
        return self._made[key]

    def push(self, ins: tuple[int, ...]) -> Graph:
        """``(*inputs, *saved, *tangents of ins) -> tangents of the float outputs``."""
        key = ("push", ins)
        if key not in self._made:
            self._made[key] = self._pushing(ins)
        return self._made[key]

    def _pushing(self, ins: tuple[int, ...]) -> Graph:
        program = self.program
        fixed = [*program.ins, *self._saved_specs]
        live = [program.outs[i] for i in program.live]

        def fn(*flat: torch.Tensor) -> _Tensors:
            with torch.enable_grad():
                cotangents = [
                    torch.zeros(spec.shape, dtype=spec.dtype, device=program.device).requires_grad_()
                    for spec in live
                ]
                grads = self._pull(*flat[: len(fixed)], *cotangents)
                chosen = [grads[self.wrt.index(i)] for i in ins]
                return _grad(chosen, cotangents, flat[len(fixed) :], keep=False)

        return trace(fn, [*fixed, *(program.ins[i] for i in ins)], program.device)

    def _conjugated(self, graph: Graph) -> Graph:
        n = len(self.program.ins) + len(self.saved)
        cotangents = [self.program.outs[i] for i in self.program.live]

        def fn(*flat: torch.Tensor) -> _Tensors:
            return [_conj(grad) for grad in graph(*flat[:n], *map(_conj, flat[n:]))]

        return trace(fn, [*self.program.ins, *self._saved_specs, *cotangents], self.program.device)


# --- autograd ------------------------------------------------------------------------------------------


def _vjp(
    fn: Callable[..., _Tensors],
    inputs: _Tensors,
    cotangents: _Tensors,
    wrt: tuple[int, ...],
    live: tuple[int, ...],
) -> tuple[_Tensors, _Tensors]:
    """Outputs of ``fn`` and torch's gradients of the inputs ``wrt``; differentiable if an input is."""
    keep = _tracked((*inputs, *cotangents))
    primals, outputs = _run(fn, inputs, wrt)
    grads = _grad([outputs[i] for i in live], [primals[i] for i in wrt], cotangents, keep)
    return [output.detach() if not keep else output for output in outputs], grads


def _run(
    fn: Callable[..., _Tensors], inputs: _Tensors, wrt: tuple[int, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs to differentiate in, and the outputs of ``fn`` with their graph."""
    with torch.enable_grad(), explaining_numpy():
        # An input under an outer derivative stays connected to it; any other starts a graph of its own.
        primals = [
            (x.view_as(x) if x.requires_grad else x.detach().requires_grad_()) if i in wrt else x
            for i, x in enumerate(inputs)
        ]
        with _KeepInnerGraphs():
            return primals, list(fn(*primals))


def _grad(outputs: _Tensors, inputs: _Tensors, cotangents: _Tensors, keep: bool) -> list[torch.Tensor]:
    """``torch.autograd.grad`` where outputs may not depend on inputs: then the gradient is zero."""
    pairs = [(y, ct) for y, ct in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    ys, cts = zip(*pairs, strict=True)
    grads = torch.autograd.grad(ys, inputs, cts, create_graph=keep, allow_unused=True)
    return [torch.zeros_like(x) if g is None else _dense(g) for g, x in zip(grads, inputs, strict=True)]


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """JAX's gradients are dense, also those of an embedding that asks for sparse ones."""
    return grad if grad.layout is torch.strided else grad.to_dense()


def _tracked(tensors: _Tensors) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _conj(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj().resolve_conj() if tensor.is_complex() else tensor


class _KeepInnerGraphs(TorchFunctionMode):
    """Code that takes derivatives itself is differentiated through them, as JAX does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad or func is torch.Tensor.backward:
            kwargs = {**kwargs, "create_graph": True}
        return func(*args, **kwargs)


# --- what the backward needs -----------------------------------------------------------------------------


def _saved(
    whole: Graph, inputs: list[fx.Node], cotangents: list[fx.Node], grads: list[fx.Node]
) -> list[fx.Node]:
    """The nodes of the forward that the backward takes; views and constants are made again instead.

    Raises:
        NeedsValues: One of them is no tensor, or is looked at by its strides.
    """
    backward = whole.reachable(cotangents)
    given = set(inputs)
    saved: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def need(node: fx.Node) -> None:
        if node in seen or node in given or node.op == "get_attr":
            return
        seen.add(node)
        if is_view(node) or not node.all_input_nodes:
            for parent in node.all_input_nodes:
                need(parent)
            return
        saved.append(node)

    for node in whole.nodes.nodes:
        if node in backward and node.op != "output":
            for parent in node.all_input_nodes:
                if parent not in backward:
                    need(parent)
    for grad in grads:
        if grad not in backward:
            need(grad)
    if not all(isinstance(node.meta.get("val"), torch.Tensor) for node in saved):
        raise NeedsValues
    if whole.looks_at_strides and not all(node.meta["val"].is_contiguous() for node in saved):
        raise NeedsValues
    return saved
