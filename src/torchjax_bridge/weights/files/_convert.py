"""`convert`: writes a checkpoint in another framework or format, one tensor at a time."""

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from torch import nn

from torchjax_bridge.errors import CheckpointError

from .._audit import compare_settings
from .._audit_report import Audit
from .._example import read_example
from .._plan import Plan, UserRule, read_sides
from ..layouts import as_bytes
from ..trees import live_nnx, read_flax
from ._leaf import Checkpoint, Format, Framework, Leaf, Progress
from ._load_save import AnyPath
from ._match_template import match_template
from ._open import open_checkpoint
from ._pipeline import window_for
from ._route import cast, route_to_flax, route_to_torch
from ._shard_shapes import shard_shapes
from ._write import MEMORY, format_for, write_checkpoint

__all__ = ["Converted", "Route", "convert", "find_route", "framework_of"]

_OWN_PREFIX = "torchjax_bridge."


@dataclass(frozen=True)
class Route:
    """What a conversion would do.

    Attributes:
        source: The checkpoint to read.
        to: The framework of the target.
        leaves: The leaves of the target, in the order in which they are written.
        plan: How weights of one framework become those of the other; None within one framework.
        notes: The metadata of the target.
        settings: The settings of the two live models, compared; None unless both were given, Flax as a live
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
        """Bytes of the target's values."""
        return sum(leaf.nbytes for leaf in self.leaves)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        plan: As in `Route`.
        files: The files that were written.
        nbytes: Bytes of the values.
        leaves: The number of tensors.
        note: How the source was read, if a reader should know; or empty.
        left: Entries of the source's metadata that the target's format cannot store.
        settings: As in `Route`.
        waiting: The numbers of the parts that are not finished, if this was one of several; until all are, there
            are no files.
    """

    plan: Plan | None
    files: tuple[pathlib.Path, ...]
    nbytes: int
    leaves: int
    note: str = ""
    left: tuple[str, ...] = ()
    settings: Audit | None = None
    waiting: tuple[int, ...] = ()


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    to: Framework,
    format: Format | None = None,
    model: nn.Module | None = None,
    template: Any = None,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    memory: int = MEMORY,
    shard_size: int | None = None,
    key: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    part: tuple[int, int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Route], Progress] | None = None,
) -> Converted:
    """Convert a checkpoint of any size on disk; the target appears only when it is complete.

    Args:
        source: A file or folder of any format that `open_checkpoint` reads.
        target: A file, by its suffix (``.safetensors``, ``.pt``, ``.msgpack``); any other name is a folder,
            with the shards of the source.
        to: The framework of the target. To Flax, a ``template`` is needed; to torch, a ``model``. Within one
            framework, neither is.
        format: By default that of the target's suffix; without one, safetensors.
        model: The torch module, best on the meta device. It shows the classes of its layers.
        template: The Flax side, best abstract: from ``nnx.eval_shape`` or ``jax.eval_shape``.
        rules: As for `to_flax`.
        inputs: What ``model`` takes, as for `to_flax`.
        kwargs: Keyword arguments that it takes.
        dtype: Cast floating-point tensors to this.
        memory: Bytes to hold in addition to the largest leaf.
        shard_size: The bytes of one file in a folder.
        key: Which entry of a torch file or a DCP checkpoint is the ``state_dict``.
        mesh: Gives the names of axes in the template a size, without devices: ``AbstractMesh((8,), ("x",))``.
            Orbax stores a leaf in chunks that lie in one shard of the template each.
        part: Which part of how many this process converts, as ``(0, 4)``, to Orbax or DCP. The processes share only
            the folder of the target; the last to finish joins the parts. All are called with the same arguments.
        resume: Keep the shards or blocks that an earlier, killed run of the same conversion finished, with
            ``resume`` or without. Shards of another source, another ``key`` or another plan are refused.
        overwrite: Replace an existing checkpoint.
        progress: Called with the route before anything is written. It returns a function that is called with the
            bytes of each leaf.

    Returns:
        The plan, the files and their size. If both sides are live models, ``settings`` lists the settings that
        differ, which no checkpoint stores. The user's metadata in a safetensors header is copied to the headers
        of the target.

    Raises:
        PlanError: The two sides do not fit; the message lists every fault.
        ArgumentError: ``inputs`` are given without a model, or it fails on them.
        CheckpointError: The source is damaged, or the target cannot be written. Nothing is left behind, but what
            ``resume`` or another part may go on with.

    Warns:
        PairingWarning: Names, classes and shapes allow several conversions, and the usual one was assumed.

    Memory:
        The largest leaf and ``memory``. For an Orbax or DCP target only ``memory``, if the source can be read in
        slices (all can but a torch file from before torch 1.6, which is read into memory whole).
    """
    if mesh is not None and (to, format_for(pathlib.Path(target), to, format)) != ("flax", "orbax"):
        raise CheckpointError(
            "mesh= has no effect here: it cuts Orbax output by the axes that a template names. Leave it out, or "
            "pass format='orbax' and to='flax'."
        )
    route = find_route(
        source,
        to=to,
        model=model,
        template=template,
        rules=rules,
        inputs=inputs,
        kwargs=kwargs,
        dtype=dtype,
        key=key,
        memory=memory,
    )
    if route.plan is not None:
        route.plan.report.raise_unless_ok(f"convert {route.source.path} to {to}", strict=True)
        route.plan.warn_of_assumptions(stacklevel=2)
    # A template of torch weights only names them: what is written has other shapes.
    shards = shard_shapes(template, mesh) if template is not None and to == "flax" else {}
    on_leaf = None if progress is None else progress(route)
    written = write_checkpoint(
        route.leaves,
        pathlib.Path(target),
        framework=to,
        format=format,
        metadata=route.notes,
        memory=memory,
        shard_size=shard_size,
        work=lambda: _work_id(route, key),
        shards=shards,
        part=part,
        resume=resume,
        overwrite=overwrite,
        progress=on_leaf,
    )
    has_header = format_for(pathlib.Path(target), to, format) == "safetensors"
    left = () if has_header else tuple(_user_metadata(route.source))
    return Converted(
        route.plan,
        tuple(written.files),
        route.nbytes,
        len(route.leaves),
        route.source.note,
        left,
        route.settings,
        written.waiting,
    )


def find_route(
    source: AnyPath | Checkpoint,
    *,
    to: Framework,
    model: nn.Module | None = None,
    template: Any = None,
    rules: Iterable[UserRule] = (),
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    key: str | None = None,
    memory: int = MEMORY,
) -> Route:
    """What `convert` would do with these arguments, including the faults of its plan; writes nothing.

    Raises:
        CheckpointError: The source is damaged, its framework is unknown, or the other side was not given.
    """
    rules = tuple(rules)
    example = read_example(model, inputs, kwargs)
    if to not in ("torch", "flax"):
        raise CheckpointError(f"to={to!r} is not a framework: pass 'flax' or 'torch'.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(f"{dtype!r} is not a floating-point dtype: pass one, such as torch.bfloat16.")
    checkpoint = (
        source
        if isinstance(source, Checkpoint)
        else open_checkpoint(source, window=window_for(memory), key=key)
    )
    plan, metadata = None, {}
    if framework_of(checkpoint) == to:
        leaves = list(checkpoint.leaves.values())
        if to == "flax" and template is not None:
            match_template(checkpoint, read_flax(template))
        metadata = {name: text for name, text in checkpoint.metadata.items() if name.startswith(_OWN_PREFIX)}
    elif to == "flax":
        if template is None:
            raise CheckpointError(
                f"{checkpoint.path} holds torch weights, whose names in Flax depend on the Flax model: pass it as "
                "template=...."
            )
        plan, leaves, metadata = route_to_flax(checkpoint, model, template, rules, dtype, example)
    else:
        if model is None:
            raise CheckpointError(
                f"{checkpoint.path} holds Flax weights, whose names in torch depend on the torch model: pass it as "
                "model=...."
            )
        plan, leaves = route_to_torch(checkpoint, model, template, rules, dtype, example)
    if dtype is not None:
        leaves = [cast(leaf, dtype) for leaf in leaves]
    settings = None if plan is None else _compare_settings(model, template, plan, rules)
    return Route(checkpoint, to, tuple(leaves), plan, _user_metadata(checkpoint) | metadata, settings)


def _compare_settings(
    model: nn.Module | None, template: Any, plan: Plan, rules: tuple[UserRule, ...]
) -> Audit | None:
    if model is None or not isinstance(template, nnx.Module):
        return None
    torch_tree, flax_tree, _ = read_sides(model, template, rules)
    return compare_settings(torch_tree, live_nnx(flax_tree), plan)


def framework_of(checkpoint: Checkpoint) -> Framework:
    """The framework of a checkpoint, by its format, its metadata, or the last segment of its names.

    Raises:
        CheckpointError: None of these shows it.
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
            f"{checkpoint.path}: neither its metadata nor its names show whether it holds torch or Flax weights. "
            "Write 'format': 'pt' or 'flax' into its metadata."
        )
    return "flax" if flax else "torch"


def _user_metadata(source: Checkpoint) -> dict[str, str]:
    """The user's own metadata: without our entries, the framework, records of ties and the size."""
    known = {"format", "total_size", *source.leaves}
    return {
        name: text
        for name, text in source.metadata.items()
        if name not in known and not name.startswith(_OWN_PREFIX)
    }


def _work_id(route: Route, key: str | None) -> str:
    """What identifies a conversion: its files and when they were written, the ``key``, every layout.

    Machines that share a folder may know it by different names, so only the names of the files count.
    """
    path = route.source.path
    files = [path, *(path.parent / name for name in route.source.shards)]
    if path.is_dir():
        # The target may be inside; its unfinished folder grows meanwhile.
        inside = (
            file for file in sorted(path.rglob("*")) if ".part/" not in file.relative_to(path).as_posix()
        )
        files = [file for file in inside if file.is_file()]
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    # Leaves of the same name, shape and dtype may have other values: of another entry, or in another layout.
    return repr((seen, key, route.plan and route.plan.moves, _model_digests(route)))


def _model_digests(route: Route) -> dict[str, str]:
    """A digest of each leaf that comes from the module in memory, which may differ when the work is resumed."""
    if route.plan is None or route.to != "torch":
        return {}
    sourced = {key for move in route.plan.moves for key in move.torch_keys} | {
        key for key, _ in route.plan.ties
    }
    return {
        leaf.name: hashlib.sha256(as_bytes(leaf.read().cpu().contiguous()).numpy().data).hexdigest()
        for leaf in route.leaves
        if leaf.name not in sourced
    }
