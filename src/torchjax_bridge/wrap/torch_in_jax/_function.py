"""`as_jax_function`: a torch function as a JAX function.

Owns the public door: which leaves of a call cross and which are static, the ``key=`` argument,
``output_shape=``, the bounded cache of what was learned about each kind of call, and putting the results
back together. The primitive and its rules are in ``_primitive``.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import ArgumentError, DtypeError, NarrowingError, OutputError
from torchjax_bridge.exchange import refuse_in_fork, torch_device, torch_dtype

from .._cache import Cache, CacheInfo
from .._call import Rest, split_call
from .._settings import x64
from ._ambient import Ambient, under_autocast
from ._code import without_grad
from ._encoding import Encoding
from ._graph import NeedsValues, Spec
from ._inspect import Findings, flatten_output, inspect_call
from ._ops import Apply
from ._primitive import bind
from ._program import TorchProgram
from ._questions import settled
from ._random import Replay, draw_noise, no_draws
from ._samplers import Draw
from ._stand_ins import AsTraced

__all__ = ["JaxFunction", "as_jax_function", "has_key", "take_key"]

# How many kinds of call (structure, shapes, dtypes, static values) a wrapped function remembers.
CACHE_SIZE = 256


class JaxFunction(Protocol):
    """What `as_jax_function` returns, for a type checker; at run time it is a plain function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``fn`` of JAX arrays."""

    def cache_info(self) -> CacheInfo:
        """How many kinds of call are known, and how often one was met again."""

    def cache_clear(self) -> None:
        """Forget every kind of call."""


def as_jax_function(
    fn: Callable[..., Any],
    *,
    output_shape: Any = None,
    residuals: Literal["save", "recompute"] = "save",
) -> JaxFunction:
    """A torch function as a JAX function, under every transform of JAX.

    The result takes and returns JAX arrays, and runs ``fn`` in torch: eagerly, inside ``jax.jit``, and under
    ``grad``, ``jvp``, ``vmap``, ``scan``, ``shard_map`` and their compositions, to any order. Derivatives are
    torch's own, from graphs of ATen operators that are traced once for each kind of call.

    Args:
        fn: Takes torch tensors in any JAX pytree, positionally or by keyword, beside static values; returns a
            pytree of dense tensors and numbers. It should depend on nothing but its arguments and
            closed-over tensors, and have no effect but its result.
        output_shape: For code whose control flow or output shapes depend on values: the output as a pytree of
            ``jax.ShapeDtypeStruct``, or a function that makes it from the call's arguments. Such code is run
            as it is at every order of derivative, and lane by lane under ``vmap``. Not needed elsewhere.
        residuals: ``"save"``: under reverse mode the forward pass returns the tensors that the backward pass
            needs as JAX arrays. ``"recompute"``: it returns none, and the backward runs the forward again
            (less memory, more time).

    Returns:
        A function of the same arguments. Arrays (JAX or numpy) are traced values; Python numbers, strings
        and other hashable leaves are static, and each new value of one is a new kind of call. One more
        keyword, ``key``, is taken: a JAX PRNG key, from which all random numbers of the call are made.
        (Where ``fn`` has an argument of that name itself, only a typed key, ``jax.random.key(...)``, is
        taken for one.) ``.cache_info()`` and ``.cache_clear()`` are those of the kinds of call known so
        far.

    Raises:
        ArgumentError: An argument can neither be traced nor be static; or ``fn`` is no function, or
            ``residuals`` unknown.
        DtypeError: An argument has a dtype unknown to torch; or an output needs x64, which is off.
        NarrowingError: x64 is off and a 64-bit integer of the result does not fit in 32 bits.
        OutputError: The output is no pytree of dense tensors, depends on values without ``output_shape``,
            or is not what was announced.
        TransformError: ``fn`` writes to tensors it did not receive, draws random numbers without ``key``,
            or cannot be differentiated.

    What ``fn`` itself raises arrives as it is where JAX runs eagerly or traces. Inside a compiled function
    JAX makes its own error of it (``jax.errors.JaxRuntimeError``, or ``ValueError`` on its fast path), with
    the original type, message and traceback in its text.

    Memory:
        Inputs are lent to torch without a copy and never written: an input that ``fn`` edits in place, or
        keeps, is copied first. Each result is written once, into JAX's memory.

    >>> import jax, jax.numpy as jnp, torch
    >>> f = as_jax_function(lambda x, scale: torch.sin(x).sum() * scale)
    >>> jax.jit(jax.grad(f))(jnp.zeros(3), scale=2.0)
    Array([2., 2., 2.], dtype=float32)
    """
    if not callable(fn):
        raise ArgumentError(f"as_jax_function takes a torch function, and got a {type(fn).__qualname__}.")
    if residuals not in ("save", "recompute"):
        raise ArgumentError(f"residuals={residuals!r} is neither 'save' nor 'recompute'.")
    wrapped = _Wrapped(fn, output_shape, residuals == "save")

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(args, kwargs)

    functools.update_wrapper(call, fn, updated=())
    call.cache_info = wrapped.kinds.info  # type: ignore[attr-defined]
    call.cache_clear = wrapped.kinds.clear  # type: ignore[attr-defined]
    return cast(JaxFunction, call)


@dataclass(frozen=True)
class _Kind:
    """What was learned about one kind of call."""

    apply: Apply
    structure: Any
    draws: tuple[Draw, ...]


class _Wrapped:
    """A torch function and what is known about it; dies with the function that `as_jax_function` returned."""

    def __init__(self, fn: Callable[..., Any], output_shape: Any, save: bool) -> None:
        self.fn = fn
        self.output_shape = output_shape
        self.save = save
        self.kinds = Cache(CACHE_SIZE)
        self.own_key = has_key(fn)
        self.ambient = Ambient(fn)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_in_fork("call a torch function from JAX")
        key = take_key(kwargs, self.own_key)
        leaves, rest = split_call(args, kwargs, _crosses)
        arrays, specs = _as_arrays(leaves, rest)
        device = _device_of(arrays)
        name = (rest, specs, device, key is not None, x64(), self.ambient.now(device.type))
        kind = self.kinds.get(name, lambda: self._learn(rest, specs, device, key is not None))
        if key is not None and kind.draws:
            arrays += draw_noise(key, kind.draws)
        results = bind(kind.apply, arrays)
        return jax.tree_util.tree_unflatten(kind.structure, results)

    # --- a new kind of call ---

    def _learn(self, rest: Rest, specs: tuple[Spec, ...], device: torch.device, random: bool) -> _Kind:
        modes = self.ambient.modes()
        call = _explained(_on_leaves(self.fn, rest, len(specs)), specs)
        call = under_autocast(call, device.type)
        traced = call  # for all but the value
        traceable = True

        def look(call: Callable[..., Any]) -> Findings:
            return inspect_call(call, specs, device, random)

        try:
            found = look(call)
        except NeedsValues as err:
            answered = settled(call, look)
            if answered is not None:
                traced, found = answered
            else:
                found = self._announced(rest, specs, err)
                traceable = False
                traced = call = _without_draws(call)
        if traceable and self.output_shape is not None:
            self._compare(found, rest, specs)
        if found.as_traced:
            call, traced = _as_traced(call), _as_traced(traced)
        names = _output_names(found.structure)
        port = Encoding.of_output if traceable else Encoding.of_announced
        outs = [port(spec, name) for spec, name in zip(found.outs, names, strict=True)]
        program = TorchProgram(
            _pure(traced, found, len(specs)),
            (*specs, *(draw.spec for draw in found.draws)),
            found.outs,
            device,
            traceable=traceable,
            save=self.save,
        )
        quiet = traceable and found.records_grad and _runs_without_grad(traced, specs, device, found)
        as_it_is = None
        if not found.draws:
            # The code may switch a module by itself: in the trace it just has.
            as_it_is = self.ambient.guarded(_as_it_is(call, found, quiet), modes, self.ambient.modes())
        return _Kind(Apply(program, outs, as_it_is), found.structure, found.draws)

    def _announced(self, rest: Rest, specs: tuple[Spec, ...], why: NeedsValues) -> Findings:
        if self.output_shape is None:
            raise OutputError(
                "the shapes of this torch function's output, or its control flow, depend on values, which "
                f"cannot be known before it runs ({why.__cause__}). Pass output_shape= to as_jax_function or "
                "as_jax_module: the output as a pytree of jax.ShapeDtypeStruct, or a function that makes it from "
                "the arguments. (What depends on a number only can take it as a Python number, which is static.)"
            ) from why.__cause__
        outs, structure = self._output_shape(rest, specs)
        return Findings(structure, outs, frozenset(range(len(specs))), (), True, True)

    def _output_shape(self, rest: Rest, specs: tuple[Spec, ...]) -> tuple[tuple[Spec, ...], Any]:
        shape = self.output_shape
        if makes_structs(shape):
            structs = [Encoding(spec).struct() for spec in specs]
            args, kwargs = rest.join(structs)
            shape = shape(*args, **kwargs)
        leaves, structure = jax.tree_util.tree_flatten(shape)
        if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
            raise ArgumentError(
                "output_shape must be a pytree of jax.ShapeDtypeStruct, or a function that returns one; it holds "
                f"{', '.join(sorted({type(leaf).__qualname__ for leaf in leaves}))}."
            )
        return tuple(Spec(tuple(leaf.shape), torch_dtype(leaf.dtype)) for leaf in leaves), structure

    def _compare(self, found: Findings, rest: Rest, specs: tuple[Spec, ...]) -> None:
        outs, structure = self._output_shape(rest, specs)
        fits = structure == found.structure and all(map(_announces, outs, found.outs))
        if not fits:
            raise OutputError(
                f"output_shape announces {structure} of {list(outs)}, and the torch function returns "
                f"{found.structure} of {list(found.outs)}. Correct output_shape, or leave it out."
            )


def makes_structs(output_shape: Any) -> bool:
    """Whether ``output_shape=`` is a function of the arguments, and not what it announces."""
    return callable(output_shape) and not hasattr(output_shape, "dtype")


def _announces(announced: Spec, found: Spec) -> bool:
    """Whether an announced output is what was found, or what JAX will hold of it."""
    held = Encoding.of_output(found, "the output").struct()
    return announced in (found, Spec(held.shape, torch_dtype(held.dtype)))


# --- a call in torch ------------------------------------------------------------------------------------


def _on_leaves(fn: Callable[..., Any], rest: Rest, count: int) -> Callable[..., Any]:
    """``fn`` as a function of the dynamic leaves of its call."""
    if not rest.static and rest.structure == jax.tree_util.tree_structure((tuple(range(count)), {})):
        return fn  # each argument is a leaf

    def call(*tensors: torch.Tensor) -> Any:
        args, kwargs = rest.join(tensors)
        return fn(*args, **kwargs)

    return call


def _without_draws(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which raises where it draws random numbers."""

    def guarded(*tensors: torch.Tensor) -> Any:
        with no_draws():
            return call(*tensors)

    return guarded


def _as_traced(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*tensors: torch.Tensor) -> Any:
        with AsTraced():
            return call(*tensors)

    return run


def _explained(call: Callable[..., Any], specs: tuple[Spec, ...]) -> Callable[..., Any]:
    """The call, whose complaints about 32-bit indices say what to write."""
    if not any(spec.dtype is torch.int32 for spec in specs):
        return call

    def explaining(*tensors: torch.Tensor) -> Any:
        try:
            return call(*tensors)
        except (RuntimeError, IndexError) as err:
            if "Long" in str(err) or "int64" in str(err):
                err.add_note("JAX passed 32-bit integers; write tensor.long() in the torch code.")
            raise

    return explaining


def _pure(call: Callable[..., Any], found: Findings, count: int) -> Callable[..., Sequence[torch.Tensor]]:
    """The call as a function of tensors and noise that keeps its inputs as they are."""

    def pure(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        given = [x.clone() if i in found.copied else x for i, x in enumerate(tensors[:count])]
        if found.draws:
            with Replay(tensors[count:]):
                return flatten_output(call(*given))[0]
        return flatten_output(call(*given))[0]

    return pure


def _runs_without_grad(
    call: Callable[..., Any], specs: tuple[Spec, ...], device: torch.device, found: Findings
) -> bool:
    """Whether a call that closes over parameters needs no autograd graph: not so if it differentiates inside."""
    try:
        with torch.no_grad():
            again = inspect_call(call, specs, device, draws_allowed=False)
    except (RuntimeError, NeedsValues):
        return False
    return again.outs == found.outs and again.structure == found.structure


def _as_it_is(
    call: Callable[..., Any], found: Findings, quiet: bool
) -> Callable[..., Sequence[torch.Tensor]]:
    """The call as it runs for its value alone; ``quiet``: under ``no_grad``."""

    def run(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if found.copied:
            tensors = tuple(x.clone() if i in found.copied else x for i, x in enumerate(tensors))
        leaves, structure = flatten_output(call(*tensors))
        if structure is not found.structure and structure != found.structure:
            raise OutputError(
                f"the output of the torch function was announced as {found.structure} and is {structure}. Correct "
                "output_shape=, or return the same structure in every call."
            )
        return leaves

    return without_grad(run) if quiet else run


# --- arguments ------------------------------------------------------------------------------------------


def _crosses(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | torch.Tensor)


def _as_arrays(leaves: Sequence[Any], rest: Rest) -> tuple[list[Any], tuple[Spec, ...]]:
    """The leaves as JAX arrays, and what torch will see of them."""
    arrays, specs = [], []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):
            leaf = _as_array(leaf, i, rest)
        try:
            specs.append(Spec(leaf.shape, torch_dtype(leaf.dtype)))
        except DtypeError as err:
            raise DtypeError(f"cannot pass {rest.names()[i]} to a torch function: {err}") from None
        arrays.append(leaf)
    return arrays, tuple(specs)


def _as_array(leaf: Any, index: int, rest: Rest) -> Any:
    if isinstance(leaf, torch.Tensor):
        raise ArgumentError(
            f"{rest.names()[index]} is a torch.Tensor; a wrapped function takes JAX arrays. Pass "
            "torchjax_bridge.to_jax(tensor), or close over the tensor."
        )
    try:
        array = jnp.asarray(leaf)
    except TypeError as err:
        raise ArgumentError(
            f"{rest.names()[index]} is a numpy array of dtype {leaf.dtype}, which JAX has no counterpart for. "
            "Pass numbers or booleans."
        ) from err
    if array.dtype != leaf.dtype and leaf.dtype.kind in "iu" and not np.array_equal(np.asarray(array), leaf):
        raise NarrowingError(
            f"{rest.names()[index]} holds {leaf.dtype} values that do not fit in {array.dtype}, and x64 is off. "
            "Set jax_enable_x64, or pass another dtype."
        )
    return array


def _device_of(arrays: Sequence[Any]) -> torch.device:
    """Where torch will run: where the arrays are, or where JAX would put them."""
    if _only_cpu():
        return _CPU
    for array in arrays:
        if not isinstance(array, jax.core.Tracer):
            return torch_device(next(iter(array.devices())))
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return torch_device(default or jax.local_devices()[0])


_CPU = torch.device("cpu")


@functools.cache
def _only_cpu() -> bool:
    return {device.platform for device in jax.local_devices()} == {"cpu"}


def has_key(fn: Callable[..., Any]) -> bool:
    """Whether torch code has an argument of its own that is named ``key``."""
    try:
        return "key" in inspect.signature(fn).parameters
    except (ValueError, TypeError):
        return False


def take_key(kwargs: dict[str, Any], own: bool) -> Any:
    """Take the PRNG key out of the keyword arguments; ``own``: the code has an argument of that name.

    Raises:
        ArgumentError: It is no key, and the code has no such argument.
    """
    key = kwargs.get("key")
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return kwargs.pop("key")
    if own:
        return None
    raw = kwargs.pop("key", None)
    if raw is None:
        return None
    if getattr(raw, "dtype", None) != np.uint32:
        raise ArgumentError(
            f"key= takes a JAX PRNG key (jax.random.key(0)), and got a {type(raw).__qualname__}."
        )
    return jax.random.wrap_key_data(jnp.asarray(raw))


def _output_names(structure: Any) -> list[str]:
    if structure.num_leaves == 1 and structure == jax.tree_util.tree_structure(0):
        return ["the output"]
    numbered = jax.tree_util.tree_unflatten(structure, range(structure.num_leaves))
    paths = jax.tree_util.tree_flatten_with_path(numbered)[0]
    return [f"output{jax.tree_util.keystr(path)}" for path, _ in paths]
