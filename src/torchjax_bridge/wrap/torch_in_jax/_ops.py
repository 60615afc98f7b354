"""The operations that the primitive runs: functions of tensors, with the encoding of every operand.

There are four. `Apply` is the function; `Save` also returns its residuals; `LinearMap` is its Jacobian, or
the transpose of that, at given residuals; `Vmapped` is any of these over one more axis. The rules in
``_primitive`` turn one operation into another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchjax_bridge.errors import TransformError

from ._encoding import Encoding
from ._graph import Graph
from ._program import TorchProgram
from ._residuals import Residuals
from ._trace import NeedsValues
from ._vmap import vmap_graph

__all__ = ["Apply", "LinearMap", "Op", "Save", "Vmapped"]

_Run = Callable[..., Sequence[torch.Tensor]]


class Op:
    """One operation: what goes in and out, and how to run it. Compared by identity.

    Attributes:
        ins: The encoding of each operand.
        outs: The encoding of each result.
        linear: It is linear in the operands from this position on; past the last if it is linear in none.
        residual_outs: The results from this position on are residuals, which have no tangent.
    """

    ins: tuple[Encoding, ...]
    outs: tuple[Encoding, ...]
    device: torch.device
    linear: int
    residual_outs: int

    def __init__(self) -> None:
        self._memo: dict[Any, Any] = {}

    def memoized(self, key: Any, build: Callable[[], Any]) -> Any:
        """``build()``, called once for ``key``; the result lives as long as this operation."""
        if key not in self._memo:
            self._memo[key] = build()
        return self._memo[key]

    def vmapped(self, dims: tuple[int | None, ...], size: int) -> "Vmapped":
        return self.memoized(("vmap", dims, size), lambda: Vmapped(self, dims, size))

    def graph(self) -> Graph | None:
        """The operation as a graph of all its operands; None where it runs as Python."""
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
        """The operands that `run` takes. The others matter only to further derivatives."""
        return self.memoized("used", self._used)

    @property
    def runs_user_code(self) -> bool:
        """Whether user code runs on the operands' memory, and might keep it."""
        return self.graph() is None

    @property
    def closes_over(self) -> bool:
        """Whether it may read tensors that are not operands."""
        graph = self.graph()
        return (
            self.runs_user_code
            or graph is None
            or any(isinstance(c, torch.Tensor) for c in graph.constants.values())
        )

    def _used(self) -> tuple[int, ...]:
        graph = self.graph()
        if graph is None:
            return tuple(range(len(self.ins)))
        read = set(graph.outputs) | {p for node in graph.nodes.nodes for p in node.all_input_nodes}
        return tuple(i for i, node in enumerate(graph.inputs) if node in read)


class Apply(Op):
    """The function itself. Its user code runs as Python; code that draws random numbers runs as its graph."""

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
    def runs_user_code(self) -> bool:
        return self._call is not None or super().runs_user_code

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

    def with_residuals(self, wrt: tuple[int, ...]) -> "Save":
        return self.memoized(("save", wrt), lambda: Save(self, wrt))


class Save(Op):
    """The function, which also returns the residuals of its derivative in the inputs ``wrt``."""

    def __init__(self, apply: Apply, wrt: tuple[int, ...]) -> None:
        super().__init__()
        self.apply = apply
        self.wrt = wrt
        self.device = apply.device
        self.ins = apply.ins
        self.linear = apply.linear
        self.residuals: Residuals | None = _residuals(apply.program, wrt)
        extra = self.residuals.extra if self.residuals else ()
        self.outs = (*apply.outs, *map(Encoding.of_residual, extra))
        self.residual_outs = len(apply.outs)

    @property
    def runs_user_code(self) -> bool:
        return self.residuals is None and self.apply.runs_user_code

    def _used(self) -> tuple[int, ...]:
        return super()._used() if self.residuals else self.apply.used

    def graph(self) -> Graph | None:
        return self.residuals.forward if self.residuals else self.apply.graph()

    def run(self, device: torch.device) -> _Run:
        return super().run(device) if self.residuals else self.apply.run(device)

    def python(self) -> _Run:
        return self.apply.python()

    def linear_map(self, ins: tuple[int, ...], transposed: bool) -> "LinearMap":
        return self.memoized(("linear", ins, transposed), lambda: LinearMap(self, ins, transposed))

    def saved_values(self, results: Sequence[Any]) -> list[Any]:
        """The operands that `LinearMap` takes after the inputs, out of the results of this operation."""
        if self.residuals is None:
            return []
        start = {"out": 0, "extra": self.residual_outs}
        return [results[start[group] + i] for group, i in self.residuals.saved]


class LinearMap(Op):
    """``(*inputs, *saved, *tangents of ins) -> tangents of the float outputs``, or the transpose of that.

    The transpose takes cotangents of the float outputs to cotangents of ``ins``. The inputs determine the values
    ``saved``, so mathematically the map is a function of inputs and tangents alone.
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
            groups = {"out": save.outs[: save.residual_outs], "extra": save.outs[save.residual_outs :]}
            saved = [groups[group][i] for group, i in save.residuals.saved]
        domain = [Encoding(program.ins[i]) for i in ins]
        range_ = [Encoding(program.outs[i]) for i in program.smooth_outs]
        self.ins = (*save.ins, *saved, *(range_ if transposed else domain))
        self.outs = tuple(domain if transposed else range_)
        self.linear = len(save.ins) + len(saved)
        self.residual_outs = len(self.outs)

    @property
    def program(self) -> TorchProgram:
        """This map as a function of inputs and tangents alone, for further derivatives."""
        base = self.save.apply.program
        return base.pullback(self.wrt) if self.transposed else base.pushforward(self.wrt)

    def as_apply(self) -> Apply:
        return self.memoized("apply", lambda: Apply(self.program, self.outs, None))

    def transpose(self) -> "LinearMap":
        """The transposed map."""
        return self.save.linear_map(self.wrt, not self.transposed)

    def graph(self) -> Graph | None:
        # Traced when it first runs, because most pushforwards are only transposed.
        return self.memoized("graph", self._find_graph)

    def _find_graph(self) -> Graph | None:
        residuals = self.save.residuals
        try:
            if residuals:
                try:
                    return (residuals.pullback if self.transposed else residuals.pushforward)(self.wrt)
                except (RuntimeError, NotImplementedError):
                    if self.transposed:
                        raise
            return _with_unused(self.program.graph(), len(self.save.ins), self.ins)
        except NeedsValues:
            return None
        except (RuntimeError, NotImplementedError) as err:
            _raise_missing_derivative(err)
            raise

    def python(self) -> _Run:
        n, first = len(self.save.ins), self.linear
        fn = self.program.fn
        return lambda *tensors: fn(*tensors[:n], *tensors[first:])


class Vmapped(Op):
    """An operation over one more axis: axis ``dims[i]`` of operand ``i``, and the first of every result."""

    def __init__(self, base: Op, dims: tuple[int | None, ...], size: int) -> None:
        super().__init__()
        self.base = base
        self.dims = dims
        self.size = size
        self.device = base.device
        self.ins = tuple(encoding.batched(dim, size) for encoding, dim in zip(base.ins, dims, strict=True))
        self.out_dims = self._out_dims()
        self.outs = tuple(
            encoding.batched(dim, size) for encoding, dim in zip(base.outs, self.out_dims, strict=True)
        )
        self.linear = base.linear
        self.residual_outs = base.residual_outs

    def _out_dims(self) -> tuple[int | None, ...]:
        """The first axis; none for a residual that depends on no mapped operand, because all lanes share it."""
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
        return self.memoized("graph", self._find_graph)

    def _find_graph(self) -> Graph | None:
        graph = self.base.graph() if self.size else None
        if graph is None or graph.reads_strides:
            return None
        try:
            return vmap_graph(graph, self.dims, self.out_dims, [encoding.spec for encoding in self.ins])
        except (NeedsValues, RuntimeError):  # torch cannot batch an operator: its lanes run one by one
            return None

    def python(self) -> _Run:
        """One lane after the other, for code that cannot be traced or batched."""
        run, used = self.base.run(self.device), self.base.used

        def lane(tensors: Sequence[torch.Tensor], i: int) -> Sequence[torch.Tensor]:
            picked = [(tensors[k], self.dims[k]) for k in used]
            # Row-major, as in the trace: code that reads strides reads the same ones.
            return run(*(x if dim is None else x.select(dim, i).contiguous() for x, dim in picked))

        def loop(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            if not self.size:
                specs = [encoding.spec for encoding in self.outs]
                return [torch.zeros(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
            lanes = zip(*(lane(tensors, i) for i in range(self.size)), strict=True)
            return [
                results[0] if dim is None else torch.stack(results)
                for results, dim in zip(lanes, self.out_dims, strict=True)
            ]

        return loop


# --- steps ---------------------------------------------------------------------------------------------


def _with_unused(graph: Graph, fixed: int, ins: Sequence[Encoding]) -> Graph:
    """The graph with unused inputs after its first ``fixed``, so that it takes operands like ``ins``."""
    unused = ins[fixed : fixed + len(ins) - len(graph.inputs)]
    if not unused:
        return graph
    wider = graph.cut(graph.inputs, graph.outputs)  # a copy, because graphs are shared
    place = wider.inputs[fixed - 1]
    for i, encoding in enumerate(unused):
        with wider.nodes.inserting_after(place):
            place = wider.nodes.placeholder(f"unused{i}")
        place.meta["val"] = torch.empty(encoding.spec.shape, dtype=encoding.spec.dtype, device="meta")
    return wider


def _residuals(program: TorchProgram, wrt: tuple[int, ...]) -> Residuals | None:
    try:
        return Residuals.of(program, wrt)
    except (RuntimeError, NotImplementedError) as err:
        _raise_missing_derivative(err)
        raise


def _raise_missing_derivative(err: Exception) -> None:
    """Raise a better error if torch says that a derivative is missing."""
    if not isinstance(err, TransformError) and any(
        word in str(err) for word in ("derivative", "differentiable", "backward")
    ):
        raise TransformError(
            f"torch cannot differentiate this function to the order asked for: {err}. Use operators that "
            "have a derivative, give the function one with torch.autograd.Function, or differentiate in other "
            "arguments only (in the params of a module, not in its buffers)."
        ) from err
