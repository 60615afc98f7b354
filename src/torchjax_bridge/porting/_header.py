"""The docstring of an emitted file: what it was made from, how inputs are laid out, what it holds for."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from torch import nn

__all__ = ["header"]

_WIDTH = 106


# What a reader calls an input whose axes are not in torch's order, by their number.
_MOVED = {
    3: "Sequences are ``(N, L, C)``.",
    4: "Images are ``(N, H, W, C)``.",
    5: "Volumes are ``(N, D, H, W, C)``.",
}


def header(
    module: nn.Module,
    orders: Iterable[tuple[int, ...]],
    notes: Sequence[str],
    given: Mapping[str, str] | None = None,
    chosen: Mapping[str, str] | None = None,
) -> str:
    """The docstring, without quotes.

    Args:
        module: The torch module.
        orders: The order of axes in which each input comes in.
        notes: What the port holds for.
        given: The modules that stay in torch, by the arguments that stand for them.
        chosen: The parameters and buffers whose values in a new model are the port's choice, and which they are.
    """
    kind = type(module)
    ranks = {len(order) for order in orders if order != tuple(range(len(order)))}
    layouts = [text for rank, text in _MOVED.items() if rank in ranks] or [
        "Inputs are laid out as in PyTorch."
    ]
    made = (
        f"Made with torchjax-bridge {_version('torchjax-bridge')} from PyTorch {_version('torch')}, for Flax "
        f"{_version('flax')}. {' '.join(layouts)}"
    )
    lines = [f"{kind.__name__} of {kind.__module__}, in Flax.", "", *textwrap.wrap(made, _WIDTH)]
    for note in notes:
        text = f"Holds for {note}".rstrip(".").replace("\\", "\\\\").replace('"', "'")
        lines += ["", *textwrap.wrap(f"{text}.", _WIDTH, break_long_words=False, break_on_hyphens=False)]
    for name, path in (given or {}).items():
        part = f'``TorchPart(net.get_submodule("{path}"))`` of torchjax_bridge.porting'
        lines += ["", *textwrap.wrap(f"``{name}`` is '{path}', which stays in torch: {part}.", _WIDTH)]
    for text in _starts(chosen or {}):
        lines += ["", *textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def _starts(chosen: Mapping[str, str]) -> Iterator[str]:
    """What a new model does not start with as torch's does."""
    for what, start in (
        (
            "parameter",
            "small random numbers, the port's own choice: the code does not say for certain with which",
        ),
        ("buffer", "zeros: the values come with the weights"),
    ):
        names = [f"``{name}``" for name, kind in chosen.items() if kind == what]
        if names:
            plural, verb = ("s", "start") if len(names) > 1 else ("", "starts")
            yield f"In a new model the {what}{plural} {_listed(names)} {verb} as {start}."


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "(not installed)"
