"""One run of torch code on fake tensors, which tells what the code does.

Owns what the run finds: the outputs' structure, shapes and dtypes; which inputs are written in place or kept
after the call; which random numbers are drawn; whether closed-over parameters would record an autograd graph.
The run has shapes alone: it touches no value, no memory, no random state and no buffer of a module. Refuses
code that writes to tensors it did not receive, because a JAX function has no side effects.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch

from torchjax_bridge.errors import OutputError, TransformError, UnsupportedLeafError
from torchjax_bridge.exchange import flatten

from ._graph import Spec
from ._samplers import Draw, is_random, sampler_of
from ._torch_internals import FakeTensor, TorchDispatchMode
from ._trace import PackedWeights, fakes, tracing

__all__ = ["Inspection", "flatten_output", "inspect_call"]


@dataclass(frozen=True)
class Inspection:
    """What one run on fake tensors found."""

    treedef: Any
    """The pytree structure of the output."""
    outs: tuple[Spec, ...]
    copied: frozenset[int]
    """Inputs that must be copied before the call, because the code writes to them or keeps them."""
    draws: tuple[Draw, ...]
    records_grad: bool
    """Some output requires grad although no input does: the code closes over parameters."""
    needs_overrides: bool
    """The code needs the overrides of `RuntimeOverrides` when it runs, too."""


def inspect_call(
    call: Callable[..., Any], specs: Sequence[Spec], device: torch.device, draws_allowed: bool
) -> Inspection:
    """Run ``call(*tensors)`` once on fake tensors.

    Args:
        call: Takes a tensor for each spec, returns a pytree of tensors and numbers.
        specs: Shape and dtype of each input.
        device: Where the tensors would be.
        draws_allowed: Whether random operators are recorded; otherwise they are an error.

    Raises:
        NeedsValues: Shapes or control flow depend on the values.
        TransformError: It writes to a tensor that it did not receive, or draws without permission.
        Whatever ``call`` raises.
    """
    try:
        return _inspect_call(call, specs, device, draws_allowed, cached=True)
    except PackedWeights:
        return _inspect_call(call, specs, device, draws_allowed, cached=False)


def _inspect_call(
    call: Callable[..., Any], specs: Sequence[Spec], device: torch.device, draws_allowed: bool, cached: bool
) -> Inspection:
    with tracing(device, cached) as overrides:
        tensors = fakes(specs, device)
        storages = [tensor.untyped_storage() for tensor in tensors]
        kept = [weakref.ref(storage) for storage in storages]
        recorder = _Recorder(storages, draws_allowed)
        versions = [tensor._version for tensor in tensors]
        with recorder:
            leaves, treedef = flatten_output(call(*tensors))
        written = {
            i
            for i, (tensor, storage) in enumerate(zip(tensors, storages, strict=True))
            if id(storage) in recorder.written or tensor._version != versions[i]
        }
        outs = tuple(Spec.of(leaf) for leaf in leaves)
        records_grad = any(leaf.requires_grad for leaf in leaves)
        draws = tuple(recorder.draws)
        del tensors, storages, leaves, recorder
        outlived = {i for i, reference in enumerate(kept) if reference() is not None}
    return Inspection(
        treedef, outs, frozenset(written | outlived), draws, records_grad, overrides.needed_at_run_time
    )


def flatten_output(output: Any) -> tuple[list[torch.Tensor], Any]:
    """The tensors of a torch function's result and their pytree structure; numbers become tensors.

    Classes that only torch knows as pytrees (``torch.return_types.*``, a ``ModelOutput``) are registered with JAX.

    Raises:
        OutputError: A leaf is neither a tensor nor a number, or is sparse or quantized; or it is no pytree.
    """
    if type(output) is torch.Tensor and output.layout is torch.strided:
        return [output], _LEAF
    try:
        leaves, treedef = flatten(output)
    except UnsupportedLeafError as err:
        raise OutputError(f"the output of the torch function is no pytree: {err}") from err
    if not all(isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided for leaf in leaves):
        leaves = [_as_tensor(leaf, i, treedef) for i, leaf in enumerate(leaves)]
    return leaves, treedef


_LEAF = jax.tree_util.tree_structure(0)


def _as_tensor(leaf: Any, index: int, treedef: Any) -> torch.Tensor:
    if isinstance(leaf, bool | int | float | complex):
        return torch.as_tensor(leaf)
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_quantized:
        return leaf
    numbered = jax.tree_util.tree_unflatten(treedef, range(treedef.num_leaves))
    path = jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(numbered)[0][index][0])
    if isinstance(leaf, torch.Tensor):
        kind = "quantized" if leaf.is_quantized else leaf.layout
        method = "dequantize" if leaf.is_quantized else "to_dense"
        raise OutputError(
            f"output{path} of the torch function is a {kind} tensor. Return a dense one: call .{method}()."
        )
    raise OutputError(
        f"output{path} of the torch function is a {type(leaf).__module__}.{type(leaf).__qualname__}, which is no "
        "tensor and no number, and which neither JAX nor torch knows as a pytree. Leave it out of the result (a "
        "transformers model leaves out its cache with use_cache=False), or register its class with "
        "jax.tree_util.register_pytree_node."
    )


class _Recorder(TorchDispatchMode):
    """Records the writes and draws of every operator, and refuses writes to tensors that are not arguments."""

    def __init__(self, storages: Sequence[Any], draws_allowed: bool) -> None:
        super().__init__()
        self.storages = {id(storage) for storage in storages}
        self.written: set[int] = set()
        self.draws: list[Draw] = []
        self.draws_allowed = draws_allowed
        self._foreign: dict[
            int, Any
        ] = {}  # storages of views of closed-over tensors, kept so that ids stay unique

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if is_random(func, args, kwargs):
            if not self.draws_allowed:
                raise TransformError(_needs_key(func))
            self.draws.append(sampler_of(func, args, kwargs).draw)
        for tensor in _written(schema, _bind_arguments(schema, args, kwargs)):
            self._record_write(func, tensor)
        result = func(*args, **kwargs)
        if schema.name == "aten::lift_fresh" and args[0].untyped_storage().resizable():
            return result  # torch.tensor(...) has just made it; memory of numpy's is not resizable
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            first = next(_tensors(args), None)
            if first is not None and self._is_foreign(first):
                for view in _tensors(result):
                    storage = view.untyped_storage()
                    self._foreign[id(storage)] = storage
        return result

    def _is_foreign(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) or id(tensor.untyped_storage()) in self._foreign

    def _record_write(self, func: Any, tensor: torch.Tensor) -> None:
        if self._is_foreign(tensor):
            raise TransformError(
                f"the torch function writes ({func}) to a tensor of shape {tuple(tensor.shape)} and dtype "
                f"{tensor.dtype} that is not one of its arguments; a JAX function has no side effects. For a "
                "module whose buffers change (BatchNorm in train mode) use as_jax_module and "
                "apply(variables, ..., train=True); else pass the tensor as an argument and return it."
            )
        self.written.add(id(tensor.untyped_storage()))


def _needs_key(func: Any) -> str:
    return (
        f"the torch function draws random numbers ({func}). Call it with key=jax.random.key(...), which makes "
        "them reproducible and the same in the forward and the backward pass; or switch the randomness off "
        "(module.eval())."
    )


def _bind_arguments(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    pairs = list(zip(schema.arguments, args, strict=False))
    return pairs + [(a, kwargs[a.name]) for a in schema.arguments[len(args) :] if a.name in kwargs]


def _written(schema: Any, bound: list[tuple[Any, Any]]) -> Iterator[torch.Tensor]:
    """The tensors that an operator writes to."""
    names = {argument.name for argument, _ in bound if argument.alias_info and argument.alias_info.is_write}
    if schema.name in _BATCH_NORMS:
        training = any(argument.name == "training" and value for argument, value in bound)
        names = {"running_mean", "running_var"} if training else set()
    for argument, value in bound:
        if argument.name in names:
            yield from _tensors(value)


# These write to their statistics in training only, whatever their schemas say.
_BATCH_NORMS = (
    "aten::native_batch_norm",
    "aten::_native_batch_norm_legit",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
