"""Decides where tied tensors go: one Flax leaf for all of their names, or a leaf for each.

``_ties`` has found which names are tied, and the matching what fits where. This file removes the faults that
a tie explains.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from torchjax_bridge.exchange import Path, join_path

from .._report import Fault
from ..layouts import same_bits
from ..trees import TorchTree
from ._bind import Match, Move

__all__ = ["separate_leaf_notes", "settle_ties"]


def settle_ties(tree: TorchTree, match: Match) -> tuple[dict[str, str], list[Fault]]:
    """The ties, and the faults without those of tensors that have a place under another key."""
    moved = {tree.ties.get(key, key): key for move in match.moves for key in move.torch_keys}
    ties, faults = {}, []
    for key in match.keeps:  # a key that stays in torch, but crosses under another name
        twin = moved.get(tree.ties.get(key, key))
        if twin is not None:
            ties[key] = twin
    for fault in match.faults:
        twin = moved.get(tree.ties.get(fault.subject, fault.subject))
        if fault.kind == "unexpected" and twin is not None:
            ties[fault.subject] = twin
        else:
            faults.append(_perhaps_tied(tree, fault, moved.values()) if fault.kind == "unexpected" else fault)
    return ties, faults


def _perhaps_tied(tree: TorchTree, fault: Fault, moved: Iterable[str]) -> Fault:
    """The fault, with a hint if a copied or saved ``state_dict`` may hold a tied tensor twice."""
    lost = tree.state.get(fault.subject)
    if tree.module is not None or lost is None or not _has_telling_values(lost):
        return fault
    twin = next(
        (key for key in moved if _has_telling_values(tree.state[key]) and same_bits(tree.state[key], lost)),
        None,
    )
    if twin is None:
        return fault
    return replace(
        fault,
        message=f"{fault.message}; it holds the same values as '{twin}', and a state_dict that was saved or copied "
        "does not say whether the two are tied: pass the nn.Module, or leave this key out if they are",
    )


def _has_telling_values(tensor: torch.Tensor) -> bool:
    """Whether another tensor is unlikely to have the same values by chance; not so for all ones or zeros."""
    plain = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj())
    if not plain or tensor.ndim < 2 or not tensor.numel():
        return False
    return not same_bits(tensor.reshape(-1)[:1].expand(tensor.numel()), tensor.reshape(-1))


def separate_leaf_notes(tree: TorchTree, moves: Sequence[Move]) -> Iterable[str]:
    """A note for each tied tensor that has several leaves in Flax."""
    tied = {*tree.ties, *tree.ties.values()}
    holders: dict[str, list[Path]] = {}
    for move in moves if tied else ():
        for key in tied.intersection(move.torch_keys):
            holders.setdefault(tree.ties.get(key, key), []).extend(move.flax_paths)
    for key, paths in holders.items():
        if len(set(paths)) > 1:
            places = ", ".join(sorted({join_path(path) for path in paths}))
            yield (
                f"{key}: one tied torch tensor is separate Flax leaves ({places}), which training may part; "
                "only equal values go back"
            )
