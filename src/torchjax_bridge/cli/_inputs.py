"""``--input``: the inputs of a model, from a NumPy file or drawn at random.

A file gives one input for each of its arrays, in the order of the file. ``random:SHAPE`` draws floats from a normal
distribution; ``random:SHAPE:DTYPE`` casts them; ``random:SHAPE:int:N`` draws token ids from 0 to N - 1.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import parse_dtype

if TYPE_CHECKING:
    import torch

__all__ = [
    "FlaxArguments",
    "Inputs",
    "Seed",
    "TorchArguments",
    "read_arguments",
    "read_example",
    "read_inputs",
]

Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="FILE.npz|random:SHAPE",
        help="An input; repeat it for the next one. FILE.npz gives all its arrays in order, FILE.npy one. "
        "random:1x3x32x32 draws floats, random:1x3:f16 float16, random:1x16:int:1000 ids below 1000.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, help="The seed of everything that is drawn at random.")
]
TorchArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--torch-arg", metavar="NAME=VALUE", help="A keyword argument of the torch model, its value as JSON."
    ),
]
FlaxArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--flax-arg", metavar="NAME=VALUE", help="A keyword argument of the Flax model, such as train=false."
    ),
]


def read_inputs(specs: Sequence[str] | None, seed: int) -> "list[torch.Tensor]":
    """The tensors that the options give, in their order.

    Raises:
        typer.BadParameter: A file cannot be read, or a text is not an input.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    for spec in specs or ():
        if spec.startswith("random:"):
            found.append(_draw(spec, generator))
        else:
            found += _read_arrays(spec)
    return found


def read_arguments(options: Sequence[str] | None) -> dict[str, Any]:
    """Keyword arguments from ``NAME=VALUE``; a value that is not JSON is a string.

    >>> read_arguments(["train=false", "mode=max"])
    {'train': False, 'mode': 'max'}
    """
    found: dict[str, Any] = {}
    for option in options or ():
        name, sign, value = option.partition("=")
        if not sign or not name.isidentifier():
            raise typer.BadParameter(f"{option!r} is not a keyword argument. Write it like train=false.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def read_example(specs: Sequence[str] | None, arguments: Sequence[str] | None, seed: int) -> dict[str, Any]:
    """``inputs`` and ``kwargs`` as `to_flax` takes them; nothing where no input is given."""
    if not specs and not arguments:
        return {}
    return {"inputs": tuple(read_inputs(specs, seed)), "kwargs": read_arguments(arguments)}


def _draw(spec: str, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    _, shape, *kind = spec.split(":")
    sizes = [int(size) for size in shape.split("x") if size.isdecimal()]
    if not sizes or len(sizes) != len(shape.split("x")):
        raise typer.BadParameter(f"{spec!r}: {shape!r} is not a shape. Write it like random:1x3x32x32.")
    if not kind:
        return torch.randn(sizes, generator=generator)
    if kind[0] not in ("int", "int32", "int64"):
        if len(kind) > 1:
            raise typer.BadParameter(f"{spec!r}: only integers have a bound, as in random:1x16:int:1000.")
        return torch.randn(sizes, generator=generator).to(parse_dtype(kind[0]))
    if len(kind) != 2 or not kind[1].isdecimal() or int(kind[1]) < 1:
        raise typer.BadParameter(f"{spec!r}: an integer input needs a bound, as in random:1x16:int:1000.")
    dtype = torch.int32 if kind[0] == "int32" else torch.int64
    return torch.randint(int(kind[1]), sizes, generator=generator, dtype=dtype)


def _read_arrays(path: str) -> "list[torch.Tensor]":
    import numpy as np
    import torch

    file = pathlib.Path(path)
    if file.suffix not in (".npz", ".npy"):
        raise typer.BadParameter(f"{path!r} is not an input. Write FILE.npz, FILE.npy or random:SHAPE.")
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = list(loaded.values()) if isinstance(loaded, np.lib.npyio.NpzFile) else [loaded]
        return [torch.from_numpy(np.array(array, order="C")) for array in arrays]
    except OSError as err:
        raise typer.BadParameter(f"cannot read {path}: {err.strerror or err}.") from err
    except (ValueError, EOFError, TypeError, LookupError) as err:
        raise typer.BadParameter(f"{path} holds no arrays of numbers: {err}.") from err
