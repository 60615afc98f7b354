"""``torchjax-bridge verify``: compares two checkpoints and prints what differs most."""

from pathlib import Path
from typing import Annotated

import typer

from ._options import Debug, Key, Memory, Model, Rules, Template, parse_bytes
from ._terminal import align_columns, print_line, report_library_errors

HELP = """Compare the weights of two checkpoints bit for bit, across formats and frameworks.

Between frameworks, A is converted to the framework of B. This needs --template if B is Flax, and --model if B is
torch or weights are tied.

\b
Examples:
  torchjax-bridge verify net.pt net.safetensors
  torchjax-bridge verify net.pt flax-net/ --template my.nets:flax_net

Exit codes: 0 the same; 1 they differ, or one is damaged; 2 usage."""


def verify(
    a: Annotated[Path, typer.Argument(metavar="A", help="One checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other checkpoint.")],
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
    """Compare, and print the largest differences."""
    from torchjax_bridge.weights import files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    user_rules, limit = read_rules(rules), parse_bytes(memory)
    sides = torch_model(model, debug), flax_template(template, debug)
    with report_library_errors(debug, model):
        found = files.compare_checkpoints(
            a, b, model=sides[0], template=sides[1], rules=user_rules, key=key, memory=limit
        )
    if found.ok:
        print_line(f"the same: {found.same} tensors, bit for bit")
        return
    print_line(f"they differ: {len(found.differences)} tensors, and {found.same} are the same, bit for bit")
    rows = [
        [one.name, one.what, f"by at most {one.largest:.6g}" if one.elements else ""]
        for one in found.differences[:worst]
    ]
    for line in align_columns(rows, "  "):
        print_line(line)
    if len(found.differences) > worst:
        print_line(f"  ... and {len(found.differences) - worst} more (--worst)")
    raise typer.Exit(1)
