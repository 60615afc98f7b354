"""What the primitive can run: a frozen operation on tensors, with JAX's view of its operands and results.

Owns the four kinds: `Apply` (the function), `Save` (the function with its residuals), `Linear` (its
Jacobian, or the transpose of it, at given residuals) and `Vmapped` (any of these over one more axis); and
how each tensor is carried by a JAX array (`Port`), with x64 on or off. Which operation follows from which
under a transform is in ``_jax_primitive``. Refuses outputs that JAX cannot hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError, NarrowingError, OutputError, TransformError
from torchjax_bridge.exchange import jax_dtype

from ._jax_graph import Graph, NeedsValues, Spec
from ._jax_program import Program, Residuals
from ._jax_vmap import vmap_graph
from ._settings import x64

__all__ = ["Apply", "Linear", "Op", "Port", "Save", "Vmapped"]

_Run = Callable[..., Sequence[torch.Tensor]]

_NARROW = {torch.int64: torch.int32, torch.uint64: torch.uint32}
_WIDE = (*_NARROW, torch.float64, torch.complex128)


@dataclass(frozen=True, slots=True)
class Port:
    """How one tensor is carried by a JAX array."""

    spec: Spec
    carry: str = "plain"
    """``"plain"``: as it is. ``"narrow"``: a 64-bit integer in 32 bits, checked when it is written. ``"bits"``:
    the 32-bit words of a 64-bit value on a new last axis, for residuals with x64 off."""
    name: str = ""

    @classmethod
    def of_output(cls, spec: Spec, name: str) -> "Port":
        """For a result that the caller sees.

        Raises:
            DtypeError: JAX has no such dtype, or not with x64 off.
        """
        if spec.dtype in _WIDE and not x64():
            if spec.dtype not in _NARROW:
                half = "torch.float32" if spec.dtype is torch.float64 else "torch.complex64"
                raise DtypeError(
                    f"{name} of the torch function is {spec.dtype}, which needs x64, and that is off. Return "
                    f"it as {half} (.to({half})), or set jax_enable_x64."
                )
            return cls(spec, "narrow", name)
        jax_dtype(spec.dtype)
        return cls(spec, "plain", name)

    @classmethod
    def of_residual(cls, spec: Spec) -> "Port":
        """For a tensor that only the backward sees: kept to the bit."""
        return cls(spec, "bits" if spec.dtype in _WIDE and not x64() else "plain", "a residual")

    def struct(self) -> jax.ShapeDtypeStruct:
        """The JAX array that carries it."""
        if self.carry == "bits":
            return jax.ShapeDtypeStruct((*self.spec.shape, self.spec.dtype.itemsize // 4), np.dtype("int32"))
        dtype = _NARROW[self.spec.dtype] if self.carry == "narrow" else self.spec.dtype
        return jax.ShapeDtypeStruct(self.spec.shape, jax_dtype(dtype))

    def batched(self, dim: int | None, size: int) -> "Port":
        if dim is None:
            return self
        shape = (*self.spec.shape[:dim], size, *self.spec.shape[dim:])
        return replace(self, spec=Spec(shape, self.spec.dtype))

    def decode(self, carrier: torch.Tensor) -> torch.Tensor:
        """The tensor that ``carrier`` holds."""
        dtype = self.spec.dtype
        if self.carry == "plain":
            return carrier
        if self.carry == "narrow":
            return carrier.to(dtype)
        if dtype.is_complex:
            return torch.view_as_complex(carrier.view(torch.float64))
        return carrier.view(dtype).squeeze(-1)

    def write(self, carrier: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write ``tensor`` to the memory of the JAX array.

        Raises:
            OutputError: It has another shape or dtype than was announced.
            NarrowingError: A 64-bit integer does not fit in 32 bits.
        """
        if tensor.shape != self.spec.shape or tensor.dtype is not self.spec.dtype:
            raise OutputError(
                f"{self.name or 'a result'} of the torch function was announced as {_words(self.spec)} and is "
                f"{_words(Spec.of(tensor))}. Correct output_shape=, or return the same shape and dtype for "
                "the same shapes and dtypes of the arguments."
            )
        if self.carry == "narrow":
            _check_fits(tensor, carrier.dtype, self.name)
        elif self.carry == "bits":
            tensor = tensor.resolve_conj().resolve_neg().contiguous()
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
            tensor = tensor.view(torch.int32)
        carrier.copy_(tensor.detach() if tensor.requires_grad else tensor)


class Op:
    """One operation: what goes in and out, and how to run it. Compared by identity.

    Attributes:
        ins: One port an operand.
        outs: One port a result.
        linear: The first operand in which it is linear, as it is in all from there; past the last if in none.
        residual_outs: Results from here on are residuals, which carry no tangent.
    """

    ins: tuple[Port, ...]
    outs: tuple[Port, ...]
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
        self, program: Program, outs: Sequence[Port], call: Callable[..., Sequence[torch.Tensor]] | None
    ) -> None:
        super().__init__()
        self.program = program
        self.device = program.device
        self.ins = tuple(map(Port, program.ins))
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
        self.outs = (*apply.outs, *map(Port.of_residual, extra))
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

    def linear_map(self, ins: tuple[int, ...], transposed: bool) -> "Linear":
        return self.once(("linear", ins, transposed), lambda: Linear(self, ins, transposed))

    def saved_from(self, results: Sequence[Any]) -> list[Any]:
        """The operands that `Linear` takes after the inputs, from the results of this operation."""
        if self.residuals is None:
            return []
        return [results[i if kind == "out" else self.residual_outs + i] for kind, i in self.residuals.saved]


class Linear(Op):
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
        saved: list[Port] = []
        if save.residuals:
            ports = {"out": save.outs[: save.residual_outs], "extra": save.outs[save.residual_outs :]}
            saved = [ports[kind][i] for kind, i in save.residuals.saved]
        here = [Port(program.ins[i]) for i in ins]
        there = [Port(program.outs[i]) for i in program.live]
        self.ins = (*save.ins, *saved, *(there if transposed else here))
        self.outs = tuple(here if transposed else there)
        self.linear = len(save.ins) + len(saved)
        self.residual_outs = len(self.outs)

    @property
    def program(self) -> Program:
        """This map as a function of inputs and tangents, for further derivatives."""
        base = self.save.apply.program
        return base.pullback(self.wrt) if self.transposed else base.pushforward(self.wrt)

    def as_apply(self) -> Apply:
        return self.once("apply", lambda: Apply(self.program, self.outs, None))

    def other(self) -> "Linear":
        """The transposed map."""
        return self.save.linear_map(self.wrt, not self.transposed)

    def graph(self) -> Graph | None:
        return self.once(
            "graph", self._find_graph
        )  # not before it runs: a pushforward is mostly only transposed

    def _find_graph(self) -> Graph | None:
        residuals = self.save.residuals
        try:
            if residuals:
                try:
                    return residuals.pull(self.wrt) if self.transposed else residuals.push(self.wrt)
                except (RuntimeError, NotImplementedError):
                    if self.transposed:
                        raise
            return _with_unused(self.program.graph(), len(self.save.ins), len(self.ins))
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
        self.out_dims: tuple[int | None, ...] = tuple(0 for _ in base.outs)
        self.linear = base.linear
        self.residual_outs = base.residual_outs
        inner = base.graph() if size else None
        self._graph: Graph | None = None
        if inner is not None:
            sources = [node for node, dim in zip(inner.inputs, dims, strict=True) if dim is not None]
            moving = inner.reachable(sources)
            self.out_dims = tuple(
                None if i >= base.residual_outs and node not in moving else 0
                for i, node in enumerate(inner.outputs)
            )
            try:
                self._graph = vmap_graph(inner, dims, self.out_dims, [port.spec for port in self.ins])
            except NeedsValues:
                self._graph = None
            if self._graph is None:
                self.out_dims = tuple(0 for _ in base.outs)
        self.outs = tuple(port.batched(dim, size) for port, dim in zip(base.outs, self.out_dims, strict=True))

    def graph(self) -> Graph | None:
        return self._graph

    def python(self) -> _Run:
        """One lane after the other, for code that cannot be traced."""
        one, used = self.base.run(self.device), self.base.used

        def loop(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
            lanes: list[list[torch.Tensor]] = [[] for _ in self.outs]
            for lane in range(self.size):
                pick = [
                    tensors[i] if self.dims[i] is None else tensors[i].select(self.dims[i], lane)  # type: ignore[arg-type]
                    for i in used
                ]
                for results, result in zip(lanes, one(*pick), strict=True):
                    results.append(result)
            return [
                torch.stack(results) if results else torch.empty(port.spec.shape, dtype=port.spec.dtype)
                for results, port in zip(lanes, self.outs, strict=True)
            ]

        return loop


# --- steps ---------------------------------------------------------------------------------------------


def _words(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}[{','.join(map(str, spec.shape))}]"


def _check_fits(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if not tensor.numel():
        return
    bounds = torch.iinfo(dtype)
    # uint64 has no comparisons in torch; seen as int64, what does not fit in uint32 is negative or too large.
    seen = tensor.view(torch.int64) if tensor.dtype is torch.uint64 else tensor
    low, high = (int(v) for v in seen.aminmax())
    if low < bounds.min or high > bounds.max:
        raise NarrowingError(
            f"{name} of the torch function is {tensor.dtype} with values in [{low}, {high}], which do not fit in "
            f"{dtype}; JAX holds no 64-bit integers with x64 off. Set jax_enable_x64, or return "
            "another dtype."
        )


def _with_unused(graph: Graph, fixed: int, total: int) -> Graph:
    """The graph with operands that it does not read after its first ``fixed``, ``total`` in all."""
    extra = total - len(graph.inputs)
    if not extra:
        return graph
    inputs = graph.inputs
    with graph.nodes.inserting_before(inputs[0] if inputs else None):
        spare = [graph.nodes.placeholder(f"unused{i}") for i in range(extra)]
    cut = graph.cut([*inputs[:fixed], *spare, *inputs[fixed:]], graph.outputs)
    for node in spare:
        graph.nodes.erase_node(node)
    return cut


def _differentiable(program: Program, wrt: tuple[int, ...]) -> Residuals | None:
    try:
        return program.residuals(wrt)
    except (RuntimeError, NotImplementedError) as err:
        _explain(err)
        raise


def _explain(err: Exception) -> None:
    """Raise a better error, if torch says that a derivative is missing."""
    if "derivative" in str(err) or "backward" in str(err):
        raise TransformError(
            f"torch cannot differentiate this function to the order asked for: {err}. Use operators that "
            "have a derivative, or give the function one with torch.autograd.Function."
        ) from err
