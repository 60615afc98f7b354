"""``torchjax-bridge plan``: prints the plan of a conversion, and its faults."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._inputs import Inputs, Seed, TorchArguments, read_example
from ._options import AsJson, Debug, Key, Model, Rules, Template
from ._settings import print_settings, settings_as_json
from ._terminal import print_line, report_library_errors, to_cli_wording

if TYPE_CHECKING:
    from torchjax_bridge.weights import files

HELP = """Print how a checkpoint would be converted to the other framework, and every fault. Convert nothing.

With --model and an nnx --template, also warn of settings (epsilon, padding, ...) that differ. With --model and
--input, a run of the torch model shows who reads flattened maps.

\b
Example:
  torchjax-bridge plan net.pth --to flax --template my.nets:flax_net --model my.nets:Net --input random:1x3x32x32

Exit codes: 0 it would convert; 1 there are faults; 2 usage."""


def plan(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The checkpoint.")],
    to: Annotated[Literal["flax", "torch"], typer.Option("--to", help="The framework to convert to.")],
    model: Model = None,
    template: Template = None,
    rules: Rules = None,
    inputs: Inputs = None,
    torch_arg: TorchArguments = None,
    seed: Seed = 0,
    key: Key = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the route and print its plan."""
    from torchjax_bridge.weights import files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    user_rules, example = read_rules(rules), read_example(inputs, torch_arg, seed)
    sides = torch_model(model, debug), flax_template(template, debug)
    with report_library_errors(debug, model):
        route = files.find_route(
            src, to=to, model=sides[0], template=sides[1], rules=user_rules, key=key, **example
        )
    plan = route.plan
    if as_json:
        print_line(json.dumps(_as_json(route), indent=2))
    elif plan is None:
        print_line(
            f"{src} holds {to} weights already: {len(route.leaves)} tensors would be copied unchanged."
        )
    else:
        print_line(to_cli_wording(str(plan), model))
        print_settings(route.settings)
    if plan is not None and not plan.ok:
        raise typer.Exit(1)


def _as_json(route: "files.Route") -> dict[str, Any]:
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
    found["settings"] = settings_as_json(route.settings.faults if route.settings is not None else ())
    return found
