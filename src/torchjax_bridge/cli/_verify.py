"""``torchjax-bridge verify``: compare two checkpoints and print what differs most."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import Debug, Key, Memory, Model, Rules, Template, as_bytes
from ._terminal import columns, say, spoken

HELP = """Are two checkpoints the same weights, bit for bit, whatever their formats and frameworks?

Between frameworks, A is laid out as B is: --template is needed when B is Flax, --model when B is torch or
weights are tied.

\b
Examples:
  torchjax-bridge verify net.pt net.safetensors
  torchjax-bridge verify net.pt flax-net/ --template my.nets:flax_net

Exit codes: 0 the same; 1 they differ, or one is damaged; 2 usage."""


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="One checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other.")],
    model: Model = None,
    template: Template = None,
    rules: Rules = None,
    key: Key = None,
    worst: Annotated[
        int, typer.Option("--worst", metavar="N", min=1, help="How many differing tensors to show.")
    ] = 10,
    memory: Memory = "1GB",
    debug: Debug = False,
) -> None:
    """Compare and print the worst."""
    from torchjax_bridge.weights import files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    hints, limit = read_rules(rules), as_bytes(memory)
    sides = torch_model(model, debug), flax_template(template, debug)
    with spoken(debug, model):
        found = files.compare_checkpoints(
            a, b, model=sides[0], template=sides[1], rules=hints, key=key, memory=limit
        )
    if found.ok:
        say(f"the same: {found.same} tensors, bit for bit")
        return
    say(f"they differ: {len(found.differences)} tensors, and {found.same} are the same, bit for bit")
    rows = [
        [one.name, one.what, f"by at most {one.largest:.6g}" if one.elements else ""]
        for one in found.differences[:worst]
    ]
    for line in columns(rows, "  "):
        say(line)
    if len(found.differences) > worst:
        say(f"  ... and {len(found.differences) - worst} more (--worst)")
    raise typer.Exit(1)
