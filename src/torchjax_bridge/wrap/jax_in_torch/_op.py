"""One ``torch.library`` operator that runs a program, for everything that watches operators.

``torch.compile``, ``torch.export``, fake tensors, ``make_fx`` and selective checkpointing record or replace
calls of operators, and would never see a call of XLA. So while one of them is active, a program runs through
``torchjax_bridge::call(str program, Tensor[] inputs) -> Tensor[]``. There is one operator for all functions.
The string names the program and is new in every process, so that a graph that torch caches on disk never
finds another program. The names are held weakly and die with the wrapped function. The operator is defined on
first use.
"""

import functools
import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from torchjax_bridge.errors import TransformError
from torchjax_bridge.exchange import torch_device, torch_dtype

from .._call import type_key
from .._settings import x64_as
from ._execute import execute
from ._program import JaxProgram
from ._state import hidden_from_dynamo

__all__ = ["run_op"]

_Tensor = torch.Tensor


class _BoundProgram:
    """A program with those of its arguments that are no tensors."""

    def __init__(self, program: JaxProgram, others: Sequence[Any]) -> None:
        self.program = program
        self.others = tuple(others)
        self.name = f"{uuid.uuid4().hex}"
        self.for_graph: Any = self
        """What torch may keep: while a graph is made, only a weak reference."""

    def leaves(self, tensors: Sequence[Any]) -> list[Any]:
        given = iter(tensors)
        return [next(given) if other is None else other for other in self.others]


_bound: "weakref.WeakValueDictionary[str, _BoundProgram]" = weakref.WeakValueDictionary()


def run_op(program: JaxProgram, leaves: Sequence[Any]) -> list[Any]:
    """The results of ``program``, through the operator."""
    if False in program.exportable:
        raise TransformError(
            "a result is a PRNG key, which torch cannot hold, so torch.compile and other modes that watch "
            "operators cannot pass it on. Return jax.random.key_data(key) instead."
        )
    bound = _bind(program, [None if isinstance(leaf, _Tensor) else leaf for leaf in leaves])
    return list(_operator()(bound.name, [leaf for leaf in leaves if isinstance(leaf, _Tensor)]))


def _bind(program: JaxProgram, others: Sequence[Any]) -> _BoundProgram:
    """The program with its other arguments; the same object if they are the same numbers again."""
    key: Any = (program, tuple((type_key(other), other) for other in others))
    try:
        known = program.origin.pins.get(key)
    except TypeError:  # one of them is an array, which is not hashable
        key = (program, uuid.uuid4())
        known = None
    if known is None:
        known = _BoundProgram(program, others)
        _bound[known.name] = known
        if torch.compiler.is_compiling() or get_proxy_mode() is not None:
            known.for_graph = program.origin.pin(known, key)  # the graph will hold only the name
    return known


@functools.cache
def _operator() -> Any:
    """Define the operator and its rules, once in a process."""
    name = "torchjax_bridge::call"
    # XLA launches its kernels itself, outside any CUDA graph that torch.compile(mode="reduce-overhead") captures.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # older releases lack it
    tags = () if unsafe is None else (unsafe,)
    torch.library.define(name, "(str program, Tensor[] inputs) -> Tensor[]", tags=tags)
    torch.library.impl(name, "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake(name)(_fake_kernel)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context)
    torch.library.register_vmap(name, _vmap)
    return torch.ops.torchjax_bridge.call.default


def _lookup(name: str) -> _BoundProgram:
    found = _bound.get(name)
    if found is None:
        raise TransformError(
            "this compiled graph calls a JAX function whose wrapper is gone. Keep what as_torch_function or "
            "as_torch_module returned for as long as the graph."
        )
    return found


@hidden_from_dynamo
def _kernel(program: str, inputs: Sequence[_Tensor]) -> list[_Tensor]:
    bound = _lookup(program)
    with x64_as(bound.program.x64):
        return execute(bound.program, bound.leaves(inputs))


@hidden_from_dynamo
def _fake_kernel(program: str, inputs: Sequence[_Tensor]) -> list[_Tensor]:
    bound = _lookup(program)
    device = inputs[0].device if inputs else torch_device(jax.local_devices()[0])
    return [
        torch.empty(aval.shape, dtype=torch_dtype(aval.dtype), device=device)
        for aval in bound.program.outputs
    ]


@hidden_from_dynamo
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    name, tensors = inputs
    ctx.bound = _lookup(name).for_graph
    ctx.save_for_backward(*tensors)


@hidden_from_dynamo
def _backward(ctx: Any, cotangents: Sequence[Any]) -> tuple[None, list[Any]]:
    program, others = ctx.bound.program, ctx.bound.others
    seen = tuple(i for i in program.smooth_outputs if cotangents[i] is not None)
    tensors = ctx.saved_tensors
    place = [i for i, other in enumerate(others) if other is None]
    wrt = tuple(i for i, tensor in zip(place, tensors, strict=True) if tensor.requires_grad)
    with x64_as(program.x64):
        found = run_op(program.vjp(wrt, seen), [*ctx.bound.leaves(tensors), *(cotangents[i] for i in seen)])
    gradients = dict(zip(wrt, found, strict=True))
    return None, [gradients.get(i) for i in place]


@hidden_from_dynamo
def _vmap(info: Any, in_dims: Any, program: str, inputs: Sequence[_Tensor]) -> tuple[list[Any], list[int]]:
    bound = _lookup(program)
    leaves = bound.leaves(inputs)
    dims = iter(in_dims[1])
    axes = tuple(next(dims) if other is None else None for other in bound.others)
    results = run_op(bound.program.vmap(axes, info.batch_size), leaves)
    return results, [0] * len(results)
