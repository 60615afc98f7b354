"""``torchjax-bridge plan``: print the route that a conversion would take, and its faults."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._options import Debug, Key, Model, Rules, Template
from ._terminal import in_options, say, spoken

HELP = """Print how the tensors of a checkpoint would lie in the other framework, and every fault; convert nothing.

\b
Example:
  torchjax-bridge plan net.pth --to flax --template my.nets:flax_net --model my.nets:Net

Exit codes: 0 it would convert; 1 there are faults; 2 usage."""


def plan(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="What would be read.")],
    to: Annotated[Literal["flax", "torch"], typer.Option("--to", help="The other framework.")],
    model: Model = None,
    template: Template = None,
    rules: Rules = None,
    key: Key = None,
    debug: Debug = False,
) -> None:
    """Find the route and print its plan."""
    from torchjax_bridge.weights import files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    hints = read_rules(rules)
    sides = torch_model(model, debug), flax_template(template, debug)
    with spoken(debug, model):
        route = files.find_route(src, to=to, model=sides[0], template=sides[1], rules=hints, key=key)
    if route.plan is None:
        say(f"{src} holds {to} weights already: {len(route.leaves)} tensors would be copied as they are.")
        return
    say(in_options(str(route.plan), model))
    if not route.plan.ok:
        raise typer.Exit(1)
