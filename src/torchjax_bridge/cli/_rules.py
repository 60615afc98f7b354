"""``--rules FILE``: rules for names and layers, as data. Nothing in the file is ever run.

TOML, or JSON of the same structure::

    [[rename]]
    torch = "blocks.*.attn.c_proj"
    flax = "blocks.*.attn.out"

    [[layer_type]]
    torch = "head"
    kind = "Linear"                # a class of torch.nn

    [[flatten]]
    torch = "fc1"
    features = [16, 5, 5]          # (C, H, W); or channels_first = true
    output = false                 # true: the output is viewed as a map, not the input
    # on one line: flatten = [{torch = "fc1", features = [16, 5, 5]}]

    [[fused]]
    module = "blocks.*.attn"
    torch = "qkv"                  # one layer, or a list of several
    flax = ["query", "key", "value"]
    heads = 12                     # the rows are head by head; without it: layer by layer

    [[keep]]
    torch = "pooler"               # stays in torch

    [[fill]]
    flax = "attn.key.bias"         # a leaf without a tensor in torch
    value = 0.0
"""

import json
import pathlib
import tomllib
from typing import Any

import typer
from torch import nn

from torchjax_bridge.errors import PlanError
from torchjax_bridge.weights import Fill, Flatten, Fused, Keep, LayerType, Rename

__all__ = ["read_rules"]

_FIELDS = {
    "rename": {"torch", "flax"},
    "layer_type": {"torch", "kind"},
    "flatten": {"torch", "features", "channels_first", "output"},
    "fused": {"module", "torch", "flax", "heads"},
    "keep": {"torch"},
    "fill": {"flax", "value"},
}

FileRule = Rename | LayerType | Flatten | Fused | Keep | Fill


def read_rules(path: str | None) -> tuple[FileRule, ...]:
    """The rules of a file, in its order within each kind.

    Raises:
        typer.BadParameter: It cannot be read, or holds something that is not a rule.
    """
    if path is None:
        return ()
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        content = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except OSError as err:
        raise typer.BadParameter(f"cannot read {path}: {err.strerror}.") from err
    except (ValueError, RecursionError) as err:  # also what tomllib raises
        raise typer.BadParameter(
            f"{path} is not {'JSON' if path.endswith('.json') else 'TOML'}: {err}."
        ) from err
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path}: rules are tables named {', '.join(_FIELDS)}.")
    rules = []
    for kind, entries in content.items():
        if kind not in _FIELDS or not isinstance(entries, list):
            raise typer.BadParameter(
                f"{path}: '{kind}' is not a list of rules. The lists are {', '.join(_FIELDS)}."
            )
        for place, entry in enumerate(entries):
            rules.append(_rule(kind, entry, f"{path}: {kind} {place}"))
    return tuple(rules)


def _rule(kind: str, entry: Any, where: str) -> FileRule:
    if not isinstance(entry, dict) or not set(entry) <= _FIELDS[kind]:
        raise typer.BadParameter(f"{where} is not a table of {', '.join(sorted(_FIELDS[kind]))}.")
    if kind in ("fused", "fill"):
        try:
            if kind == "fill":
                arguments: tuple[Any, Any] = entry.get("flax"), entry.get("value")  # checked by Fill
                return Fill(*arguments)
            return Fused(
                entry.get("module", ""), entry.get("torch", ""), entry.get("flax", ""), entry.get("heads")
            )
        except PlanError as err:
            raise typer.BadParameter(f"{where}: {err}") from err
    torch = entry.get("torch")
    if not isinstance(torch, str):
        raise typer.BadParameter(f"{where} lacks the dotted name 'torch'.")
    if kind == "keep":
        return Keep(torch)
    if kind == "rename":
        if not isinstance(entry.get("flax"), str):
            raise typer.BadParameter(f"{where} lacks the dotted name 'flax'.")
        return Rename(torch, entry["flax"])
    if kind == "layer_type":
        cls = getattr(nn, str(entry.get("kind")), None)
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise typer.BadParameter(f"{where}: {entry.get('kind')!r} is not a class of torch.nn.")
        return LayerType(torch, cls)
    sizes, output = entry.get("features"), entry.get("output", False)
    if not isinstance(output, bool):
        raise typer.BadParameter(f"{where}: output must be true or false.")
    if "channels_first" in entry:
        if entry["channels_first"] is not True or sizes is not None:
            raise typer.BadParameter(f"{where}: channels_first must be true, and without features.")
        return Flatten(torch, None, output)
    if (
        not isinstance(sizes, list)
        or not all(type(size) is int and size > 0 for size in sizes)
        or len(sizes) < 2
    ):
        raise typer.BadParameter(f"{where} needs features = [C, H, W], or channels_first = true.")
    return Flatten(torch, tuple(sizes), output)
