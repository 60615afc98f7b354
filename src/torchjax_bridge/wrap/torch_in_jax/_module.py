"""`as_jax_module`: an ``nn.Module`` as a pure JAX function of its variables.

Owns the variables (names as torch has them), the eval and train modes, and the copies of the module that
calls run on. The module itself is read once and never touched: calls run on skeletons that share no object
with it. How a torch function becomes a JAX function is `as_jax_function`'s.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, OutputError
from torchjax_bridge.exchange import to_jax

from ._function import as_jax_function, has_key, makes_structs, take_key
from ._graph import is_fake

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
        output_shape: For a module whose control flow or output shapes depend on values: its output (without
            the buffers), as for `as_jax_function`. A function is given the arguments that ``apply`` passes on.
        residuals: As for `as_jax_function`.

    Returns:
        ``variables``, the dict ``{"params": {...}, "buffers": {...}}`` of JAX arrays named as
        ``module.named_parameters()`` and ``module.named_buffers()`` name them (tied parameters once); and
        ``apply``:

        * ``apply(variables, *args, **kwargs)`` is the output in eval mode;
        * ``apply(variables, *args, train=True, key=key, **kwargs)`` is ``(output, new_buffers)`` in train
          mode, where ``new_buffers`` has the names of ``variables["buffers"]``. ``key`` is a JAX PRNG key,
          needed if the module draws random numbers (dropout). An argument ``train`` of ``forward`` itself can
          only be given by position.

        Every transform of JAX applies, with respect to variables and inputs alike. A parameter whose
        ``requires_grad`` is off is a variable like any other: which variables to train is the optimizer's
        choice (``optax.partition`` with ``optax.set_to_zero()`` for the others).

    Raises:
        ExchangeError: A parameter or buffer has no JAX counterpart (``float64`` with x64 off, say). The
            message lists all of them.
        ArgumentError: ``module`` is none. By ``apply``: variables are missing or unknown, or a parameter
            has another shape than the module's.
        OutputError: By ``apply``: a call adds or removes buffers.
        WrapError: By ``apply``: whatever `as_jax_function` refuses.

    Memory:
        ``variables`` are copies, and later changes of the module are not seen. Calls lend them to torch
        without a copy and write to none.

    >>> import jax.numpy as jnp, torch
    >>> apply, variables = as_jax_module(torch.nn.Linear(3, 2))
    >>> apply(variables, jnp.ones((4, 3))).shape
    (4, 2)
    """
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(
            f"as_jax_module takes a torch.nn.Module, and got a {type(module).__qualname__}. For a function use "
            "as_jax_function."
        )
    tensors = {
        "params": {name: p.detach() for name, p in module.named_parameters()},
        "buffers": {name: b.detach() for name, b in module.named_buffers()},
    }
    variables = to_jax(tensors, copy=True)
    names = {kind: tuple(group) for kind, group in tensors.items()}
    dtypes = {name: tensor.dtype for group in tensors.values() for name, tensor in group.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors["params"].items()}
    skeletons = _Skeletons(module)
    all_buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}

    def run(given: dict[str, dict[str, Any]], args: Any, kwargs: Any, train: bool) -> Any:
        state = {
            f"module.{name}": _as_declared(tensor, dtypes[name])
            for group in given.values()
            for name, tensor in group.items()
        }
        fresh = any(map(is_fake, jax.tree_util.tree_leaves((state, args, kwargs))))
        with skeletons.one(train, fresh) as skeleton:
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
        output = output_shape(*args, **kwargs) if makes_structs(output_shape) else output_shape
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
    """The variables in the order of the module.

    Raises:
        ArgumentError: Some are missing, or unknown, or a parameter has another shape.
    """
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            f"the first argument of apply is a {type(variables).__qualname__}; it must be the variables that "
            "as_jax_module returned, or a tree of the same names."
        )
    faults = [f"unknown collection {kind!r}" for kind in variables if kind not in names]
    for kind, expected in names.items():
        group = variables.get(kind, {})
        faults += [f"missing {kind} '{name}'" for name in expected if name not in group]
        faults += [f"unknown {kind} '{name}'" for name in group if name not in expected]
    # Not those of buffers, which a module may grow.
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
        kind: {name: variables[kind][name] for name in expected} if expected else {}
        for kind, expected in names.items()
    }


def _as_declared(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers in the module's own dtype: with x64 off JAX carries int64 in 32 bits, and indices need 64."""
    whole = not (dtype.is_floating_point or dtype.is_complex or tensor.dtype.is_floating_point)
    return tensor.to(dtype) if whole and tensor.dtype != dtype else tensor


class _Open(torch.nn.Module):
    """A module whose output comes with the buffers as they are after the call, changed in place or replaced."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.module(*args, **kwargs), dict(self.module.named_buffers())


class _Skeletons:
    """Copies of a module that share its tensors and none of its other objects.

    ``functional_call`` puts tensors into the module for the length of a call, so each call that runs at the
    same moment as another needs a copy of its own; they are made on demand and used again.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._pattern = _skeleton(_Open(module))
        self._idle: dict[bool, deque[torch.nn.Module]] = {True: deque(), False: deque()}

    def one(self, train: bool, fresh: bool) -> "_Lease":
        """A skeleton in the mode asked for; ``fresh``: never used before and not again."""
        idle = deque() if fresh else self._idle[train]
        try:
            skeleton = idle.pop()
        except IndexError:
            skeleton = _skeleton(self._pattern).train(train)
        return _Lease(skeleton, idle)


class _Lease:
    """Gives a skeleton back after the call."""

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
        # Those in plain attributes too, alone or in containers: writes to them are refused, not kept in a copy.
        # So are the packed weights of a quantized module, which no call changes.
        held += [leaf for leaf in _leaves(vars(part)) if isinstance(leaf, torch.Tensor | torch.ScriptObject)]
        memo |= {id(leaf): leaf for leaf in held}
    return copy.deepcopy(module, memo)


def _leaves(value: Any) -> Iterator[Any]:
    """What an attribute holds, through lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)
