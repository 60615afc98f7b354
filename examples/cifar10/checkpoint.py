"""Reads checkpoints (safetensors and torch files) and writes safetensors.

Reads torch files with ``weights_only=True`` only. Does not check which network a checkpoint fits.
"""

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchjax_bridge.errors import CheckpointError

from . import atomic

# Where training scripts put the state_dict when they save more than that.
_WRAPPERS = ("state_dict", "model_state_dict", "model")

# What `torch.load` raises on a file that is cut short depends on where the cut is.
_DAMAGE = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError, struct.error)


def read(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` in a file, on the CPU, without the ``module.`` that DataParallel puts before names.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.th`` as ``torch.save`` writes them: a ``state_dict``,
            or a dict that holds one as ``state_dict``, ``model_state_dict`` or ``model``.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds anything but tensors by name.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        state = _from_safetensors(path)
    elif path.suffix in {".pt", ".pth", ".th"}:
        state = _from_torch(path)
    else:
        raise CheckpointError(f"{path} is neither a .safetensors nor a .pt, .pth or .th file")
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a ``state_dict`` as safetensors; the file appears only when it is complete.

    Args:
        path: The file; an existing file is replaced.
        state: The tensors; written row-major.
        metadata: Texts for the header.
    """
    require_folder(path)
    import safetensors.torch  # here, so that a torch file is read without it

    row_major = {name: tensor.contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(row_major, dict(metadata or {}))
    with atomic.writer(path) as file:
        file.write(content)


def require_folder(path: Path) -> None:
    """Raise a `CheckpointError` if the folder of ``path`` does not exist; call it before minutes of work."""
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as err:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {err}") from err


def _from_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as err:
            raise CheckpointError(
                f"{path} is damaged, or holds more than tensors. It is not loaded, because that could run "
                "code. Save the state_dict alone, as safetensors."
            ) from err
        except _DAMAGE as err:
            reason = str(err).split("\n")[0].split(". ")[0] or type(err).__name__
            raise CheckpointError(f"{path} is truncated or not a torch file: {reason}") from err
    if isinstance(content, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state_dict")
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(f"{path} is not a state_dict of named tensors: see {', '.join(others)}")
    return dict(content)
