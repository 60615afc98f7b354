"""The docstring of an emitted file: what it was made from, how inputs are laid out, what it holds for."""

import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from torch import nn

__all__ = ["header"]

_WIDTH = 106


def header(module: nn.Module, notes: Sequence[str], given: Mapping[str, str] | None = None) -> str:
    """The docstring, without quotes.

    Args:
        module: The torch module.
        notes: What the port holds for.
        given: The modules that stay in torch, by the arguments that stand for them.
    """
    kind = type(module)
    made = (
        f"Made with torchjax-bridge {_version('torchjax-bridge')} from PyTorch {_version('torch')}, for Flax "
        f"{_version('flax')}. Images have their channels last: ``(N, H, W, C)``."
    )
    lines = [f"{kind.__name__} of {kind.__module__}, in Flax.", "", *textwrap.wrap(made, _WIDTH)]
    for note in notes:
        text = f"Holds for {note}".rstrip(".").replace("\\", "\\\\").replace('"', "'")
        lines += ["", *textwrap.wrap(f"{text}.", _WIDTH, break_long_words=False, break_on_hyphens=False)]
    for name, path in (given or {}).items():
        part = f'``TorchPart(net.get_submodule("{path}"))`` of torchjax_bridge.porting'
        lines += ["", *textwrap.wrap(f"``{name}`` is '{path}', which stays in torch: {part}.", _WIDTH)]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "(not installed)"
