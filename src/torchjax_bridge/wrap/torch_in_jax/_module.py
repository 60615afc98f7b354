"""`as_jax_module`: an ``nn.Module`` as a pure JAX function of its variables.

Owns the variables (under torch's names), the eval and train modes, and the copies of the module on which
calls run. The module itself is read once and never touched; calls run on skeletons, which share no object
with it. `as_jax_function` makes the JAX function.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import torch

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import ArgumentError, OutputError
from torchjax_bridge.exchange import to_jax

from .._sharded import refuse_sharded_module
from ._function import as_jax_function
from ._output_shape import is_shape_function
from ._random import has_key, take_key
from ._trace import is_fake

__all__ = ["as_jax_module"]


def as_jax_module(
    module: torch.nn.Module,
    *,
    output_shape: Any = None,
    residuals: Literal["save", "recompute"] = "save",
) -> tuple[Callable[..., Any], dict[str, dict[str, jax.Array]]]:
    """A torch module as ``(apply, variables)``.

    Args:
        module: Any ``nn.Module`` whose forward takes and returns pytrees of tensors.
        output_shape: For a module whose control flow or output shapes depend on values: its output without the
            buffers, as for `as_jax_function`. A function gets the arguments that ``apply`` passes on.
        residuals: As for `as_jax_function`.

    Returns:
        ``variables``, the dict ``{"params": {...}, "buffers": {...}}`` of JAX arrays named as
        ``module.named_parameters()`` and ``module.named_buffers()`` name them (tied parameters once); and
        ``apply``:

        * ``apply(variables, *args, **kwargs)`` is the output in eval mode;
        * ``apply(variables, *args, train=True, key=key, **kwargs)`` is ``(output, new_buffers)`` in train
          mode, where ``new_buffers`` has the names of ``variables["buffers"]``. ``key`` is a JAX PRNG key,
          needed if the module draws random numbers (dropout). If ``forward`` itself has an argument ``train``,
          pass that by position.

        Every transform of JAX applies, with respect to variables and inputs alike. A parameter with
        ``requires_grad=False`` is a variable like any other. The optimizer chooses which variables to train
        (``optax.partition`` with ``optax.set_to_zero()`` for the others).

    Raises:
        ExchangeError: A parameter or buffer has no JAX counterpart (``float64`` with x64 off, say). The
            message lists all of them.
        ArgumentError: ``module`` is no module. By ``apply``: variables are missing or unknown, or a parameter
            has another shape than in the module.
        OutputError: By ``apply``: a call adds or removes buffers.
        WrapError: By ``apply``: whatever `as_jax_function` refuses.

    Memory:
        ``variables`` are copies, so later changes of the module have no effect on them. torch reads them without
        a copy and writes to none.

    >>> import jax.numpy as jnp, torch
    >>> apply, variables = as_jax_module(torch.nn.Linear(3, 2))
    >>> apply(variables, jnp.ones((4, 3))).shape
    (4, 2)
    """
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(
            f"as_jax_module takes a torch.nn.Module, and got {what_kind(module)}. For a function use "
            "as_jax_function."
        )
    tensors = {
        "params": {name: p.detach() for name, p in module.named_parameters()},
        "buffers": {name: b.detach() for name, b in module.named_buffers()},
    }
    variables = to_jax(tensors, copy=True)
    names = {collection: tuple(group) for collection, group in tensors.items()}
    dtypes = {name: tensor.dtype for group in tensors.values() for name, tensor in group.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors["params"].items()}
    skeletons = _SkeletonPool(module)
    all_buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

    def run(given: dict[str, dict[str, Any]], args: Any, kwargs: Any, train: bool) -> Any:
        state = {
            f"module.{name}": _as_declared(tensor, dtypes[name])
            for group in given.values()
            for name, tensor in group.items()
        }
        fresh = any(map(is_fake, jax.tree_util.tree_leaves((state, args, kwargs))))
        with skeletons.take(train, fresh) as skeleton:
            output, buffers = torch.func.functional_call(skeleton, state, (args, kwargs), strict=True)
        if not set(names["buffers"]) <= buffers.keys() <= all_buffers:
            changed = sorted(buffers.keys() ^ set(names["buffers"]))
            raise OutputError(
                f"a call of the module adds or removes buffers ({', '.join(changed)}); a JAX function keeps no "
                "state. Register them in __init__."
            )
        if not train:
            return output
        return output, {name: buffers[name].to(given["buffers"][name].dtype) for name in names["buffers"]}

    def announced(given: dict[str, dict[str, Any]], args: Any, kwargs: Any, train: bool) -> Any:
        output = output_shape(*args, **kwargs) if is_shape_function(output_shape) else output_shape
        return (output, given["buffers"]) if train else output

    call = as_jax_function(run, output_shape=None if output_shape is None else announced, residuals=residuals)
    own_key = has_key(module.forward)

    def apply(variables: Mapping[str, Any], /, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        key = take_key(kwargs, own_key)
        return call(_checked(variables, names, shapes), args, kwargs, bool(train), key=key)

    return apply, variables


def _checked(
    variables: Any, names: dict[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    """The variables, in the order in which the module has them.

    Raises:
        ArgumentError: Some are missing, or unknown, or a parameter has another shape.
    """
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            f"the first argument of apply is {what_kind(variables)}; it must be the variables that "
            "as_jax_module returned, or a tree of the same names."
        )
    faults = [f"unknown collection {collection!r}" for collection in variables if collection not in names]
    for collection, expected in names.items():
        group = variables.get(collection, {})
        faults += [f"missing {collection} '{name}'" for name in expected if name not in group]
        faults += [f"unknown {collection} '{name}'" for name in group if name not in expected]
    # The shapes of buffers are not compared, because a module may grow them.
    faults += [
        f"params '{name}' of shape {np.shape(value)} for {shapes[name]}"
        for name, value in variables.get("params", {}).items()
        if name in shapes and np.shape(value) != shapes[name]
    ]
    if faults:
        raise ArgumentError(
            f"these are not the variables of this module: {'; '.join(faults)}. Pass the variables that "
            "as_jax_module returned, or a tree of the same names."
        )
    return {
        collection: {name: variables[collection][name] for name in expected} if expected else {}
        for collection, expected in names.items()
    }


def _as_declared(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An integer tensor in the module's own dtype: with x64 off JAX holds int64 in 32 bits, and indices need 64."""
    integers = not (dtype.is_floating_point or dtype.is_complex or tensor.dtype.is_floating_point)
    return tensor.to(dtype) if integers and tensor.dtype != dtype else tensor


class _WithBuffers(torch.nn.Module):
    """A module that also returns its buffers as they are after the call, changed in place or replaced."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.module(*args, **kwargs), dict(self.module.named_buffers())


class _SkeletonPool:
    """Copies of a module that share its tensors and none of its other objects.

    ``functional_call`` puts tensors into the module for the duration of a call, so calls that run at the same time
    need a copy each. Copies are made on demand and used again.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        refuse_sharded_module(module, "as_jax_module")
        self._pattern = _skeleton(_WithBuffers(module))
        self._idle: dict[bool, deque[torch.nn.Module]] = {True: deque(), False: deque()}

    def take(self, train: bool, fresh: bool) -> "_Lease":
        """A skeleton in train or eval mode; a ``fresh`` one was never used before and is not used again."""
        idle = deque() if fresh else self._idle[train]
        try:
            skeleton = idle.pop()
        except IndexError:
            skeleton = _skeleton(self._pattern).train(train)
        return _Lease(skeleton, idle)


class _Lease:
    """A skeleton for one call, which then goes back to the pool."""

    def __init__(self, skeleton: torch.nn.Module, idle: "deque[torch.nn.Module]") -> None:
        self._skeleton = skeleton
        self._idle = idle

    def __enter__(self) -> torch.nn.Module:
        return self._skeleton

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:  # after an error its attributes may be anything
            self._idle.append(self._skeleton)


def _skeleton(module: torch.nn.Module) -> torch.nn.Module:
    memo: dict[int, Any] = {}
    for part in module.modules():
        held: list[Any] = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        # Share tensors in plain attributes, too, alone or in containers: writes to them are refused, not kept in a
        # copy. Share the packed weights of a quantized module, which no call changes.
        held += [leaf for leaf in _leaves(vars(part)) if isinstance(leaf, torch.Tensor | torch.ScriptObject)]
        memo |= {id(leaf): leaf for leaf in held}
    return copy.deepcopy(module, memo)


def _leaves(value: Any) -> Iterator[Any]:
    """The values in an attribute, also those in lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)
