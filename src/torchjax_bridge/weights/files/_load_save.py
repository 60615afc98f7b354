"""`load_state_dict`, `load_flax`, `save_state_dict` and `save_flax`: a checkpoint to and from memory."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import torch
from torch import nn

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import CheckpointError
from torchjax_bridge.exchange import Path, join_path, split_path, to_jax, to_torch

from ..moving import as_exchangeable
from ..trees import place_on_sharding, read_flax, sharding_of
from ._leaf import Checkpoint, Format, Framework, Leaf, nest, view_key
from ._match_template import match_template
from ._open import open_checkpoint
from ._pipeline import read_all
from ._place import place_leaf
from ._write import format_for, write_checkpoint

__all__ = ["load_flax", "load_state_dict", "save_flax", "save_state_dict"]

AnyPath = str | os.PathLike[str]


def load_state_dict(path: AnyPath, *, copy: bool = False, key: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a torch checkpoint, by name.

    Args:
        path: A ``.safetensors``, ``.pt``, ``.pth``, ``.th`` or ``.bin`` file, an ``*.index.json``, a folder with
            one of these, or a folder of torch Distributed Checkpoint.
        copy: ``True`` reads the values into new memory.
        key: Which entry of a torch file or a DCP checkpoint is the ``state_dict``, dotted, if there are several.

    Returns:
        A ``state_dict`` on the CPU; names that were tied in a torch file are one tensor. A module's extra state
        is left out unless it is a tensor.

    Raises:
        CheckpointError: The file is damaged, holds code, or holds Flax weights.

    Memory:
        By default, tensors are views of the file's memory map. Values are read when they are first used. Writing
        to a tensor does not change the file. Replace such a file, never rewrite it in place. A torch file from
        before torch 1.6 cannot be mapped and is read whole. Tensors of a DCP checkpoint are copied together from
        its chunks.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> save_state_dict(folder + "/linear.safetensors", {"weight": torch.eye(2)})
    >>> load_state_dict(folder + "/linear.safetensors")
    {'weight': tensor([[1., 0.],
            [0., 1.]])}
    """
    checkpoint = open_checkpoint(pathlib.Path(path), key=key)
    if checkpoint.framework == "flax":
        raise CheckpointError(f"{path} holds Flax weights: read them with load_flax.")
    return _values(checkpoint, copy)


def load_flax(path: AnyPath, template: Any = None, *, copy: bool | None = None) -> Any:
    """The variables of a Flax checkpoint, as a nested dict or in a template.

    Args:
        path: A Flax-style ``.safetensors`` file (flat dotted names), its index, a ``.msgpack`` file, an Orbax
            checkpoint, or a folder with one of these.
        template: The ``nnx.Module``, ``nnx.State`` or linen variables to fill, concrete or abstract. It is not
            changed. Without one, a nested dict is returned, in which digits between dots are integers.
        copy: As for `to_jax`: ``None`` shares the file's memory map where possible, ``True`` never does.

    Returns:
        A nested dict of ``jax.Array``, or a new object of the template's kind, with its shardings as for `to_flax`.
        The dtypes are those of the file.

    Raises:
        CheckpointError: The file is damaged, holds torch weights, or does not fit the template.
        ExchangeError: JAX cannot hold a leaf (64-bit types with x64 off).

    Memory:
        With ``copy=None``, arrays that start on a 64-byte boundary are views of the file's memory map. In files of
        this library, these are all arrays whose size is a multiple of 64 bytes. Replace such a file, never rewrite
        it in place. A leaf that the template has on several devices is read in parts: each process reads the parts
        of its own devices (of an Orbax checkpoint, the stored chunks that these touch).

    >>> import tempfile, jax.numpy as jnp
    >>> folder = tempfile.mkdtemp()
    >>> save_flax(folder + "/flax.safetensors", {"params": {"Dense_0": {"kernel": jnp.ones((1, 2))}}})
    >>> load_flax(folder + "/flax.safetensors")
    {'params': {'Dense_0': {'kernel': Array([[1., 1.]], dtype=float32)}}}
    """
    checkpoint = open_checkpoint(pathlib.Path(path))
    if checkpoint.framework == "torch":
        raise CheckpointError(f"{path} holds torch weights: read them with load_state_dict, then to_flax.")
    if template is None:
        arrays = to_jax(read_all(checkpoint.leaves.values()), copy=copy)
        return nest({leaf.path: arrays[name] for name, leaf in checkpoint.leaves.items()}, path)
    tree = read_flax(template)
    found = match_template(checkpoint, tree)
    if holes := tree.holes(found):
        names = "', '".join(map(join_path, holes))
        raise CheckpointError(
            f"{path} has no '{names}', and the abstract template has no value to keep: pass a concrete template."
        )
    shardings = {leaf.path: sharding_of(leaf) for leaf in tree.root.flat().values()}
    elsewhere = {
        where: place_leaf(leaf, sharding, copy)
        if len(sharding.device_set) > 1
        else place_on_sharding(leaf.read(), sharding, join_path(where), copy)
        for where, leaf in found.items()
        if (sharding := shardings[where]) is not None
    }
    arrays = to_jax(
        {join_path(where): leaf.read() for where, leaf in found.items() if where not in elsewhere}, copy=copy
    )
    return tree.fill(
        {where: elsewhere[where] if where in elsewhere else arrays[join_path(where)] for where in found}
    )


def save_state_dict(
    path: AnyPath,
    source: nn.Module | Mapping[str, torch.Tensor],
    *,
    format: Format | None = None,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a ``state_dict``; the file appears only when it is complete.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.th``, ``.bin`` for a file of ``torch.save``; any other
            name is a folder, with ``model.safetensors`` or shards and their index in it, or a checkpoint of torch
            Distributed Checkpoint with ``format="dcp"``.
        source: A module or its ``state_dict``, on any device. It must hold only tensors.
        format: By default that of the suffix; without one, safetensors.
        shard_size: The bytes of one file in a folder; by default one file.
        metadata: Metadata for the header of a safetensors file.
        overwrite: With ``False``, refuse to replace an existing checkpoint.

    Raises:
        CheckpointError: It cannot be written; nothing is left behind, and an existing checkpoint stays.

    Memory:
        One tensor in addition to the source, if it is not row-major or is on another device.
    """
    if not isinstance(source, nn.Module | Mapping):
        raise CheckpointError(
            f"{what_kind(source)} holds no torch weights: pass an nn.Module or its state_dict."
        )
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    for name, tensor in state.items():
        _check_plain(name, tensor)
    first: dict[Any, str] = {}
    leaves = []
    _check_metadata(path, "torch", format, metadata)
    for name, tensor in state.items():
        place = tensor.device, view_key(tensor)
        twin = first.setdefault(place, name) if tensor.numel() else name
        leaves.append(_in_memory(split_path(name), name, tensor, "" if twin == name else twin))
    write_checkpoint(
        leaves,
        pathlib.Path(path),
        framework="torch",
        format=format,
        metadata=metadata,
        shard_size=shard_size,
        overwrite=overwrite,
    )


def save_flax(
    path: AnyPath,
    source: Any,
    *,
    format: Format | None = None,
    shard_size: int | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> None:
    """Write the variables of a Flax model; the file appears only when it is complete.

    Args:
        path: ``.safetensors`` (flat dotted names) or ``.msgpack``; any other name is a folder, with
            ``model.safetensors`` or shards in it, or an Orbax checkpoint with ``format="orbax"``.
        source: An ``nnx.Module``, an ``nnx.State`` or linen variables. Random streams and caches are not written.
        format: By default that of the suffix; without one, safetensors.
        shard_size: The bytes of one file in a folder; by default one file.
        metadata: Metadata for the header of a safetensors file.
        overwrite: With ``False``, refuse to replace an existing checkpoint.

    Raises:
        CheckpointError: It cannot be written; nothing is left behind, and an existing checkpoint stays.
        ExchangeError: A leaf has a dtype that torch does not have.

    Memory:
        One array in addition to the source. Arrays over the devices of several processes are written as Orbax: all
        processes call this at once, and each writes its own parts.
    """
    tree = read_flax(source)
    values = {leaf.path: leaf.value for leaf in tree.root.flat().values()}
    for where, value in values.items():
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            if format != "orbax":
                raise CheckpointError(
                    f"'{join_path(where)}' lies on devices of several processes: save it as Orbax "
                    "(format='orbax'), to which each process writes its own parts."
                )
            _check_metadata(path, "flax", format, metadata)
            format_for(pathlib.Path(path), "flax", format)
            if shard_size is not None:
                raise CheckpointError("shard_size has no effect on orbax, which stores chunks: leave it out.")
            from ._orbax import write_global  # importing orbax is slow

            write_global(values, pathlib.Path(path), overwrite)
            return
    arrays = {where: as_exchangeable(value) for where, value in values.items()}
    tensors = to_torch({join_path(where): array for where, array in arrays.items()})
    if len(tensors) < len(arrays):
        raise CheckpointError("two leaves have the same dotted name.")
    leaves = []
    _check_metadata(path, "flax", format, metadata)
    for where in arrays:
        tensor = tensors[join_path(where)]
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"'{join_path(where)}' is {what_kind(tensor)}: there are no values to save."
            )
        leaves.append(_in_memory(where, join_path(where), tensor))
    write_checkpoint(
        leaves,
        pathlib.Path(path),
        framework="flax",
        format=format,
        metadata=metadata,
        memory=1 << 62,  # no limit: the tree is already in memory
        shard_size=shard_size,
        overwrite=overwrite,
    )


def _values(checkpoint: Checkpoint, copy: bool) -> dict[str, torch.Tensor]:
    values = read_all(checkpoint.leaves.values())
    if not copy:
        return values
    own: dict[int, torch.Tensor] = {}
    return {name: own.setdefault(id(tensor), tensor.clone()) for name, tensor in values.items()}


def _check_metadata(
    path: AnyPath, framework: Framework, format: Format | None, metadata: Mapping[str, str] | None
) -> None:
    if metadata and (chosen := format_for(pathlib.Path(path), framework, format)) != "safetensors":
        raise CheckpointError(f"metadata needs the header of a safetensors file: {chosen} has none.")


def _check_plain(name: object, tensor: object) -> None:
    """Refuse what has no plain values that a file can store."""
    if not isinstance(name, str):
        raise CheckpointError(f"{name!r} is not a name for a tensor: the keys of a state_dict are strings.")
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"'{name}' is {what_kind(tensor)}: a state_dict to save holds only tensors.")
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else f"{tensor.dtype} with the layout {tensor.layout}"
        raise CheckpointError(f"'{name}' is {kind}: only dense tensors can be saved.")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise CheckpointError(
            f"'{name}' is {what_kind(tensor)}, which is not a plain tensor: convert it first (a DTensor with "
            "full_tensor())."
        )
    try:
        if tensor.is_meta:
            raise CheckpointError(f"'{name}' is on the meta device: there are no values to save.")
        tensor.data_ptr()
    except RuntimeError as err:
        raise CheckpointError(
            f"'{name}' has no values inside torch.func or torch.compile: save it outside of them."
        ) from err


def _in_memory(where: Path, name: str, tensor: torch.Tensor, twin: str = "") -> Leaf:
    return Leaf(name, where, tensor.dtype, tuple(tensor.shape), lambda: tensor, twin=twin)
