"""A torch function of plain tensors, and its derivatives as functions of the same kind.

A `TorchProgram` is a Python callable from tensors to tensors. Its *pullback* (vector-Jacobian product) and
its *pushforward* (Jacobian-vector product) are programs again, made by reverse-mode autograd alone. The
pullback is linear in its cotangents, so forward mode differentiates it once more, in those cotangents
(https://j-towns.github.io/2017/06/12/A-new-trick.html). So ``no_grad``, ``detach`` and every
``autograd.Function`` mean the same in both modes and at every order. torch's forward AD is never entered: it
is global to the process, and not safe from several threads.

Knows nothing of JAX but its gradient convention for complex numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._autograd import any_requires_grad, conj, gradients, run_with_graph, vjp
from ._backward import explaining_numpy, probes, refuse_wrong_pushforward
from ._graph import Graph, Spec
from ._random import check_no_draws
from ._trace import NeedsValues, is_fake, trace

__all__ = ["TorchProgram"]

_Tensors = Sequence[torch.Tensor]


class TorchProgram:
    """A pure function from tensors to tensors.

    Attributes:
        fn: Differentiable by torch's autograd; keeps its inputs as they are.
        ins: Shapes and dtypes of the inputs.
        outs: Shapes and dtypes of the outputs.
        traceable: Whether `graph` may be asked for.
        save: Whether residuals may cross to JAX. If not, the pullback runs the forward again.
        smooth_outs: Positions of the outputs with a float or complex dtype.
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
        self.smooth_outs = tuple(i for i, spec in enumerate(self.outs) if spec.differentiable)
        self._memo: dict[Any, Any] = {}

    def memoized(self, key: Any, build: Callable[[], Any]) -> Any:
        """``build()``, called once for ``key``; the result lives as long as this program."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def graph(self) -> Graph:
        """The graph of `fn`.

        Raises:
            NeedsValues: `fn` depends on values.
        """
        if not self.traceable:
            raise NeedsValues
        return self.memoized("graph", lambda: check_no_draws(trace(self.fn, self.ins, self.device)))

    def pullback(self, wrt: tuple[int, ...]) -> "TorchProgram":
        """``(*inputs, *cotangents of smooth_outs) -> cotangents of the inputs wrt``, by JAX's convention."""
        return self.memoized(("pullback", wrt), lambda: self._pullback(wrt))

    def pushforward(self, wrt: tuple[int, ...]) -> "TorchProgram":
        """``(*inputs, *tangents of the inputs wrt) -> tangents of smooth_outs``."""
        return self.memoized(("pushforward", wrt), lambda: self._pushforward(wrt))

    def _pullback(self, wrt: tuple[int, ...]) -> "TorchProgram":
        n = len(self.ins)

        def fn(*flat: torch.Tensor) -> _Tensors:
            _, grads = vjp(self.fn, flat[:n], [conj(ct) for ct in flat[n:]], wrt, self.smooth_outs)
            return [conj(grad) for grad in grads]

        return self._derived(
            fn, (*self.ins, *(self.outs[i] for i in self.smooth_outs)), [self.ins[i] for i in wrt]
        )

    def _pushforward(self, wrt: tuple[int, ...]) -> "TorchProgram":
        n = len(self.ins)

        def fn(*flat: torch.Tensor) -> _Tensors:
            inputs, tangents = flat[:n], flat[n:]
            with torch.enable_grad():
                zeros = [
                    torch.zeros(self.outs[i].shape, dtype=self.outs[i].dtype, device=self.device)
                    for i in self.smooth_outs
                ]
                cotangents = [zero.requires_grad_() for zero in zeros]
                primals, outputs = run_with_graph(self.fn, inputs, wrt)
                xs, ys = [primals[i] for i in wrt], [outputs[i] for i in self.smooth_outs]
                real = not any(map(is_fake, flat))
                with explaining_numpy():
                    grads = gradients(ys, xs, cotangents, keep=True)
                    # Code that runs as Python may leave torch; traced code cannot.
                    probe = probes(cotangents) if real else []
                    pulled, pulled_twice = [
                        gradients(ys, xs, [n * ct for ct in probe], True) if real else [] for n in (1, 2)
                    ]
                    pushed = gradients(grads, cotangents, tangents, keep=any_requires_grad(flat))
                if real:
                    refuse_wrong_pushforward(ys, probe, pulled, pulled_twice, tangents, pushed)
                return pushed

        outs = [self.outs[i] for i in self.smooth_outs]
        return self._derived(fn, (*self.ins, *(self.ins[i] for i in wrt)), outs)

    def _derived(
        self, fn: Callable[..., _Tensors], ins: Sequence[Spec], outs: Sequence[Spec]
    ) -> "TorchProgram":
        return TorchProgram(fn, ins, outs, self.device, traceable=self.traceable, save=self.save)
