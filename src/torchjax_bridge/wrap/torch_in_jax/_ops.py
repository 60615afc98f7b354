"""What the primitive can run: a frozen operation on tensors, with JAX's view of its operands and results.

Owns the four kinds: `Apply` (the function), `Save` (the function with its residuals), `LinearMap` (its
Jacobian, or the transpose of it, at given residuals) and `Vmapped` (any of these over one more axis); and
how each tensor is carried by a JAX array (`Encoding`), with x64 on or off. Which operation follows from which
under a transform is in ``_primitive``. Refuses outputs that JAX cannot hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

from ._encoding import Encoding
from ._graph import Graph, NeedsValues
from ._program import Residuals, TorchProgram
from ._vmap import vmap_graph

__all__ = ["Apply", "LinearMap", "Op", "Save", "Vmapped"]

_Run = Callable[..., Sequence[torch.Tensor]]


class Op:
    """One operation: what goes in and out, and how to run it. Compared by identity.

    Attributes:
        ins: One port an operand.
        outs: One port a result.
        linear: The first operand in which it is linear, as it is in all from there; past the last if in none.
        residual_outs: Results from here on are residuals, which carry no tangent.
    """

    ins: tuple[Encoding, ...]
    outs: tuple[Encoding, ...]
    device: torch.device
    linear: int
    residual_outs: int

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, made once for ``key`` and kept as long as this operation."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def vmapped(self, dims: tuple[int | None, ...], size: int) -> "Vmapped":
        return self.once(("vmap", dims, size), lambda: Vmapped(self, dims, size))

    def graph(self) -> Graph | None:
        """The whole operation as a graph of all its operands; None where it runs as Python."""
        raise NotImplementedError

    def run(self, device: torch.device) -> _Run:
        """The function of the operands `used` that runs the operation on ``device``."""
        graph = self.graph()
        if graph is None:
            return self.python()
        needed = graph.cut([graph.inputs[i] for i in self.used], graph.outputs)
        return needed.on(device)

    def python(self) -> _Run:
        """The function of all operands, where there is no graph."""
        raise NotImplementedError

    @property
    def used(self) -> tuple[int, ...]:
        """The operands that `run` takes; the others only matter to further derivatives."""
        return self.once("used", self._used)

    @property
    def lends(self) -> bool:
        """Whether user code sees the operands' memory, and might keep it."""
        return self.graph() is None

    @property
    def closes_over(self) -> bool:
        """Whether it may read tensors that are no operands."""
        graph = self.graph()
        return (
            self.lends or graph is None or any(isinstance(c, torch.Tensor) for c in graph.constants.values())
        )

    def _used(self) -> tuple[int, ...]:
        graph = self.graph()
        if graph is None:
            return tuple(range(len(self.ins)))
        read = set(graph.outputs) | {p for node in graph.nodes.nodes for p in node.all_input_nodes}
        return tuple(i for i, node in enumerate(graph.inputs) if node in read)


class Apply(Op):
    """The function itself. User code runs as it is, unless it takes noise (then its graph runs)."""

    def __init__(
        self,
        program: TorchProgram,
        outs: Sequence[Encoding],
        call: Callable[..., Sequence[torch.Tensor]] | None,
    ) -> None:
        super().__init__()
        self.program = program
        self.device = program.device
        self.ins = tuple(map(Encoding, program.ins))
        self.outs = tuple(outs)
        self.linear = len(self.ins)
        self.residual_outs = len(self.outs)
        self._call = call

    @property
    def lends(self) -> bool:
        return self._call is not None or super().lends

    def _used(self) -> tuple[int, ...]:
        return tuple(range(len(self.ins))) if self._call is not None else super()._used()

    def graph(self) -> Graph | None:
        try:
            return self.program.graph()
        except NeedsValues:
            return None

    def run(self, device: torch.device) -> _Run:
        return super().run(device) if self._call is None else self._call

    def python(self) -> _Run:
        return self._call or self.program.fn

    def saving(self, wrt: tuple[int, ...]) -> "Save":
        return self.once(("save", wrt), lambda: Save(self, wrt))


class Save(Op):
    """The function, returning also what its derivative in the inputs ``wrt`` needs."""

    def __init__(self, apply: Apply, wrt: tuple[int, ...]) -> None:
        super().__init__()
        self.apply = apply
        self.wrt = wrt
        self.device = apply.device
        self.ins = apply.ins
        self.linear = apply.linear
        self.residuals: Residuals | None = _differentiable(apply.program, wrt)
        extra = self.residuals.extra if self.residuals else ()
        self.outs = (*apply.outs, *map(Encoding.of_residual, extra))
        self.residual_outs = len(apply.outs)

    @property
    def lends(self) -> bool:
        return self.residuals is None and self.apply.lends

    def _used(self) -> tuple[int, ...]:
        return super()._used() if self.residuals else self.apply.used

    def graph(self) -> Graph | None:
        return self.residuals.forward if self.residuals else self.apply.graph()

    def run(self, device: torch.device) -> _Run:
        return super().run(device) if self.residuals else self.apply.run(device)

    def python(self) -> _Run:
        return self.apply.python()

    def linear_map(self, ins: tuple[int, ...], transposed: bool) -> "LinearMap":
        return self.once(("linear", ins, transposed), lambda: LinearMap(self, ins, transposed))

    def saved_from(self, results: Sequence[Any]) -> list[Any]:
        """The operands that `LinearMap` takes after the inputs, from the results of this operation."""
        if self.residuals is None:
            return []
        return [results[i if kind == "out" else self.residual_outs + i] for kind, i in self.residuals.saved]


class LinearMap(Op):
    """``(*inputs, *saved, *tangents of ins) -> tangents of the float outputs``; or transposed, cotangents back.

    By its meaning a function of inputs and tangents alone: ``saved`` are values that the inputs determine.
    """

    def __init__(self, save: Save, ins: tuple[int, ...], transposed: bool) -> None:
        super().__init__()
        program = save.apply.program
        self.save = save
        self.wrt = ins
        self.transposed = transposed
        self.device = save.device
        saved: list[Encoding] = []
        if save.residuals:
            ports = {"out": save.outs[: save.residual_outs], "extra": save.outs[save.residual_outs :]}
            saved = [ports[kind][i] for kind, i in save.residuals.saved]
        here = [Encoding(program.ins[i]) for i in ins]
        there = [Encoding(program.outs[i]) for i in program.live]
        self.ins = (*save.ins, *saved, *(there if transposed else here))
        self.outs = tuple(here if transposed else there)
        self.linear = len(save.ins) + len(saved)
        self.residual_outs = len(self.outs)

    @property
    def program(self) -> TorchProgram:
        """This map as a function of inputs and tangents, for further derivatives."""
        base = self.save.apply.program
        return base.pullback(self.wrt) if self.transposed else base.pushforward(self.wrt)

    def as_apply(self) -> Apply:
        return self.once("apply", lambda: Apply(self.program, self.outs, None))

    def other(self) -> "LinearMap":
        """The transposed map."""
        return self.save.linear_map(self.wrt, not self.transposed)

    def graph(self) -> Graph | None:
        # Not before it runs: most pushforwards are only transposed.
        return self.once("graph", self._find_graph)

    def _find_graph(self) -> Graph | None:
        residuals = self.save.residuals
        try:
            if residuals:
                try:
                    return residuals.pull(self.wrt) if self.transposed else residuals.push(self.wrt)
                except (RuntimeError, NotImplementedError):
                    if self.transposed:
                        raise
            return _with_unused(self.program.graph(), len(self.save.ins), self.ins)
        except NeedsValues:
            return None
        except (RuntimeError, NotImplementedError) as err:
            _explain(err)
            raise

    def python(self) -> _Run:
        n, first = len(self.save.ins), self.linear
        fn = self.program.fn
        return lambda *tensors: fn(*tensors[:n], *tensors[first:])


class Vmapped(Op):
    """An operation over one more axis: of each operand where ``dims`` says, first in every result."""

    def __init__(self, base: Op, dims: tuple[int | None, ...], size: int) -> None:
        super().__init__()
        self.base = base
        self.dims = dims
        self.size = size
        self.device = base.device
        self.ins = tuple(port.batched(dim, size) for port, dim in zip(base.ins, dims, strict=True))
        self.out_dims = self._out_dims()
        self.outs = tuple(port.batched(dim, size) for port, dim in zip(base.outs, self.out_dims, strict=True))
        self.linear = base.linear
        self.residual_outs = base.residual_outs

    def _out_dims(self) -> tuple[int | None, ...]:
        """First, but for residuals that no mapped operand reaches: those all lanes share."""
        base = self.base
        graph = base.graph() if base.residual_outs < len(base.outs) else None
        if graph is None:
            return tuple(0 for _ in base.outs)
        mapped = [node for node, dim in zip(graph.inputs, self.dims, strict=True) if dim is not None]
        reached = graph.reachable(mapped)
        return tuple(
            0 if i < base.residual_outs or node in reached else None for i, node in enumerate(graph.outputs)
        )

    def graph(self) -> Graph | None:
        return self.once("graph", self._find_graph)

    def _find_graph(self) -> Graph | None:
        graph = self.base.graph() if self.size else None
        if graph is None or graph.looks_at_strides:
            return None
        try:
            return vmap_graph(graph, self.dims, self.out_dims, [port.spec for port in self.ins])
        except (NeedsValues, RuntimeError):  # an operator that torch cannot batch; its lanes run one by one
            return None

    def python(self) -> _Run:
        """One lane after the other, for what cannot be traced or batched."""
        one, used = self.base.run(self.device), self.base.used

        def lane(tensors: Sequence[torch.Tensor], i: int) -> Sequence[torch.Tensor]:
            picked = [(tensors[k], self.dims[k]) for k in used]
            # Row-major, as in the trace: code that looks at strides sees what it saw there.
            return one(*(x if dim is None else x.select(dim, i).contiguous() for x, dim in picked))

        def loop(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            if not self.size:
                specs = [port.spec for port in self.outs]
                return [torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
            lanes = zip(*(lane(tensors, i) for i in range(self.size)), strict=True)
            return [
                results[0] if dim is None else torch.stack(results)
                for results, dim in zip(lanes, self.out_dims, strict=True)
            ]

        return loop


# --- steps ---------------------------------------------------------------------------------------------


def _with_unused(graph: Graph, fixed: int, ports: Sequence[Encoding]) -> Graph:
    """The graph of operands like ``ports``, of which it does not read those that follow its first ``fixed``."""
    unused = ports[fixed : fixed + len(ports) - len(graph.inputs)]
    if not unused:
        return graph
    wider = graph.cut(graph.inputs, graph.outputs)  # a graph is shared; this one is not, yet
    place = wider.inputs[fixed - 1]
    for i, port in enumerate(unused):
        with wider.nodes.inserting_after(place):
            place = wider.nodes.placeholder(f"unused{i}")
        place.meta["val"] = torch.empty(port.spec.shape, dtype=port.spec.dtype, device="meta")
    return wider


def _differentiable(program: TorchProgram, wrt: tuple[int, ...]) -> Residuals | None:
    try:
        return program.residuals(wrt)
    except (RuntimeError, NotImplementedError) as err:
        _explain(err)
        raise


def _explain(err: Exception) -> None:
    """Raise a better error, if torch says that a derivative is missing."""
    if not isinstance(err, TransformError) and any(
        word in str(err) for word in ("derivative", "differentiable", "backward")
    ):
        raise TransformError(
            f"torch cannot differentiate this function to the order asked for: {err}. Use operators that "
            "have a derivative, give the function one with torch.autograd.Function, or differentiate in other "
            "arguments only (in the params of a module, not in its buffers)."
        ) from err
