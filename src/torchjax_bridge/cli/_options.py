"""Options that several commands share, and the parsing of their values."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import jax
    import torch

__all__ = [
    "AsJson",
    "Debug",
    "Key",
    "Memory",
    "Model",
    "Rules",
    "Template",
    "parse_bytes",
    "parse_dtype",
    "parse_mesh",
    "parse_part",
]

_UNITS = {"": 1, "B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if unit not in ("", "B")}
_UNITS |= {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", 1)}

_SHORT_NAMES = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
_SHORT_NAMES |= {
    "f64": "float64",
    "fp64": "float64",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}


def parse_bytes(text: str) -> int:
    """Bytes from ``"1GB"``, ``"512MiB"`` or a number.

    >>> parse_bytes("1.5GB")
    1500000000
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size. Write it like 1GB, 512MiB or 1000000.")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size above 0.")
    return size


def parse_dtype(text: str) -> "torch.dtype":
    """A floating-point dtype from its name or short name.

    >>> parse_dtype("bf16")
    torch.bfloat16
    """
    import torch

    dtype = getattr(torch, _SHORT_NAMES.get(text.lower(), text.lower()), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise typer.BadParameter(
            f"{text!r} is not a floating-point dtype. Write bf16, f16, f32, f64 or torch's name."
        )
    return dtype


def parse_mesh(text: str | None) -> "jax.sharding.AbstractMesh | None":
    """A mesh without devices from ``"x=4,y=2"``.

    >>> parse_mesh("x=4,y=2").axis_sizes
    (4, 2)
    """
    if text is None:
        return None
    import jax

    found = [re.fullmatch(r" *(\w+) *= *([1-9][0-9]*) *", axis) for axis in text.split(",")]
    names = [axis[1] for axis in found if axis]
    if not all(found) or len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} is not a mesh. Write the size of each axis, like x=8 or x=4,y=2.")
    return jax.sharding.AbstractMesh(tuple(int(axis[2]) for axis in found if axis), tuple(names))


def parse_part(text: str | None) -> tuple[int, int] | None:
    """The number of a part and of all parts.

    >>> parse_part("0/4")
    (0, 4)
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise typer.BadParameter(f"{text!r} is not a part. Of four, write 0/4 to 3/4.")
    return int(found[1]), int(found[2])


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FACTORY",
        help="Builds the torch module; called without arguments on the meta device.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="MODULE:FACTORY",
        help="Builds the nnx module or linen variables; called without arguments under eval_shape.",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        "--rules",
        metavar="FILE",
        help="Rules for names and layers, as TOML or JSON, such as "
        'flatten = [{torch = "fc1", features = [16, 5, 5]}].',
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="NAME", help="The entry of a torch file or a DCP checkpoint that is the state_dict."
    ),
]
Memory = Annotated[
    str, typer.Option("--memory", metavar="SIZE", help="Memory to use in addition to the largest tensor.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")]
