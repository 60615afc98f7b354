"""``torchjax-bridge plan``: print the route that a conversion would take, and its faults."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._options import AsJson, Debug, Key, Model, Rules, Template
from ._settings import say_settings, settings_as_data
from ._terminal import in_options, say, spoken

if TYPE_CHECKING:
    from torchjax_bridge.weights import files

HELP = """Print how the tensors of a checkpoint would lie in the other framework, and every fault; convert nothing.

With --model and an nnx --template, settings (epsilon, padding, ...) that differ are warned of.

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
    as_json: AsJson = False,
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
    plan = route.plan
    if as_json:
        say(json.dumps(_as_data(route), indent=2))
    elif plan is None:
        say(f"{src} holds {to} weights already: {len(route.leaves)} tensors would be copied as they are.")
    else:
        say(in_options(str(plan), model))
        say_settings(route.settings)
    if plan is not None and not plan.ok:
        raise typer.Exit(1)


def _as_data(route: "files.Route") -> dict[str, Any]:
    from torchjax_bridge.exchange import join_path

    plan = route.plan
    found: dict[str, Any] = {"path": str(route.source.path), "to": route.to, "ok": plan is None or plan.ok}
    found["leaves"] = [{"name": leaf.name, "shape": list(leaf.shape)} for leaf in route.leaves]
    if plan is None:
        return found
    found["moves"] = [
        {
            "torch": list(move.torch_keys),
            "flax": [join_path(path) for path in move.flax_paths],
            "layout": str(move.layout),
            "layer": move.layer,
        }
        for move in plan.moves
    ]
    found |= {"stays_in_torch": list(plan.torch_only), "stays_in_flax": list(map(join_path, plan.flax_only))}
    found |= {"assumed": list(plan.assumed), "notes": list(plan.notes)}
    found["faults"] = list(map(str, plan.faults))
    found["settings"] = settings_as_data(route.settings.faults if route.settings is not None else ())
    return found
