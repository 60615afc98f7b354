"""``torchjax-bridge audit``: compare the settings of two models and print what differs."""

import json
import warnings
from typing import Annotated

import typer

from ._inputs import FlaxArguments, Inputs, Seed, read_arguments, read_inputs
from ._options import AsJson, Debug, Rules
from ._settings import settings_as_data
from ._terminal import in_options, say, spoken

HELP = """Are two models set up alike: epsilon, padding, strides, groups, momentum, dropout and their like?

No weights are read and no model takes memory. A linen model exists only while it runs: its --template gives the
module, and --input what it is called on, as Flax has it (channels last); only shapes and dtypes matter.

\b
Examples:
  torchjax-bridge audit --model my.nets:Net --template my.nets:FlaxNet
  torchjax-bridge audit --model my.nets:Net --template my.nets:LinenNet --input random:1x32x32x3

Exit codes: 0 alike but for rounding; 1 a setting differs that changes outputs or training, or the models have no
layer in common; 2 usage."""


def audit(
    model: Annotated[
        str, typer.Option("--model", metavar="MODULE:FACTORY", help="What builds the torch module.")
    ],
    template: Annotated[
        str,
        typer.Option("--template", metavar="MODULE:FACTORY", help="What builds the nnx or linen module."),
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

    from ._factory import flax_model, running, torch_model
    from ._rules import read_rules

    hints, tensors, words = read_rules(rules), read_inputs(inputs, seed), read_arguments(flax_arg)
    ours, theirs = torch_model(model, debug), flax_model(template, debug)
    with spoken(debug), running(debug), warnings.catch_warnings():
        warnings.simplefilter("ignore", PairingWarning)  # it prints what was assumed
        arrays = to_jax(tensors)
        if not isinstance(theirs, tuple):
            found = compare(ours, theirs, *arrays, rules=hints, flax_kwargs=words)
        else:  # linen is in the mode of its call, and torch is compared in the same
            found, other = (
                compare(ours.train(mode), theirs[0], *arrays, rules=hints, flax_kwargs=words)
                for mode in (True, False)
            )
            found = other if len(other.faults) < len(found.faults) else found
    ok = all(fault.effect == "rounding" for fault in found.faults)
    if as_json:
        content = {"ok": ok, "layers": found.layers, "settings": settings_as_data(found.faults)}
        say(json.dumps(content | {"assumed": list(found.assumed), "notes": list(found.notes)}, indent=2))
    else:
        say(in_options(str(found)))
    if not ok:
        raise typer.Exit(1)
