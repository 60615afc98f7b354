"""Checks of all moves together: leaves that are filled twice or not at all, dtypes, and notes for the reader.

Reads moves and both trees; matches nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import torch

from torchjax_bridge.errors import DtypeError
from torchjax_bridge.exchange import Path, jax_dtype, join_path, x64

from ._report import Fault
from .moving import cast_to
from .pairing import RAW, Move, separate_leaf_notes
from .trees import FlaxLeaf, TorchTree

__all__ = ["dtype_faults", "group_by_text", "notes_on_moves", "paths_of", "twice_filled", "unfilled_arrays"]


def twice_filled(moves: Sequence[Move]) -> list[Fault]:
    """The faults of Flax leaves that two moves would fill."""
    faults: list[Fault] = []
    taken: dict[Path, tuple[str, ...]] = {}
    for move in moves:
        for path in move.flax_paths:
            if path in taken:
                message = f"{move.torch_keys} and {taken[path]} would both fill it"
                faults.append(Fault("ambiguous", message, join_path(path)))
            taken[path] = move.torch_keys
    return faults


def unfilled_arrays(leaves: Mapping[Path, FlaxLeaf], moves: Sequence[Move]) -> Iterable[Path]:
    """The plain arrays of nnx modules that torch does not have."""
    filled = {path for move in moves for path in move.flax_paths}
    return (path for path, leaf in leaves.items() if leaf.optional and path not in filled)


def dtype_faults(tree: TorchTree, moves: Sequence[Move], cast: torch.dtype | None = None) -> Iterable[Fault]:
    """The faults of tensors that JAX cannot hold in its present configuration, once they are cast."""
    wide = x64()
    for move in moves:
        for key in move.torch_keys:
            tensor = tree.state[key]
            if tensor.layout is not torch.strided:
                yield Fault("dtype", "it is a sparse tensor; call .to_dense() first", key, key)
            elif words := _cannot_cross(cast_to(tensor.dtype, cast), wide):
                yield Fault("dtype", words, key, key)


@lru_cache(maxsize=64)
def _cannot_cross(dtype: torch.dtype, wide: bool) -> str:
    """Why JAX cannot hold a dtype with this x64 setting; empty if it can."""
    try:
        wanted = jax_dtype(dtype)
    except DtypeError as err:
        return str(err)
    # 64-bit integers may cross as 32-bit ones if their values fit.
    if not wide and wanted in (np.float64, np.complex128):
        return (
            f"{dtype} needs x64, which is off; call module.float() first, or "
            'jax.config.update("jax_enable_x64", True)'
        )
    return ""


def group_by_text(found: Iterable[tuple[str, str]]) -> Iterable[str]:
    """One line for all layers with the same text."""
    layers: dict[str, list[str]] = {}
    for layer, words in found:
        layers.setdefault(words, []).append(layer)
    for words, named in layers.items():
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        yield f"{', '.join(named[:_MOST_NAMED])}{more}: {words}"


_MOST_NAMED = 4


def notes_on_moves(
    tree: TorchTree, moves: Sequence[Move], leaves: dict[Path, FlaxLeaf], cast: torch.dtype | None
) -> Iterable[str]:
    """Remarks that are no faults."""
    differ: list[tuple[str, str]] = []
    for move in moves:
        name = " + ".join(move.torch_keys) or paths_of(move)
        if move.note:
            yield f"{name}: {move.note}"
        if not move.layout.lossless:
            yield f"{name}: {move.layout}; the way back needs the torch module as its template to be exact"
        if move.rule == RAW:
            yield from _other_role(tree, move, leaves)
        dtypes = {tree.state[key].dtype for key in move.torch_keys}
        for path in move.flax_paths:
            theirs = leaves[path].dtype
            if any(not _same_dtype(dtype, theirs) for dtype in dtypes):
                ours = ", ".join(sorted(map(str, dtypes)))
                given = cast is not None and all(dtype.is_floating_point for dtype in dtypes)
                become = f"are cast to {cast}" if given else "cross with the dtype they have"
                differ.append((name, f"{ours} in torch, {theirs} in Flax; values {become}"))
    yield from group_by_text(differ)
    for path in unfilled_arrays(leaves, moves):
        if isinstance(leaves[path].value, jax.ShapeDtypeStruct):
            yield (
                f"{join_path(path)}: a plain array that torch does not have, and an abstract template has no "
                "value for it; fill a concrete template"
            )
    yield from separate_leaf_notes(tree, moves)


def _other_role(tree: TorchTree, move: Move, leaves: dict[Path, FlaxLeaf]) -> Iterable[str]:
    """Notes on buffers that Flax trains, and on parameters that it does not train."""
    for key in move.torch_keys:
        buffer = tree.is_buffer(key)
        if buffer is False and any(leaves[path].optional for path in move.flax_paths):
            yield f"{key}: a parameter in torch and a plain array in Flax, which no optimizer trains"
        for collection in {leaves[path].collection for path in move.flax_paths}:
            if buffer and collection == "params":
                yield f"{key}: a buffer in torch and a parameter in Flax, where optimizers train it"
            elif buffer is False and collection not in ("params", ""):
                yield f"{key}: a parameter in torch and in '{collection}' in Flax, where no optimizer trains it"


@lru_cache(maxsize=256)
def _same_dtype(ours: torch.dtype, theirs: Any) -> bool:
    return str(ours).removeprefix("torch.") == str(theirs)


def paths_of(move: Move) -> str:
    return " + ".join(join_path(path) for path in move.flax_paths) or "(nothing)"
