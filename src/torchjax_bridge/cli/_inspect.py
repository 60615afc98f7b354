"""``torchjax-bridge inspect``: open or build, outline, print as a tree or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._options import AsJson, Debug, Key
from ._terminal import columns, human, say, spoken

if TYPE_CHECKING:
    from torchjax_bridge.weights import files

HELP = """Show what a checkpoint or a model holds: names, shapes, dtypes, bytes, layers and their rules.

WHAT is a file, a folder, or package.module:factory. No values are read and no model is built.

\b
Examples:
  torchjax-bridge inspect llama/
  torchjax-bridge inspect torchvision.models:resnet18
  torchjax-bridge inspect net.pt --json

Exit codes: 0 shown; 1 it is no sound checkpoint; 2 usage."""


def inspect(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A checkpoint, or package.module:factory.")],
    as_json: AsJson = False,
    key: Key = None,
    debug: Debug = False,
) -> None:
    """Open, outline, print."""
    from torchjax_bridge.weights import files

    from ._factory import build

    with spoken(debug):
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
        say(json.dumps({**head, "nbytes": total, "tensors": [asdict(line) for line in lines]}, indent=2))
        return
    kind = f" ({head['format']}, {head['framework'] or 'framework unknown'})" if "format" in head else ""
    say(f"{head.get('path', what)}{kind}: {len(lines)} tensors, {human(total)}")
    if head.get("note"):
        say(f"  note: {head['note']}")
    if head.get("shards"):
        say(f"  {len(head['shards'])} shards")
    for line in _tree(lines):
        say(line)


def _tree(lines: "Sequence[files.Line]") -> list[str]:
    """A heading for every layer, its tensors indented below."""
    layers: dict[str, list[tuple[str, Any]]] = {}
    for line in lines:  # a file may hold the tensors of one layer apart
        layer, _, name = line.name.replace("\n", "\\n").rpartition(".")
        layers.setdefault(layer, []).append((name, line))
    rows: list[list[str]] = []
    for layer, held in layers.items():
        rows.append([layer or "(root)", "", "", _about(held[0][1])])
        rows += [[f"  {name}", line.dtype, str(line.shape), human(line.nbytes)] for name, line in held]
    return columns(rows, "  ")


def _about(line: "files.Line") -> str:
    """The layer's class and rule; names and shapes may leave open which of several it is."""
    rules = line.rule.split(" or ")
    rule = line.rule if len(rules) == 1 else f"one of {', '.join(rules)}"
    return ", ".join(filter(None, (line.layer, rule and f"rule: {rule}")))
