"""Files of ``torch.save``: read without running what a pickle may hold, written without holding the whole.

Reading goes through ``torch.load(weights_only=True)`` and nothing else. Writing lets ``torch.save`` lay out the
file with room for the values (``torch.serialization.skip_data``) and fills the room leaf by leaf.
"""

import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from functools import partial
from typing import Any, BinaryIO

import torch

from torchjax_bridge.errors import CheckpointError

from ._entries import find_state
from ._leaf import Checkpoint, Leaf, place_of, segments
from ._mapped import Window
from ._pipeline import Pump
from ._untrusted import extracting, pickle_protocol, program_in, resaving

__all__ = ["ZIP", "read_torch_file", "write_torch_file"]

ZIP = b"PK\x03\x04"

# What torch.load raises on a file that is cut short or altered depends on where.
_DAMAGE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    struct.error,
    AssertionError,
    ImportError,
    MemoryError,
    NotImplementedError,
    RecursionError,
)
# torch.load(weights_only=True) reads no later one (torch 2.13).
_SAFE_PROTOCOL = 2
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def read_torch_file(
    path: pathlib.Path, window: Window | None = None, shard: str = "", key: str | None = None
) -> Checkpoint:
    """The tensors of a ``state_dict``, or of the only one in a dict that holds more than that.

    Args:
        path: The file.
        window: Bounds what stays mapped; None maps once.
        shard: The name of this file in a sharded checkpoint.
        key: Which entry is the ``state_dict``, dotted, where there is more than one.

    Raises:
        CheckpointError: It is damaged, holds code, or it is not clear which tensors are meant.
    """
    source = _TorchFile(path, window, key)
    state, note = source.open()
    twins: dict[tuple[Any, ...], str] = {}
    leaves = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: '{name}' is {tensor.layout} {tensor.dtype}: only dense tensors convert."
            )
        if tensor.is_meta:
            raise CheckpointError(f"{path}: '{name}' is on the meta device: it was saved without values.")
        twin = twins.setdefault(place_of(tensor), name) if tensor.numel() else name
        leaves[name] = Leaf(
            name,
            segments(name, path),
            tensor.dtype,
            tuple(tensor.shape),
            partial(source.tensor, name),
            shard,
            "" if twin == name else twin,
        )
    return Checkpoint(path, "pt", leaves, "torch", {}, note=note)


def write_torch_file(leaves: Sequence[Leaf], file: BinaryIO, path: pathlib.Path, pump: Pump) -> None:
    """A ``state_dict`` as ``torch.save`` writes it.

    Args:
        leaves: What goes in; twins share one storage, as they did.
        file: Open at ``path`` for writing; afterwards its position means nothing.
        path: Where it lies, which is read once more for the places of the values.
        pump: Writes.
    """
    blank: dict[str, torch.Tensor] = {}  # never touched, so never real memory
    own: list[Leaf] = []
    for leaf in leaves:
        if leaf.twin in blank:
            blank[leaf.name] = blank[leaf.twin]
        else:
            blank[leaf.name] = torch.empty(leaf.shape, dtype=leaf.dtype)
            own.append(leaf)
    with torch.serialization.skip_data():
        torch.save(blank, file)
    for leaf, place in zip(own, _places(path, len(own)), strict=True):
        pump.feed(leaf, file, at=place)
    pump.flush()


def _places(path: pathlib.Path, count: int) -> list[int]:
    """Where the bytes of each storage begin, in the order in which torch.save met them."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            folder, _, number = info.filename.rpartition("/data/")
            if folder and number.isdecimal():
                file.seek(info.header_offset)
                name, extra = struct.unpack("<HH", file.read(30)[26:])  # the local header's own lengths
                found[int(number)] = info.header_offset + 30 + name + extra
    if sorted(found) != list(range(count)):
        raise RuntimeError(f"torch.save laid out {len(found)} storages for {count} tensors")
    return [found[number] for number in range(count)]


class _TorchFile:
    """A file that is loaded as a map, and loaded again once enough of it was read."""

    def __init__(self, path: pathlib.Path, window: Window | None, key: str | None) -> None:
        self._path = path
        self._window = window
        self._key = key
        self._state: dict[str, torch.Tensor] | None = None

    def open(self) -> tuple[dict[str, torch.Tensor], str]:
        content = _load(self._path)
        found, note = find_state(content, self._path, self._key)
        others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if others:
            left = f"without what is no tensor: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
            note = f"{note or 'a state_dict'}, {left}"
        self._state = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return self._state, note

    def tensor(self, name: str) -> torch.Tensor:
        state = self._state if self._state is not None else self.open()[0]
        tensor = state[name].detach()
        if self._window is not None:
            self._window.take(self, tensor.nbytes)
        return tensor

    def release(self) -> None:
        self._state = None


def _load(path: pathlib.Path) -> Any:
    mapped = False
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of in old files is not the caller's to mend
            # A file from before torch 1.6 cannot be mapped and is held as a whole.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as err:
        refused = _REFUSED.search(str(err))
        if refused is None:
            protocol = pickle_protocol(path)
            if protocol <= _SAFE_PROTOCOL:
                raise CheckpointError(f"{path}: it is damaged, or no file of torch.save.") from err
            refusal = CheckpointError(
                f"{path}: it is pickled with protocol {protocol}, which torch cannot read without running what is "
                f"in it. Save it with pickle_protocol={_SAFE_PROTOCOL}, the default."
            )
            refusal.add_note(resaving(path))
            raise refusal from err
        refusal = CheckpointError(
            f"{path}: it holds a pickled {refused[1]}, and unpickling that could run code. Save its state_dict "
            f"alone (in Python, torch.serialization.add_safe_globals admits {refused[1]} by name, if you trust it)."
        )
        refusal.add_note(resaving(path))
        raise refusal from err
    except FileNotFoundError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    except PermissionError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    except _DAMAGE as err:
        if mapped and (program := program_in(path)) is not None:
            refusal = CheckpointError(
                f"{path}: it is {program}, and no file of torch.save: save its state_dict."
            )
            refusal.add_note(extracting(path, program))
            raise refusal from err
        reason = (str(err).splitlines() or [type(err).__name__])[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: it is truncated, damaged or no file of torch.save: {reason[:200]}."
        ) from err
