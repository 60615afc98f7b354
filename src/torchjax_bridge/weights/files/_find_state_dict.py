"""Finds the ``state_dict`` in the content of a torch file, or lists the candidates in an error."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from torchjax_bridge._words import what_kind
from torchjax_bridge.errors import CheckpointError

__all__ = ["find_state_dict"]

_MAX_NAMES = 12  # of candidates in an error: an optimizer has one for every parameter


def find_state_dict(content: Any, path: pathlib.Path, key: str | None) -> tuple[Mapping[str, Any], str]:
    """The ``state_dict`` in the content of a file, and a phrase for the entry that it was.

    Raises:
        CheckpointError: There is none, there are several and no key, or the key names something else.
    """
    if key is not None:
        return _entry_at(content, path, key), f"the entry '{key}'"
    if _is_state(content):
        return content, ""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: it holds {what_kind(content)}, not a state_dict.")
    inner = [name for name, value in content.items() if isinstance(name, str) and _is_state(value)]
    if len(inner) == 1:
        return content[inner[0]], f"the entry '{inner[0]}'"
    if inner:
        names = _listed(inner)
        raise CheckpointError(f"{path}: it holds several state_dicts ({names}): choose one, with key=....")
    if deeper := list(_states(content)):
        names = _listed(deeper)
        raise CheckpointError(f"{path}: its entries hold state_dicts ({names}): choose one, with key=....")
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    raise CheckpointError(
        f"{path}: it is not a state_dict, a dict of named tensors: it holds {', '.join(others[:3]) or 'nothing'}."
    )


def _entry_at(content: Any, path: pathlib.Path, key: str) -> Mapping[str, Any]:
    if not isinstance(key, str):
        raise CheckpointError(f"{path}: key={key!r} is not the name of an entry, such as 'model'.")
    found = _lookup(content, key)
    if found is None:
        raise CheckpointError(f"{path}: there is no entry {key!r}{_advice(content, key)}")
    if not _is_state(found):
        raise CheckpointError(
            f"{path}: the entry {key!r} is not a state_dict, a dict of named tensors{_advice(content, key)}"
        )
    state: Mapping[str, Any] = found
    return state


def _lookup(content: Any, key: str) -> Any | None:
    """What a dotted key names; a name between the dots may itself contain dots."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    inner = (
        _lookup(content[name], key[len(name) + 1 :])
        for name in content
        if isinstance(name, str) and key.startswith(f"{name}.")
    )
    return next((found for found in inner if found is not None), None)


def _advice(content: Any, key: str) -> str:
    """The end of a sentence about a wrong key: the keys that exist."""
    if _is_state(content):
        return ": the file is one state_dict and needs no key."
    states = list(_states(content))
    if not states:
        names = ", ".join(repr(str(name)) for name in content) if isinstance(content, Mapping) else ""
        return f"; none of its entries is a state_dict ({names})." if names else "."
    near = get_close_matches(key, states, 1)
    what = "these entries are state_dicts" if len(states) > 1 else "this entry is a state_dict"
    return f"; {what}: {_listed(states)}." + (f" Did you mean {near[0]!r}?" if near else "")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(map(repr, names[:_MAX_NAMES])) + (f" and {more} more" if more > 0 else "")


def _states(content: Any, above: str = "") -> Iterator[str]:
    """The dotted keys of every state_dict inside, outer ones only."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if _is_state(value):
            yield f"{above}{name}"
        else:
            yield from _states(value, f"{above}{name}.")


def _is_state(value: Any) -> bool:
    """Whether this is a dict of named tensors; a module's extra state may be among them."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(tensor, torch.Tensor) for tensor in value.values())
        and all(
            isinstance(name, str) and (isinstance(tensor, torch.Tensor) or name.endswith("_extra_state"))
            for name, tensor in value.items()
        )
    )
