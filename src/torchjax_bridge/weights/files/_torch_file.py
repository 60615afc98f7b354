"""Files of ``torch.save``: read without running the code that a pickle may hold, and written leaf by leaf.

Only ``torch.load(weights_only=True)`` reads them. To write, ``torch.save`` makes a file without the values
(``torch.serialization.skip_data``), which are then written into their places.
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
from torchjax_bridge.exchange import dtensor_class

from ._find_state_dict import find_state_dict
from ._leaf import Checkpoint, Leaf, parse_path, view_key
from ._mapped import Window
from ._pipeline import Pipeline
from ._untrusted import extract_note, pickle_protocol, program_kind, resave_note

__all__ = ["ZIP", "read_torch_file", "torch_save", "write_torch_file"]

ZIP = b"PK\x03\x04"

# torch.load raises any of these for a truncated or altered file.
_DAMAGE_ERRORS = (
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
# The latest pickle protocol that torch.load(weights_only=True) reads (torch 2.13).
_SAFE_PROTOCOL = 2
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")


def read_torch_file(
    path: pathlib.Path, window: Window | None = None, shard: str = "", key: str | None = None
) -> Checkpoint:
    """The tensors of the ``state_dict`` in a file; other entries are ignored if there is only one.

    Args:
        path: The file.
        window: Bounds what stays mapped; with None the file is mapped once.
        shard: The name of this file in a sharded checkpoint.
        key: Which entry is the ``state_dict``, dotted, if there are several.

    Raises:
        CheckpointError: It is damaged, holds code, or holds no or several ``state_dict``.
    """
    source = _TorchFile(path, window, key)
    state, note = source.open()
    twins: dict[tuple[Any, ...], str] = {}
    leaves = {}
    for name, tensor in state.items():
        if isinstance(tensor, dtensor_class() or ()):
            raise _shards_only(path)
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: '{name}' is {tensor.layout} {tensor.dtype}: only dense tensors can be converted."
            )
        if tensor.is_meta:
            raise CheckpointError(f"{path}: '{name}' is on the meta device: it was saved without values.")
        twin = twins.setdefault(view_key(tensor), name) if tensor.numel() else name
        leaves[name] = Leaf(
            name,
            parse_path(name, path),
            tensor.dtype,
            tuple(tensor.shape),
            partial(source.tensor, name),
            shard,
            "" if twin == name else twin,
        )
    return Checkpoint(path, "pt", leaves, "torch", {}, note=note)


def _shards_only(path: pathlib.Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: it holds DTensors, and of each the shard of one process. Save with torch.distributed.checkpoint, "
        "whose folder is read as a whole; or save the state_dict that get_model_state_dict gathers with "
        "full_state_dict=True."
    )


def write_torch_file(leaves: Sequence[Leaf], file: BinaryIO, path: pathlib.Path, pipeline: Pipeline) -> None:
    """Write a ``state_dict`` as ``torch.save`` does.

    Args:
        leaves: The tensors; tied ones share one storage.
        file: Open for writing; its position afterwards is undefined.
        path: The path of ``file``, which is read for the offsets of the values.
        pipeline: Writes the leaves.
    """
    placeholders: dict[str, torch.Tensor] = {}  # never touched, so they take no memory
    own: list[Leaf] = []
    for leaf in leaves:
        if leaf.twin in placeholders:
            placeholders[leaf.name] = placeholders[leaf.twin]
        else:
            placeholders[leaf.name] = torch.empty(leaf.shape, dtype=leaf.dtype)
            own.append(leaf)
    with torch.serialization.skip_data():
        torch_save(placeholders, file)
    for leaf, place in zip(own, _data_offsets(path, len(own)), strict=True):
        pipeline.write(leaf, file, at=place)
    pipeline.flush()


def torch_save(values: Any, file: Any) -> None:
    """``torch.save``, with the error of the system where there was one.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        torch.save(values, file)
    except RuntimeError as err:
        if isinstance(err.__context__, OSError):  # which torch's own error follows
            raise err.__context__ from None
        raise


def _data_offsets(path: pathlib.Path, count: int) -> list[int]:
    """The offset of each storage in the file, in the order of torch.save."""
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
    """A memory-mapped torch file, mapped anew when the window has dropped it."""

    def __init__(self, path: pathlib.Path, window: Window | None, key: str | None) -> None:
        self._path = path
        self._window = window
        self._key = key
        self._state: dict[str, torch.Tensor] | None = None

    def open(self) -> tuple[dict[str, torch.Tensor], str]:
        content = _load(self._path)
        found, note = find_state_dict(content, self._path, self._key)
        others = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if others:
            names = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
            note = f"{note or 'a state_dict'}, without what is not a tensor: {names}"
        self._state = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return self._state, note

    def tensor(self, name: str) -> torch.Tensor:
        state = self._state if self._state is not None else self.open()[0]
        tensor = state[name].detach()
        if self._window is not None:
            self._window.add(self, tensor.nbytes)
        return tensor

    def release(self) -> None:
        self._state = None


def _load(path: pathlib.Path) -> Any:
    mapped = False
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller cannot change what torch warns of in old files
            # A file from before torch 1.6 cannot be mapped and is read whole.
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as err:
        if "to load DTensors" in str(err):
            raise _shards_only(path) from err
        refused = _REFUSED.search(str(err))
        if refused is None:
            protocol = pickle_protocol(path)
            if protocol <= _SAFE_PROTOCOL:
                raise CheckpointError(f"{path}: it is damaged or not a file of torch.save.") from err
            refusal = CheckpointError(
                f"{path}: it is pickled with protocol {protocol}, which torch cannot read without running code. "
                f"Save it with pickle_protocol={_SAFE_PROTOCOL}, the default."
            )
            refusal.add_note(resave_note(path))
            raise refusal from err
        refusal = CheckpointError(
            f"{path}: it holds a pickled {refused[1]}, and unpickling it could run code. Save only its state_dict "
            f"(in Python, torch.serialization.add_safe_globals allows {refused[1]}, if you trust it)."
        )
        refusal.add_note(resave_note(path))
        raise refusal from err
    except FileNotFoundError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    except PermissionError as err:
        raise CheckpointError(f"cannot read {path}: {err.strerror}.") from err
    except _DAMAGE_ERRORS as err:
        if mapped and (program := program_kind(path)) is not None:
            refusal = CheckpointError(
                f"{path}: it is {program}, not a file of torch.save: save its state_dict."
            )
            refusal.add_note(extract_note(path, program))
            raise refusal from err
        reason = (str(err).splitlines() or [type(err).__name__])[0].split(". ")[0]
        raise CheckpointError(
            f"{path}: it is truncated, damaged or not a file of torch.save: {reason[:200]}."
        ) from err
