"""`convert`: a checkpoint into another, in another framework or format, one tensor at a time."""

import hashlib
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import CheckpointError

from .._audit import compare_settings
from .._audit_report import Audit
from .._plan import Plan, UserRule, read_sides
from ..trees import live_nnx
from ._leaf import Checkpoint, Format, Framework, Leaf, Progress
from ._load_save import AnyPath
from ._open import open_checkpoint
from ._pipeline import raw, window_of
from ._route import cast, route_to_flax, route_to_torch
from ._write import MEMORY, format_for, write_checkpoint

__all__ = ["Converted", "Route", "convert", "find_route", "framework_of"]

_OURS = "torchjax_bridge."


@dataclass(frozen=True)
class Route:
    """What a conversion would do.

    Attributes:
        source: What is read.
        to: The framework whose names and layouts come out.
        leaves: What comes out, in the order in which it is written.
        plan: How the weights of the two frameworks lie in each other; None when nothing is laid out anew.
        notes: What the target should carry.
        settings: How the two live models are set up, compared; None unless both sides were given, Flax as a live
            ``nnx.Module``.
    """

    source: Checkpoint
    to: Framework
    leaves: tuple[Leaf, ...]
    plan: Plan | None
    notes: dict[str, str]
    settings: Audit | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what comes out."""
        return sum(leaf.nbytes for leaf in self.leaves)


@dataclass(frozen=True)
class Converted:
    """What was done.

    Attributes:
        plan: As in `Route`.
        files: What was written.
        nbytes: Bytes of the values.
        leaves: How many tensors.
        note: What a reader should know of how the source was read; may be empty.
        left: Entries of the source's metadata for which the target's format has no place.
        settings: As in `Route`.
    """

    plan: Plan | None
    files: tuple[pathlib.Path, ...]
    nbytes: int
    leaves: int
    note: str = ""
    left: tuple[str, ...] = ()
    settings: Audit | None = None


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    to: Framework,
    format: Format | None = None,
    model: nn.Module | None = None,
    template: Any = None,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
    memory: int = MEMORY,
    shard_size: int | None = None,
    key: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Route], Progress] | None = None,
) -> Converted:
    """Convert a checkpoint on disk, however large; the target appears only when it is whole.

    Args:
        source: A file or folder of any format that `open_checkpoint` reads.
        target: A file, by its suffix (``.safetensors``, ``.pt``, ``.msgpack``); any other name is a folder,
            sharded as the source was.
        to: The framework whose names and layouts come out. From torch to Flax a ``template`` says what comes
            out; from Flax to torch a ``model`` does. Within one framework neither is needed.
        format: By default what the target's name says, and else safetensors.
        model: The torch module, best on the meta device; with it the layers' classes are known.
        template: The Flax side, best abstract: from ``nnx.eval_shape`` or ``jax.eval_shape``.
        rules: As for `to_flax`.
        dtype: Cast floating-point tensors to this.
        memory: Bytes to hold beside the largest leaf.
        shard_size: The bytes of one file of a folder.
        key: Which entry of a torch file is the ``state_dict``.
        resume: Keep the shards that an earlier, killed run of the same conversion finished, whether it was told
            to resume or not; what another source, another entry of it or another plan began is refused.
        overwrite: Replace a checkpoint that is there.
        progress: Given the route before anything is written, gives what is told the bytes of each leaf.

    Returns:
        The plan, the files and their size; where both sides are live models, ``settings`` says how they differ in
        what a checkpoint does not carry. Metadata that others wrote into the header of a safetensors file goes
        into the headers of the target.

    Raises:
        PlanError: The two sides do not fit; the message lists every fault.
        CheckpointError: The source is not sound, or the target cannot be written; nothing is left behind.

    Warns:
        PairingWarning: Names, classes and shapes leave a choice, and the usual one was taken.

    Memory:
        The largest leaf and ``memory``; Orbax targets must fit in ``memory`` whole, and torch files from before
        torch 1.6 are held whole.
    """
    route = find_route(
        source, to=to, model=model, template=template, rules=rules, dtype=dtype, key=key, memory=memory
    )
    if route.plan is not None:
        route.plan.report.raise_unless_ok(f"convert {route.source.path} to {to}", strict=True)
        route.plan.warn_of_assumptions(stacklevel=2)
    told = None if progress is None else progress(route)
    files = write_checkpoint(
        route.leaves,
        pathlib.Path(target),
        framework=to,
        format=format,
        metadata=route.notes,
        memory=memory,
        shard_size=shard_size,
        work=_identity(route, key),
        resume=resume,
        overwrite=overwrite,
        progress=told,
    )
    headed = format_for(pathlib.Path(target), to, format) == "safetensors"
    left = () if headed else tuple(_of_others(route.source))
    return Converted(
        route.plan, tuple(files), route.nbytes, len(route.leaves), route.source.note, left, route.settings
    )


def find_route(
    source: AnyPath | Checkpoint,
    *,
    to: Framework,
    model: nn.Module | None = None,
    template: Any = None,
    rules: Iterable[UserRule] = (),
    dtype: torch.dtype | None = None,
    key: str | None = None,
    memory: int = MEMORY,
) -> Route:
    """What `convert` would do with these arguments, without writing anything; the plan has its faults in it.

    Raises:
        CheckpointError: The source is not sound or not of a known framework, or the other side was not given.
    """
    rules = tuple(rules)
    if to not in ("torch", "flax"):
        raise CheckpointError(f"to={to!r} is no framework to convert to: say 'flax' or 'torch'.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{dtype!r} is no floating-point dtype to cast weights to: say torch.bfloat16.")
    found = (
        source
        if isinstance(source, Checkpoint)
        else open_checkpoint(source, window=window_of(memory), key=key)
    )
    since = framework_of(found)
    plan, notes = None, {}
    if since == to:
        leaves = list(found.leaves.values())
        notes = {name: text for name, text in found.metadata.items() if name.startswith(_OURS)}
    elif to == "flax":
        if template is None:
            raise CheckpointError(
                f"{found.path} holds torch weights, and names and shapes alone do not say what a Flax model calls "
                "them: give the model they go to as template=...."
            )
        plan, leaves, notes = route_to_flax(found, model, template, rules, dtype)
    else:
        if model is None:
            raise CheckpointError(
                f"{found.path} holds Flax weights, and names and shapes alone do not say what a torch model calls "
                "them: give the model they go to as model=...."
            )
        plan, leaves = route_to_torch(found, model, template, rules, dtype)
    if dtype is not None:
        leaves = [cast(leaf, dtype) for leaf in leaves]
    settings = None if plan is None else _settings(model, template, plan, rules)
    return Route(found, to, tuple(leaves), plan, _of_others(found) | notes, settings)


def _settings(
    model: nn.Module | None, template: Any, plan: Plan, rules: tuple[UserRule, ...]
) -> Audit | None:
    if model is None or not isinstance(template, nnx.Module):
        return None
    torch_tree, flax_tree, _ = read_sides(model, template, rules)
    return compare_settings(torch_tree, live_nnx(flax_tree), plan)


def framework_of(checkpoint: Checkpoint) -> Framework:
    """Whose names a checkpoint has: by its format, its metadata, or the last part of its names.

    Raises:
        CheckpointError: Nothing tells.
    """
    if checkpoint.framework is not None:
        return checkpoint.framework
    last = {name.rpartition(".")[2] for name in checkpoint.leaves}
    flax, torch_ = (
        last & {"kernel", "embedding", "scale"},
        last & {"weight", "running_mean", "in_proj_weight"},
    )
    if bool(flax) == bool(torch_):
        raise CheckpointError(
            f"{checkpoint.path}: neither its metadata nor its names say whether it holds torch or Flax weights. "
            "Write 'format': 'pt' or 'flax' into its metadata."
        )
    return "flax" if flax else "torch"


def _of_others(source: Checkpoint) -> dict[str, str]:
    """The metadata that is the user's: not ours, not the framework's name, no record of a tie, no size."""
    known = {"format", "total_size", *source.leaves}
    return {
        name: text
        for name, text in source.metadata.items()
        if name not in known and not name.startswith(_OURS)
    }


def _identity(route: Route, key: str | None) -> str:
    """What makes a conversion what it is: its files and when they were written, the entry, every layout."""
    path = route.source.path
    files = [path, *(path.parent / name for name in route.source.shards)]
    seen = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    # Leaves of one name, shape and dtype may still be other values: of another entry, or laid out otherwise.
    return repr((seen, key, route.plan and route.plan.moves, _from_the_model(route)))


def _from_the_model(route: Route) -> dict[str, str]:
    """What comes from the module in memory, which may be another by the time of a resume: a digest by key."""
    if route.plan is None or route.to != "torch":
        return {}
    sourced = {key for move in route.plan.moves for key in move.torch_keys} | {
        key for key, _ in route.plan.ties
    }
    return {
        leaf.name: hashlib.sha256(raw(leaf.read().cpu().contiguous()).numpy().data).hexdigest()
        for leaf in route.leaves
        if leaf.name not in sourced
    }
