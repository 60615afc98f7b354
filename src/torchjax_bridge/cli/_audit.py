"""``torchjax-bridge audit``: compares the settings of two models and prints what differs."""

import json
import warnings
from typing import Annotated

import typer

from ._inputs import FlaxArguments, Inputs, Seed, read_arguments, read_inputs
from ._options import AsJson, Debug, Rules
from ._settings import settings_as_json
from ._terminal import print_line, report_library_errors, to_cli_wording

HELP = """Compare the settings of two models: epsilon, padding, strides, groups, momentum, dropout and the like.

No weights are read, and the models take no memory. A linen model has layers only while it runs, so it needs an
--input in Flax's layout (channels last). Only the shape and dtype of an input matter.

\b
Examples:
  torchjax-bridge audit --model my.nets:Net --template my.nets:FlaxNet
  torchjax-bridge audit --model my.nets:Net --template my.nets:LinenNet --input random:1x32x32x3

Exit codes: 0 the same, but for rounding; 1 a setting that changes outputs or training differs, or the models have
no layer in common; 2 usage."""


def audit(
    model: Annotated[str, typer.Option("--model", metavar="MODULE:FACTORY", help="Builds the torch module.")],
    template: Annotated[
        str,
        typer.Option("--template", metavar="MODULE:FACTORY", help="Builds the nnx or linen module."),
    ],
    inputs: Inputs = None,
    flax_arg: FlaxArguments = None,
    rules: Rules = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build both, compare, print."""
    from torchjax_bridge.exchange import to_jax
    from torchjax_bridge.weights import PairingWarning
    from torchjax_bridge.weights import audit as compare

    from ._factory import flax_model, report_model_errors, torch_model
    from ._rules import read_rules

    user_rules, tensors, flax_kwargs = read_rules(rules), read_inputs(inputs, seed), read_arguments(flax_arg)
    torch_module, flax = torch_model(model, debug), flax_model(template, debug)
    with report_library_errors(debug), report_model_errors(debug), warnings.catch_warnings():
        warnings.simplefilter("ignore", PairingWarning)  # the printed audit lists what was assumed
        arrays = to_jax(tensors)
        if not isinstance(flax, tuple):
            found = compare(torch_module, flax, *arrays, rules=user_rules, flax_kwargs=flax_kwargs)
        else:  # the mode of a linen model is that of its call, so torch is tried in both modes
            found, other = (
                compare(torch_module.train(mode), flax[0], *arrays, rules=user_rules, flax_kwargs=flax_kwargs)
                for mode in (True, False)
            )
            found = other if len(other.faults) < len(found.faults) else found
    ok = all(fault.effect == "rounding" for fault in found.faults)
    if as_json:
        content = {"ok": ok, "layers": found.layers, "settings": settings_as_json(found.faults)}
        print_line(
            json.dumps(content | {"assumed": list(found.assumed), "notes": list(found.notes)}, indent=2)
        )
    else:
        print_line(to_cli_wording(str(found)))
    if not ok:
        raise typer.Exit(1)
