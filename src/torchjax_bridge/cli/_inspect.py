"""``torchjax-bridge inspect``: prints the tensors of a checkpoint or a model, as a tree or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import AsJson, Debug, Key
from ._terminal import align_columns, format_bytes, print_line, report_library_errors

if TYPE_CHECKING:
    from torchjax_bridge.weights import files

HELP = """Show what a checkpoint or a model holds: names, shapes, dtypes, bytes, layers and their rules.

WHAT is a file, a folder, or package.module:factory. No values are read, and a model takes no memory.

\b
Examples:
  torchjax-bridge inspect llama/
  torchjax-bridge inspect torchvision.models:resnet18
  torchjax-bridge inspect net.pt --json

Exit codes: 0 shown; 1 not a valid checkpoint; 2 usage."""


def inspect(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A checkpoint, or package.module:factory.")],
    as_json: AsJson = False,
    key: Key = None,
    debug: Debug = False,
) -> None:
    """Read the names and shapes, and print them."""
    from torchjax_bridge.weights import files

    from ._factory import build

    with report_library_errors(debug):
        if ":" in what and not Path(what).exists():
            head: dict[str, Any] = {"factory": what}
            lines = files.outline(build(what, debug))
        else:
            found = files.open_checkpoint(what, key=key)
            head = {"path": str(found.path), "format": found.format, "framework": found.framework}
            head |= {"shards": list(found.shards), "metadata": dict(found.metadata), "note": found.note}
            lines = files.outline(found)
    total = sum(line.nbytes for line in lines)
    if as_json:
        print_line(
            json.dumps({**head, "nbytes": total, "tensors": [asdict(line) for line in lines]}, indent=2)
        )
        return
    kind = f" ({head['format']}, {head['framework'] or 'framework unknown'})" if "format" in head else ""
    print_line(f"{head.get('path', what)}{kind}: {len(lines)} tensors, {format_bytes(total)}")
    if head.get("note"):
        print_line(f"  note: {head['note']}")
    if head.get("shards"):
        print_line(f"  {len(head['shards'])} shards")
    for line in _tree(lines):
        print_line(line)


def _tree(lines: "Sequence[files.TensorInfo]") -> list[str]:
    """A heading for every layer, its tensors indented below."""
    layers: dict[str, list[tuple[str, Any]]] = {}
    for line in lines:  # the tensors of a layer need not be neighbours in a file
        layer, _, name = line.name.replace("\n", "\\n").rpartition(".")
        layers.setdefault(layer, []).append((name, line))
    rows: list[list[str]] = []
    for layer, held in layers.items():
        rows.append([layer or "(root)", "", "", _class_and_rule(held[0][1])])
        rows += [[f"  {name}", line.dtype, str(line.shape), format_bytes(line.nbytes)] for name, line in held]
    return align_columns(rows, "  ")


def _class_and_rule(line: "files.TensorInfo") -> str:
    """The class and rule of a layer; several rules, if names and shapes fit all of them."""
    rules = line.rule.split(" or ")
    rule = line.rule if len(rules) == 1 else f"one of {', '.join(rules)}"
    return ", ".join(filter(None, (line.layer, rule and f"rule: {rule}")))
