"""`as_torch_module`: a Flax module as an ``nn.Module``.

Owns the torch side: parameters and buffers under the Flax names, the buffers written back after a call, and
the random words drawn from torch's generator. A `Definition` (``_flax_nnx``, ``_flax_linen``) says what the
Flax module computes. It is called as a `TorchFunction`, like every JAX function.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError
from torchjax_bridge.exchange import refuse_in_fork, to_jax, to_torch

from ._arguments import is_value
from ._autograd import call
from ._flax_definition import Definition, Pure
from ._flax_linen import open_linen
from ._flax_nnx import open_nnx
from ._function import TorchFunction
from ._parts import Place, build_parts, read_variables
from ._state import hidden_from_dynamo
from ._trace import Trace

__all__ = ["TorchModule", "as_torch_module"]


# The random stream of linen.Dropout.
_STREAMS = ("dropout",)


def as_torch_module(
    flax_module: Any,
    variables: Any = None,
    *,
    method: str = "__call__",
    rngs: str | Sequence[str] = _STREAMS,
) -> "TorchModule":
    """A Flax module as a torch module that trains, saves and runs like any other.

    Args:
        flax_module: An ``nnx.Module`` with values, or a ``linen.Module``. It and its arrays are copied, and
            never written to.
        variables: For a linen module, its variables ``{"params": ..., "batch_stats": ..., ...}``; may be left
            out if the module is bound. For an nnx module, nothing.
        method: The method that ``forward`` calls.
        rngs: For a linen module, the names of all random streams from which it draws, as in
            ``["dropout", "drop_path"]``. A call that lacks one raises an error with the list. An nnx module has
            streams of its own.

    Returns:
        A `TorchModule`. Its ``forward`` takes the arguments of the Flax method, with tensors for arrays, in
        Flax's layout (images are ``(N, H, W, C)``). A ``bool`` argument is static, because Flax branches on it.

        * Parameters and buffers are named by their Flax path, joined with dots: ``layer1.0.conv1.kernel``. In nnx a
          parameter is an ``nnx.Param``, in linen what is in ``params``; everything else is a buffer.
        * ``train()`` and ``eval()`` do what they do in nnx, also on a part of the module. They set the arguments
          ``train``, ``training``, ``is_training``, ``deterministic`` and ``use_running_average`` of the method, if
          it has them and the caller does not pass them. Like every torch module it starts in training mode.
        * A variable that a call changes (running statistics in training, a cache in decoding) is written back
          to its buffer. Variables that a call creates, as ``sow`` does, are dropped, and so are writes to plain
          attributes. A parameter keeps the value that torch gave it, even if a call overwrites it.
        * Keys for dropout and other draws come from torch's default generator of the parameters' device, so
          ``torch.manual_seed`` repeats them. A call in which nothing is random draws nothing.

    Raises:
        ArgumentError: No Flax module, variables missing or not wanted, a variable that is no array, two
            variables of one name; (when called) a stream that is not in ``rngs``.

    Memory:
        Parameters and buffers are copies. JAX reads them as it does the arguments of `as_torch_function`.

    >>> import jax, torch
    >>> from flax import nnx
    >>> module = as_torch_module(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> list(module.state_dict())
    ['bias', 'kernel']
    >>> module(torch.ones(5, 3)).sum().backward()
    >>> module.get_parameter("bias").grad
    tensor([5., 5.])
    """
    refuse_in_fork("wrap a Flax module")
    if isinstance(flax_module, nnx.Module):
        if variables is not None:
            raise ArgumentError(
                f"{type(flax_module).__name__} is an nnx module and holds its own values; pass no variables. "
                "Call nnx.update(module, state) on it first to give it others."
            )
        if rngs != _STREAMS:
            raise ArgumentError(
                f"{type(flax_module).__name__} is an nnx module and draws from streams of its own; pass no rngs."
            )
        return TorchModule(*open_nnx(flax_module, method))
    if isinstance(flax_module, linen.Module):
        streams = (rngs,) if isinstance(rngs, str) else tuple(rngs)
        return TorchModule(*open_linen(flax_module, variables, method, streams))
    raise ArgumentError(
        f"as_torch_module wraps a flax.nnx or flax.linen module; this is {what_kind(flax_module)}. "
        "Wrap a function of arrays with as_torch_function."
    )


class TorchModule(nn.Module):
    """What `as_torch_module` returns."""

    _functions: "dict[bool | None, _ModuleFunction]"
    _places: list[Place]

    def __init__(
        self, definition: Definition, parameters: Mapping[str, jax.Array], buffers: Mapping[str, jax.Array]
    ) -> None:
        super().__init__()
        self._definition = definition
        # Set in __dict__ directly, because a Flax variable may have the same name.
        own: dict[str, Any] = self.__dict__
        own["_functions"] = _functions(definition)
        variables: dict[str, torch.Tensor] = {}
        for group in (parameters, buffers):
            for name, array in group.items():
                tensor = to_torch(array, copy=True)
                if group is parameters:
                    trainable = tensor.is_floating_point() or tensor.is_complex()
                    tensor = nn.Parameter(tensor, requires_grad=trainable)
                variables[name] = tensor
        own["_places"] = build_parts(self, variables)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the Flax module."""
        parameters, buffers, apart = self._values()
        if apart:
            mode = (self.training, *apart)
            result, changed = self._functions[None](None, buffers, parameters, args, kwargs, mode)
        else:
            result, changed = self._functions[self.training](None, buffers, parameters, args, kwargs)
        if changed:
            with torch.no_grad():
                for name, value in changed.items():
                    buffers[name].copy_(value)
        return result

    def to_flax(self) -> Any:
        """The values as they are now, in Flax: a new nnx module in evaluation mode, or linen variables.

        Memory:
            Copies; later changes of the parameters in torch have no effect on them.
        """
        parameters, buffers = (
            to_jax({name: value.detach() for name, value in values.items()}, copy=True)
            for values in self._values()[:2]
        )
        return self._definition.restore(parameters, buffers)

    def extra_repr(self) -> str:
        """The name of the Flax module's class."""
        return self._definition.title

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_functions"]  # compiled programs; built again by __setstate__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_functions"] = _functions(self._definition)

    def _values(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
        """Parameters and buffers as they are now, and the parts in another mode than the module."""
        values, apart = read_variables(self, self._places)
        definition = self._definition
        parameters = {name: values[name] for name in definition.parameters}
        return parameters, {name: values[name] for name in definition.buffers}, apart


def _functions(definition: Definition) -> "dict[bool | None, _ModuleFunction]":
    """The functions for training, for evaluation, and (None) for a module with parts in another mode."""

    def mixed(words: Any, buffers: Any, parameters: Any, args: Any, kwargs: Any, mode: Any) -> Any:
        training, *apart = mode
        return definition.pure(training, frozenset(apart))(words, buffers, parameters, args, kwargs)

    pure: dict[bool | None, Pure] = {True: definition.pure(True), False: definition.pure(False), None: mixed}
    return {mode: _ModuleFunction(definition, function) for mode, function in pure.items()}


class _ModuleFunction(TorchFunction):
    """A pure function of a definition, called on the module's variables."""

    _roots = ("words", "buffers", "parameters", "args", "kwargs", "mode")

    def __init__(self, definition: Definition, function: Pure) -> None:
        super().__init__(function)
        self._definition = definition
        self._origin = type(self._origin)(definition.title, "as_torch_module")

    @hidden_from_dynamo
    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, buffers, parameters, user_args, user_kwargs, *mode = args
        count = self._definition.words
        words: Any = None
        if count:
            device = next((tensor.device for tensor in parameters.values()), torch.device("cpu"))
            words = torch.zeros(count, dtype=torch.int32, device=device)
        leaves, trace = self.prepare((words, buffers, parameters, user_args, user_kwargs, *mode), kwargs)
        if count and 0 in trace.program.live:
            leaves[0] = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, device=words.device)
        for position in self._changing(trace):
            # The buffer is written to after the call, and what is saved for the gradient must not change.
            leaves[position] = leaves[position].clone()
        return jax.tree_util.tree_unflatten(trace.structure, call(trace.program, leaves))

    def _changing(self, trace: Trace) -> Sequence[int]:
        """The positions, among the leaves, of the buffers that this call changes."""
        known: list[int] | None = trace.notes.get("changing")
        if known is None:
            _, changed = jax.tree_util.tree_unflatten(trace.structure, range(trace.structure.num_leaves))
            start = 1 if self._definition.words else 0
            names = sorted(self._definition.buffers)
            known = trace.notes["changing"] = [start + names.index(name) for name in changed]
        return known

    @staticmethod
    def _is_dynamic(leaf: Any) -> bool:
        return is_value(leaf) and not isinstance(leaf, bool)
