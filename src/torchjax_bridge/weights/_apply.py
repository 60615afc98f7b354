"""`to_flax` and `to_state_dict`: run a plan in either direction, from memory to memory."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import jax
import torch
from jax.sharding import Sharding
from torch import nn

from torchjax_bridge.errors import ExchangeError, PlanError, ShareError
from torchjax_bridge.exchange import Path, check_copy, join_path, refuse_in_fork, to_jax, to_torch

from ._audit import compare_settings
from ._example import read_example
from ._plan import Plan, UserRule, make_plan, read_sides
from ._report import Fault, Report
from .layouts import same_bits
from .moving import WIDER, as_exchangeable, row_major_copies
from .pairing import Move
from .sharded import arrays_of_sharded, mesh_of, tensors_of_sharded
from .trees import FlaxLeaf, FlaxTree, TorchTree, live_nnx, place_on_sharding, sharding_of

__all__ = ["refuse_holes", "to_flax", "to_state_dict"]

Key = TypeVar("Key")


def to_flax(
    source: nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    strict: bool = True,
    copy: bool | None = True,
) -> Any:
    """The template, filled with the weights of a torch model.

    Args:
        source: An ``nn.Module`` or its ``state_dict``; the prefixes ``module.`` and ``_orig_mod.`` are ignored.
            A module shows the classes of its layers. For a ``state_dict`` they are inferred from the template,
            and an ambiguous one is refused.
        template: An ``nnx.Module`` (concrete, or abstract from ``nnx.eval_shape``), an ``nnx.State``, or
            linen variables (arrays, or the structs of ``jax.eval_shape``). It is not changed. An array of an nnx
            module that is not in a variable is filled if torch has a tensor of its name, and otherwise kept.
        rules: `Rule`, `Rename`, `LayerType`, `Flatten`, `Fused`, `Keep` and `Fill` objects, which say what the
            models do not show.
        inputs: What the torch model takes, as for `plan`: a copy of the module runs once, and shows who reads
            flattened maps. The Flax model is taken to flatten its own channels-last maps.
        kwargs: Keyword arguments that the torch model takes.
        strict: With ``False``, a torch tensor without a place is left out, and a leaf without a source keeps the
            template's value. A mismatch or an ambiguity still raises.
        copy: ``True`` gives row-major arrays in new memory; ``False`` gives views of the torch memory and
            raises where a view is impossible; ``None`` gives views where possible and copies elsewhere.

    Returns:
        A new object of the template's kind: a ready-to-call ``nnx.Module``, an ``nnx.State``, or
        variables. Arrays have the shapes of the template and the dtypes of the source. Random streams continue
        those of the template; those of an abstract template start from ``jax.random.key(0)``. An array gets the
        sharding of the template, if that has one: a struct with a sharding, an array over several devices, or
        names of axes (``nnx.with_partitioning``, linen's boxes) under ``jax.set_mesh``. Otherwise it stays on the
        device of the source.

    Raises:
        PlanError: Source and template do not fit; the message lists every fault.
        ArgumentError: ``inputs`` are given and the source cannot run, or fails on them.
        ExchangeError: A tensor cannot become an array: its values do not fit in 32 bits with x64 off, it has no
            memory, or ``copy=False`` is impossible.
        TypeError: ``copy`` or ``strict`` is none of the values above.

    Warns:
        PairingWarning: Names, classes and shapes allow several conversions, and the usual one was assumed.
        PartialWarning: ``strict=False`` left something out; the message lists it, and so does `Plan.left_out`.
        SettingsWarning: An nnx template has settings (epsilon, padding, ...) that differ from the ``nn.Module``'s
            and change its output; `audit` returns them as data. linen variables and an ``nnx.State`` have no
            settings to compare, not even the groups of a convolution; call `audit` with the live linen module.

    Memory:
        ``copy=True``: the result plus, for the few layouts that stack or sum, one leaf. ``copy=False``:
        no bytes; kernels have permuted layouts, which slow every matmul, and further training of the torch model
        changes them. A leaf with the sharding of a template goes to its devices shard by shard from the host, one
        leaf at a time. That is a copy, so ``copy=False`` raises.

    A source with ``DTensor``s (FSDP2, tensor parallelism) gives arrays over the same processes; every process must
    make the call. A leaf without a sharding of the template stays as it lies in torch. Nothing is sent unless the
    template, the layout or shards of unequal sizes ask for it; ``docs/sharded.md`` says when.

    >>> import torch
    >>> from flax import nnx
    >>> module = torch.nn.Linear(2, 3)
    >>> twin = to_flax(module, nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> bool((twin.kernel[...] == module.weight.detach().numpy().T).all())
    True
    """
    refuse_in_fork("convert weights")
    _check_options(strict, copy)
    example = read_example(source, inputs, kwargs)
    torch_tree, flax_tree, given = read_sides(source, template, rules)
    plan = make_plan(torch_tree, flax_tree, given, example=example)
    plan.report.raise_unless_ok(f"convert {_name(source)} to {_name(template)}", strict=strict)
    plan.warn_of_assumptions(stacklevel=2)
    refuse_holes(plan, flax_tree)
    plan.warn_of_what_is_left(stacklevel=2)
    shardings = {leaf.path: sharding_of(leaf) for leaf in flax_tree.root.flat().values()}
    device_mesh = mesh_of(torch_tree.state)
    if device_mesh is None:
        filled = flax_tree.fill(_arrays(plan.moves, torch_tree, shardings, copy))
    else:
        filled = flax_tree.fill(arrays_of_sharded(plan.moves, torch_tree.state, shardings, device_mesh, copy))
    if isinstance(source, nn.Module) and (layers := live_nnx(flax_tree)):
        compare_settings(torch_tree, layers, plan).warn_unless_ok(stacklevel=2)
    return filled


def _arrays(
    moves: Iterable[Move], torch_tree: TorchTree, shardings: Mapping[Path, Sharding | None], copy: bool | None
) -> dict[Path, jax.Array]:
    """The Flax leaves of a plan whose torch tensors are whole."""
    laid_out: dict[Path, torch.Tensor] = {}
    views: list[Path] = []
    sharded: dict[Path, jax.Array] = {}
    for move in moves:
        tensors = [_detached(torch_tree.state[key]) for key in move.torch_keys]
        # A constant, which has no source, is made on the device of the torch model.
        with nullcontext() if tensors else torch_tree.device:
            results = move.layout.forward(tensors)
        for path, tensor in zip(move.flax_paths, results, strict=True):
            if (sharding := shardings[path]) is not None:
                if copy is False and not _shares(tensor, tensors):
                    _copied_by_layout(tensor, path, copy)
                sharded[path] = place_on_sharding(tensor, sharding, join_path(path), copy)
                continue
            if _shares(tensor, tensors):
                views.append(path)
            else:
                tensor = _copied_by_layout(tensor, path, copy)
            laid_out[path] = tensor
    if copy:
        _copy_views(laid_out, views)
    return sharded | _to_arrays(laid_out, None if copy else copy)


def to_state_dict(
    source: Any,
    template: nn.Module | Mapping[str, Any],
    *,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    strict: bool = True,
    copy: bool | None = True,
) -> dict[str, Any]:
    """A ``state_dict`` with the weights of a Flax model, for ``template.load_state_dict``.

    Args:
        source: An ``nnx.Module``, an ``nnx.State`` or linen variables, all concrete.
        template: The ``nn.Module`` to fill (it is not changed), or a ``state_dict`` with its keys. It also
            provides what Flax does not have: ``num_batches_tracked`` and a module's extra state.
        rules: As for `to_flax`; the same rules work in both directions.
        inputs: As for `to_flax`, for a template that is an ``nn.Module``.
        kwargs: Likewise.
        strict: With ``False``, a Flax leaf without a place is left out, and a key without a source keeps the
            template's value. A mismatch or an ambiguity still raises.
        copy: ``True`` gives row-major tensors in new memory; ``False`` gives views of JAX's memory (do not write to
            them) and raises where a view is impossible; ``None`` gives views where possible.

    Returns:
        The keys of the template, in its order, with tensors of its shapes and of the source's dtypes. Tied
        keys share one tensor. `to_state_dict` of `to_flax` returns the original to the bit.

    Raises:
        PlanError: Source and template do not fit, two different leaves would fill one tied tensor, or the
            source holds no arrays; the message lists every fault.
        ArgumentError: ``inputs`` are given and the template cannot run, or fails on them.
        ExchangeError: An array cannot become a tensor.
        TypeError: ``copy`` or ``strict`` is none of the values above.

    Warns:
        PairingWarning: Names, classes and shapes allow several conversions, and the usual one was assumed.
        PartialWarning: ``strict=False`` left something out; the message lists it, and so does `Plan.left_out`.

    Memory:
        ``copy=True``: the result plus, where parts are concatenated, one tensor. A leaf that lies on several
        devices is gathered on the host, which ``copy=False`` refuses.

    Where the template has ``DTensor``s, so has the result, with their placements; every process must make the call.

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
    example = read_example(template, inputs, kwargs)
    torch_tree, flax_tree, given = read_sides(template, source, rules)
    plan = make_plan(torch_tree, flax_tree, given, example=example)
    plan.report.raise_unless_ok(f"convert {_name(source)} to {_name(template)}", strict=strict)
    plan.warn_of_assumptions(stacklevel=2)
    leaves = {leaf.path: leaf for leaf in flax_tree.root.flat().values()}
    device_mesh = mesh_of(torch_tree.state)
    if device_mesh is None:
        filled, lost = _tensors(plan.moves, leaves, torch_tree, copy, strict)
    else:
        filled, lost = tensors_of_sharded(
            plan.moves,
            {path: _concrete(leaf) for path, leaf in leaves.items()},
            torch_tree.state,
            torch_tree.ties,
            device_mesh,
            copy,
            strict,
        )
    plan.warn_of_what_is_left(lost, stacklevel=2)
    for key, twin in plan.ties:
        filled[key] = filled[twin]
    return {
        key: filled[key] if key in filled else _kept_value(key, value, copy)
        for key, value in torch_tree.state.items()
    }


def _tensors(
    moves: Iterable[Move],
    leaves: Mapping[Path, FlaxLeaf],
    torch_tree: TorchTree,
    copy: bool | None,
    strict: bool,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The torch tensors of a plan whose template is whole, and what ``strict=False`` lost."""
    filled: dict[str, torch.Tensor] = {}
    views: list[str] = []
    lost: list[str] = []
    for move in moves:
        names = [join_path(path) for path in move.flax_paths]
        arrays = to_torch(
            {name: _values(leaves[path], copy) for name, path in zip(names, move.flax_paths, strict=True)}
        )
        tensors = [arrays[name] for name in names]  # by name, since a dict comes back sorted from a pytree
        before = [_detached(torch_tree.state[key]) for key in move.torch_keys]
        try:
            restored = _invert(move, tensors, _previous_values(before))
        except PlanError as err:
            if strict or move.torch_keys:
                raise
            lost.append(f"lost: {err}")
            continue
        for key, tensor, old in zip(move.torch_keys, restored, before, strict=True):
            if WIDER.get(tensor.dtype) == old.dtype:
                tensor = tensor.to(old.dtype)
            # The inverse of a sum may return views of the template's own terms.
            if _shares(tensor, tensors) or (copy and _shares(tensor, before)):
                views.append(key)
            else:
                tensor = _copied_by_layout(tensor, (key,), copy)
            filled[key] = tensor
    if copy:
        _copy_views(filled, views)
    _check_ties(filled, torch_tree)
    return filled, lost


def _invert(
    move: Move, tensors: Sequence[torch.Tensor], previous: Sequence[torch.Tensor] | None
) -> tuple[torch.Tensor, ...]:
    """The torch tensors of a move; an error names its Flax paths."""
    try:
        return move.layout.inverse(tensors, previous)
    except ValueError as err:
        paths = "', '".join(join_path(path) for path in move.flax_paths)
        raise PlanError(f"'{paths}' cannot be converted to torch: {err}.") from err


def _check_options(strict: object, copy: object) -> None:
    """Refuse values that Python would silently take for a bool, such as ``copy="no"``."""
    check_copy(copy)
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False; got {strict!r}.")


# --- memory ------------------------------------------------------------------------------------------


def _to_arrays(tensors: Mapping[Path, torch.Tensor], copy: bool | None) -> dict[Path, jax.Array]:
    """All tensors as arrays; an error names the path."""
    try:
        return dict(zip(tensors, to_jax(list(tensors.values()), copy=copy), strict=True))
    except ExchangeError:  # repeated with names, for the message
        to_jax({join_path(path): tensor for path, tensor in tensors.items()}, copy=copy)
        raise


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, detached from autograd."""
    return tensor.detach() if tensor.requires_grad else tensor


def _copied_by_layout(tensor: torch.Tensor, path: Path, copy: bool | None) -> torch.Tensor:
    """A tensor that its layout has copied, made row-major under ``copy=True``; raises under ``copy=False``."""
    if copy is False:
        raise ShareError(
            f"cannot share '{join_path(path)}' under copy=False: its layout needs a copy. "
            "Pass copy=None to allow it."
        )
    return row_major_copies([tensor])[0] if copy and not tensor.is_contiguous() else tensor


def _copy_views(tensors: dict[Key, torch.Tensor], views: Sequence[Key]) -> None:
    """Replace views by copies in new row-major memory, all in one call."""
    tensors.update(zip(views, row_major_copies([tensors[key] for key in views]), strict=True))


def _shares(tensor: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
    if not tensor.numel():
        return True
    block = tensor.untyped_storage().data_ptr()
    return any(block == source.untyped_storage().data_ptr() for source in sources)


# --- values that only one side has ------------------------------------------------------------------------


_HOLE = (
    "it has no source in torch, and the abstract template has no value to keep; pass a concrete template, whose "
    "value is kept"
)


def refuse_holes(plan: Plan, tree: FlaxTree) -> None:
    """Refuse leaves that would keep a value of an abstract template, which has none."""
    filled = {path for move in plan.moves for path in move.flax_paths}
    holes = [Fault("missing", _HOLE, join_path(path)) for path in tree.holes(filled)]
    Report(tuple(holes)).raise_unless_ok("fill the template", strict=True)


def _values(leaf: FlaxLeaf, copy: bool | None) -> Any:
    """The array of a leaf, in a form that ``to_torch`` takes."""
    return as_exchangeable(_concrete(leaf), copy)


def _concrete(leaf: FlaxLeaf) -> Any:
    """The array of a leaf, which must have values."""
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise PlanError(
            f"'{join_path(leaf.path)}' of the source is a jax.ShapeDtypeStruct, with a shape but no values: "
            "pass a concrete module or concrete variables."
        )
    return leaf.value


def _previous_values(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
    """The torch tensors before the conversion, if they have values."""
    return None if any(tensor.is_meta for tensor in tensors) else tensors


def _check_ties(filled: Mapping[str, torch.Tensor], tree: TorchTree) -> None:
    """Refuse two keys of one torch tensor with different values from Flax."""
    faults = [
        Fault("ambiguous", f"it is the same tensor as '{first}' in torch, but Flax holds two values", key)
        for key, first in tree.ties.items()
        if key in filled and first in filled and not same_bits(filled[key], filled[first])
    ]
    Report(tuple(faults)).raise_unless_ok("fill the tied tensors", strict=True)


def _kept_value(key: str, value: Any, copy: bool | None) -> Any:
    """The template's value for a key that Flax does not have."""
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
