"""The docstring of an emitted file: what it was made from, the layout of inputs and outputs, what it holds for."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from torch import nn

from torchjax_bridge._words import listed
from torchjax_bridge.recording import Value, tensors_of

from ._axis_letters import AxisLetters
from ._model import Model
from ._placed import Axes, torch_order
from ._shape_text import shape_of

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
    model: Model,
    notes: Sequence[str],
    given: Mapping[str, str] | None = None,
    chosen: Mapping[str, str] | None = None,
) -> str:
    """The docstring, without quotes.

    Args:
        module: The torch module.
        model: Its translation, which knows the order of axes of each input and output.
        notes: What the port holds for.
        given: The modules that stay in torch, by the arguments that stand for them.
        chosen: The parameters and buffers whose values in a new model are the port's choice, and which they are.
    """
    kind = type(module)
    ranks = {len(order) for order in model.input_orders.values() if order != torch_order(len(order))}
    layouts = [text for rank, text in _MOVED.items() if rank in ranks] or [
        "Inputs are laid out as in PyTorch."
    ]
    layouts += _outputs(model, ranks)
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


def _outputs(model: Model, moved: set[int]) -> Iterator[str]:
    """How outputs are laid out of which another layout would be expected.

    Args:
        model: The translation.
        moved: How many axes those inputs have whose channels come last.
    """
    letters = AxisLetters(model.recording)
    result = model.recording.top.result
    values = [value for value in tensors_of(result) if value.dtype is not None]
    places = model.bodies[""].result_places
    found: dict[str, list[int]] = {}
    for number, (value, place) in enumerate(zip(values, places, strict=False), 1):
        if text := _unexpected(value, place.order, moved, letters):
            found.setdefault(text, []).append(number)
    for text, numbers in found.items():
        if len(numbers) == len(values):
            yield f"The output is {text}." if len(values) == 1 else f"Outputs are {text}."
        elif len(numbers) == 1:
            yield f"Output {numbers[0]} is {text}."
        else:
            yield f"Outputs {listed([*map(str, numbers)])} are {text}."


def _unexpected(value: Value, order: Axes, moved: set[int], letters: AxisLetters) -> str:
    """How an output is laid out; nothing where that is as a reader of the header expects it."""
    rank = len(order)
    is_moved, shape = order != torch_order(rank), shape_of(value, order, letters)
    if is_moved == (rank in moved) or (rank in moved and shape and shape in _MOVED[rank]):
        return ""
    if is_moved:
        return shape or f"PyTorch's with its axes in the order {order}"
    return f"{shape}, as in PyTorch" if shape else "laid out as in PyTorch"


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
            yield f"In a new model the {what}{plural} {listed(names)} {verb} as {start}."


def _version(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "(not installed)"
