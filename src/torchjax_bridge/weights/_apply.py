"""Runs a plan either way. The only place where weights move."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import jax
import torch
from torch import nn

from torchjax_bridge.errors import ExchangeError, PlanError, ShareError
from torchjax_bridge.exchange import Path, check_copy, join_path, refuse_in_fork, to_jax, to_torch

from ._audit import compare_settings
from ._plan import Plan, UserRule, make_plan, read_sides
from ._report import Fault, Report
from .layouts import same_bits
from .moving import crossing, fresh
from .pairing import Move
from .trees import FlaxLeaf, FlaxTree, TorchTree, live_nnx, place_on_sharding, sharding_of

__all__ = ["to_flax", "to_state_dict"]

Key = TypeVar("Key")


def to_flax(
    source: nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rules: Iterable[UserRule] = (),
    strict: bool = True,
    copy: bool | None = True,
) -> Any:
    """The template, filled with the weights of a torch model.

    Args:
        source: An ``nn.Module`` or its ``state_dict`` (``module.`` and ``_orig_mod.`` are looked through).
            With a module the layers' classes are known; with bare keys they are concluded from the template,
            and what stays in doubt is refused.
        template: An ``nnx.Module`` (concrete, or abstract from ``nnx.eval_shape``), an ``nnx.State``, or
            linen variables (arrays, or the structs of ``jax.eval_shape``). It is left untouched. A plain array
            of an nnx module that is no variable is filled if torch has a tensor of its name, and else kept.
        rules: `Rule`, `Rename`, `LayerType`, `Flatten`, `Keep` and `Fill` values for what the models alone do not
            say.
        strict: With ``False``, a torch tensor without place is left out, and a leaf without source keeps the
            template's value. A mismatch or an ambiguity raises all the same.
        copy: ``True`` gives row-major arrays in memory of their own; ``False`` gives views of the torch
            memory and raises where there can be none; ``None`` views where possible and copies elsewhere.

    Returns:
        A new thing of the template's kind: a ready-to-call ``nnx.Module``, an ``nnx.State``, or
        variables. Arrays have the shapes of the template and the dtypes of the source. Random streams go on
        where the template's stand; those of an abstract template start from ``jax.random.key(0)``. An array lies
        where the template has it, if it says: a sharding of a struct, an array over several devices, or names
        of axes (``nnx.with_partitioning``, linen's boxes) under ``jax.set_mesh``. Otherwise, where the source is.

    Raises:
        PlanError: Source and template do not fit; the message lists every fault.
        ExchangeError: A tensor cannot cross (its values do not fit in 32 bits with x64 off, it has no memory,
            ``copy=False`` cannot be had).
        TypeError: ``copy`` or ``strict`` is none of the values above.

    Warns:
        PairingWarning: Names, classes and shapes leave a choice, and the usual one was taken.
        PartialWarning: ``strict=False`` left something out; the message lists it, and so does `Plan.left_out`.
        SettingsWarning: An nnx template has settings (epsilon, padding, ...) with which it computes another thing
            than the ``nn.Module``; `audit` gives them as data. linen's variables and an ``nnx.State`` have no
            settings to compare, not even the groups of a convolution: ask `audit` with the live linen module.

    Memory:
        ``copy=True``: the result plus, for the few layouts that stack or sum, one leaf. ``copy=False``:
        no bytes; kernels come as permuted layouts, which cost speed in every matmul, and training the torch
        model on changes them. A leaf that the template has on other devices goes there part by part from the
        host, one leaf at a time, never whole to one device; that is a copy, so ``copy=False`` raises.

    >>> import torch
    >>> from flax import nnx
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = to_flax(module, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> bool((twin.kernel[...] == module.weight.detach().numpy().T).all())
    True
    """
    refuse_in_fork("convert weights")
    _check_options(strict, copy)
    torch_tree, flax_tree, given = read_sides(source, template, rules)
    plan = make_plan(torch_tree, flax_tree, given)
    plan.report.raise_unless_ok(f"convert {_name(source)} to {_name(template)}", strict=strict)
    plan.warn_of_assumptions(stacklevel=2)
    _refuse_holes(plan, flax_tree)
    plan.warn_of_what_is_left(stacklevel=2)
    laid_out: dict[Path, torch.Tensor] = {}
    views: list[Path] = []
    elsewhere: dict[Path, jax.Array] = {}
    shardings = {leaf.path: sharding_of(leaf) for leaf in flax_tree.root.flat().values()}
    for move in plan.moves:
        tensors = [_bare(torch_tree.state[key]) for key in move.torch_keys]
        # What has no source is made where the sources are.
        with nullcontext() if tensors else torch_tree.device:
            made = move.layout.forward(tensors)
        for path, tensor in zip(move.flax_paths, made, strict=True):
            if (sharding := shardings[path]) is not None:
                if copy is False and not _shares(tensor, tensors):
                    _made(tensor, path, copy)
                elsewhere[path] = place_on_sharding(tensor, sharding, join_path(path), copy)
                continue
            if _shares(tensor, tensors):
                views.append(path)
            else:
                tensor = _made(tensor, path, copy)
            laid_out[path] = tensor
    if copy:
        _make_own(laid_out, views)
    filled = flax_tree.fill(elsewhere | _cross(laid_out, None if copy else copy))
    if isinstance(source, nn.Module) and (layers := live_nnx(flax_tree)):
        compare_settings(torch_tree, layers, plan).warn_unless_ok(stacklevel=2)
    return filled


def to_state_dict(
    source: Any,
    template: nn.Module | Mapping[str, Any],
    *,
    rules: Iterable[UserRule] = (),
    strict: bool = True,
    copy: bool | None = True,
) -> dict[str, Any]:
    """A ``state_dict`` with the weights of a Flax model, fit for ``template.load_state_dict``.

    Args:
        source: An ``nnx.Module``, an ``nnx.State`` or linen variables, with arrays in them.
        template: The ``nn.Module`` to fill (it is only read), or a ``state_dict`` with its keys. It also
            gives what Flax does not hold: ``num_batches_tracked`` and a module's extra state.
        rules: As for `to_flax`; the same rules serve both ways.
        strict: With ``False``, a Flax leaf without place is left out, and a key without source keeps the
            template's value. A mismatch or an ambiguity raises all the same.
        copy: ``True`` gives row-major tensors in memory of their own; ``False`` gives views of JAX's memory
            (do not write to them) and raises where there can be none; ``None`` views where possible.

    Returns:
        The keys of the template, in its order, with tensors of its shapes and of the source's dtypes. Tied
        keys share one tensor. `to_state_dict` of `to_flax` is bitwise the original.

    Raises:
        PlanError: Source and template do not fit, two different leaves would fill one tied tensor, or the
            source holds no arrays; the message lists every fault.
        ExchangeError: An array cannot cross.
        TypeError: ``copy`` or ``strict`` is none of the values above.

    Warns:
        PairingWarning: Names, classes and shapes leave a choice, and the usual one was taken.
        PartialWarning: ``strict=False`` left something out; the message lists it, and so does `Plan.left_out`.

    Memory:
        ``copy=True``: the result plus, where parts are concatenated, one tensor. A leaf that lies on several
        devices is gathered on the host, which ``copy=False`` refuses.

    A template on the meta device has no values to keep: ``num_batches_tracked`` is then zero.

    >>> import torch
    >>> from flax import nnx
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = to_flax(module, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> back = to_state_dict(twin, module)
    >>> all(torch.equal(back[key], value) for key, value in module.state_dict().items())
    True
    """
    refuse_in_fork("convert weights")
    _check_options(strict, copy)
    torch_tree, flax_tree, given = read_sides(template, source, rules)
    plan = make_plan(torch_tree, flax_tree, given)
    plan.report.raise_unless_ok(f"convert {_name(source)} to {_name(template)}", strict=strict)
    plan.warn_of_assumptions(stacklevel=2)
    leaves = {leaf.path: leaf for leaf in flax_tree.root.flat().values()}
    filled: dict[str, torch.Tensor] = {}
    views: list[str] = []
    lost: list[str] = []
    for move in plan.moves:
        names = [join_path(path) for path in move.flax_paths]
        arrays = to_torch(
            {name: _values(leaves[path], copy) for name, path in zip(names, move.flax_paths, strict=True)}
        )
        tensors = [arrays[name] for name in names]  # by name: a pytree's dict comes back sorted
        before = [_bare(torch_tree.state[key]) for key in move.torch_keys]
        try:
            back = _back(move, tensors, _known(before))
        except PlanError as err:
            if strict or move.torch_keys:
                raise
            lost.append(f"lost: {err}")
            continue
        for key, tensor, old in zip(move.torch_keys, back, before, strict=True):
            if _WIDER.get(tensor.dtype) == old.dtype:
                tensor = tensor.to(old.dtype)  # JAX keeps 64-bit integers in 32 bits with x64 off
            # A sum gives its terms back as the template has them: views too, of the template.
            if _shares(tensor, tensors) or (copy and _shares(tensor, before)):
                views.append(key)
            else:
                tensor = _made(tensor, (key,), copy)
            filled[key] = tensor
    plan.warn_of_what_is_left(lost, stacklevel=2)
    if copy:
        _make_own(filled, views)
    _settle_ties(filled, torch_tree)
    for key, twin in plan.ties:
        filled[key] = filled[twin]
    return {
        key: filled[key] if key in filled else _kept(key, value, copy)
        for key, value in torch_tree.state.items()
    }


_WIDER = {torch.int32: torch.int64, torch.uint32: torch.uint64}


def _back(
    move: Move, tensors: Sequence[torch.Tensor], was: Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    """The tensors of a move as torch holds them, or an error that names them."""
    try:
        return move.layout.inverse(tensors, was)
    except ValueError as err:
        paths = "', '".join(join_path(path) for path in move.flax_paths)
        raise PlanError(f"'{paths}' cannot go back to torch: {err}.") from err


def _check_options(strict: object, copy: object) -> None:
    """Raise for what Python would take for true or false: ``copy="no"`` asks for no copy."""
    check_copy(copy)
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False; got {strict!r}.")


# --- memory ------------------------------------------------------------------------------------------


def _cross(tensors: Mapping[Path, torch.Tensor], copy: bool | None) -> dict[Path, jax.Array]:
    """Every tensor as an array; a fault names its path."""
    try:
        return dict(zip(tensors, to_jax(list(tensors.values()), copy=copy), strict=True))
    except ExchangeError:  # once more, under names
        to_jax({join_path(path): tensor for path, tensor in tensors.items()}, copy=copy)
        raise


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """The values alone: converting weights is no operation of autograd."""
    return tensor.detach() if tensor.requires_grad else tensor


def _made(tensor: torch.Tensor, path: Path, copy: bool | None) -> torch.Tensor:
    """A tensor that its layout has just made, if ``copy`` admits that; row-major if it asks for that."""
    if copy is False:
        raise ShareError(
            f"cannot share '{join_path(path)}' under copy=False: its layout moves bytes. "
            "Pass copy=None to let it be copied."
        )
    return fresh([tensor])[0] if copy and not tensor.is_contiguous() else tensor


def _make_own(tensors: dict[Key, torch.Tensor], views: Sequence[Key]) -> None:
    """Put copies in row-major memory of their own where there are views, all in one go."""
    tensors.update(zip(views, fresh([tensors[key] for key in views]), strict=True))


def _shares(tensor: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
    if not tensor.numel():
        return True
    block = tensor.untyped_storage().data_ptr()
    return any(block == source.untyped_storage().data_ptr() for source in sources)


# --- what a side has and has not -----------------------------------------------------------------------


_HOLE = (
    "it has no source in torch, and the abstract template has no value to keep; pass a concrete template, which "
    "keeps its own"
)


def _refuse_holes(plan: Plan, tree: FlaxTree) -> None:
    """With strict=False some leaves keep the template's value: an abstract template has none."""
    filled = {path for move in plan.moves for path in move.flax_paths}
    holes = [Fault("missing", _HOLE, join_path(path)) for path in tree.holes(filled)]
    Report(tuple(holes)).raise_unless_ok("fill the template", strict=True)


def _values(leaf: FlaxLeaf, copy: bool | None) -> Any:
    """The array of a leaf, as something that crosses to torch."""
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise PlanError(
            f"'{join_path(leaf.path)}' of the source is a jax.ShapeDtypeStruct, with a shape but no values: "
            "pass a concrete module or concrete variables."
        )
    return crossing(leaf.value, copy)


def _known(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
    """What stood on the torch side before, if it has values."""
    return None if any(tensor.is_meta for tensor in tensors) else tensors


def _settle_ties(filled: Mapping[str, torch.Tensor], tree: TorchTree) -> None:
    """Raise if two keys that are one tensor in torch came out of Flax with different values."""
    faults = [
        Fault("ambiguous", f"it is the same tensor as '{first}' in torch, but Flax holds two values", key)
        for key, first in tree.ties.items()
        if key in filled and first in filled and not same_bits(filled[key], filled[first])
    ]
    Report(tuple(faults)).raise_unless_ok("fill the tied tensors", strict=True)


def _kept(key: str, value: Any, copy: bool | None) -> Any:
    """What Flax has no image of, as the template has it."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_meta:
        return value.detach().clone() if copy else value.detach()
    if key.rpartition(".")[2] == "num_batches_tracked":
        return torch.zeros(value.shape, dtype=value.dtype)
    raise PlanError(
        f"'{key}' has no source, and the template is on the meta device and has no value to keep."
    )


def _name(thing: Any) -> str:
    kind = type(thing).__name__
    return f"a {kind}" if not isinstance(thing, Mapping) else f"a {kind} of {len(thing)} entries"
