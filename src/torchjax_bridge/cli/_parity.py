"""``torchjax-bridge parity``: run both models on the same inputs and print where they part."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._inputs import Arguments, FlaxArguments, Inputs, Seed, read_arguments, read_inputs
from ._options import AsJson, Debug, Key, Rules
from ._settings import settings_as_data
from ._terminal import in_options, say, spoken

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchjax_bridge.weights import Parity, UserRule

HELP = """Do two models compute the same? Run both on the same inputs; name the first layer that differs, and why.

The torch model is built with memory, filled from CHECKPOINT (of either framework) if there is one, and converted
into --template: an nnx module, a linen module, or a linen module with its variables. Both run in evaluation mode.
Inputs are as the torch model takes them, each one argument; images go into Flax with their channels last.

\b
Examples:
  torchjax-bridge parity net.pth --model my.nets:Net --template my.nets:FlaxNet --input random:2x3x32x32
  torchjax-bridge parity --model my.nets:Bert --template my.nets:FlaxBert --input random:2x16:int:30522
  torchjax-bridge parity --model my.nets:Net --template my.nets:LinenNet --input x.npz --flax-arg train=false

Exit codes: 0 they agree; 1 they differ, do not fit, or cannot run on these inputs; 2 usage."""


def parity(
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODULE:FACTORY", help="What builds the torch module."),
    ],
    template: Annotated[
        str,
        typer.Option(
            "--template",
            metavar="MODULE:FACTORY",
            help="What builds the nnx module, the linen module, or (linen module, variables).",
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="The weights; by default what the torch factory draws."),
    ] = None,
    inputs: Inputs = None,
    torch_arg: Arguments = None,
    flax_arg: FlaxArguments = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--channels-as-they-are", help="How Flax takes images; by default found out."
        ),
    ] = None,
    atol: Annotated[
        float | None, typer.Option("--atol", min=0, help="The largest difference that is rounding.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option("--rtol", min=0, help="The same, as a part of the largest value.")
    ] = None,
    rules: Rules = None,
    key: Key = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build, fill, convert, run, print."""
    import torch

    from torchjax_bridge.weights import PairingWarning, SettingsWarning
    from torchjax_bridge.weights import parity as compare

    from ._factory import flax_model, running, torch_model
    from ._rules import read_rules

    hints, tensors = read_rules(rules), read_inputs(inputs, seed)
    ours_kwargs, theirs_kwargs = read_arguments(torch_arg), read_arguments(flax_arg)
    if not tensors and not ours_kwargs:
        raise typer.BadParameter("--input says what the models are run on, such as random:1x3x32x32.")
    torch.manual_seed(seed)
    ours = torch_model(model, debug, concrete=True)
    theirs = flax_model(template, debug, concrete=True)
    with spoken(debug), running(debug), warnings.catch_warnings():
        for said in (PairingWarning, SettingsWarning):  # what they say is in the table, or shows in it
            warnings.simplefilter("ignore", said)
        twin = _filled(ours, theirs, checkpoint, key, hints, tensors, theirs_kwargs, channels_last)
        ours.eval()
        found = compare(
            ours,
            twin,
            *tensors,
            rules=hints,
            atol=atol,
            rtol=rtol,
            channels_last=channels_last,
            torch_kwargs=ours_kwargs,
            flax_kwargs=theirs_kwargs,
        )
    say(json.dumps(_as_data(found), indent=2) if as_json else in_options(str(found)))
    if not found.ok:
        raise typer.Exit(1)


def _filled(
    ours: "nn.Module",
    theirs: Any,
    checkpoint: Path | None,
    key: str | None,
    hints: "Sequence[UserRule]",
    tensors: "Sequence[torch.Tensor]",
    words: Mapping[str, Any],
    channels_last: bool | None,
) -> Any:
    """The Flax model with the weights, as `parity` takes it; the torch model has them too."""
    from flax import nnx

    from torchjax_bridge.weights import files, load_flax, to_flax, to_state_dict

    flax_weights = False
    if checkpoint is not None:
        opened = files.open_checkpoint(checkpoint, key=key)
        flax_weights = files.framework_of(opened) == "flax"
        if not flax_weights:
            _load(ours, checkpoint, key)
    module, template = (None, theirs) if isinstance(theirs, nnx.Module) else theirs
    if template is None:
        template = _variables(ours, module, hints, tensors, words, channels_last)
    if flax_weights and checkpoint is not None:
        full = load_flax(checkpoint, template)
        ours.load_state_dict(to_state_dict(full, ours, rules=hints))
    else:
        full = to_flax(ours, template, rules=hints)
    if module is not None:
        return module, full
    full.eval()
    return full


def _load(ours: "nn.Module", checkpoint: Path, key: str | None) -> None:
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    from torchjax_bridge.errors import CheckpointError
    from torchjax_bridge.weights import load_state_dict

    state = load_state_dict(checkpoint, key=key)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        ours.load_state_dict(state)
    except RuntimeError as err:
        raise CheckpointError(f"{checkpoint} does not fit the model: {err}") from err


def _variables(
    ours: "nn.Module",
    module: Any,
    hints: "Sequence[UserRule]",
    tensors: "Sequence[torch.Tensor]",
    words: Mapping[str, Any],
    channels_last: bool | None,
) -> Any:
    """What linen's ``init`` gives for these inputs, with images in the order in which the two models fit."""
    import jax

    from torchjax_bridge.exchange import to_jax
    from torchjax_bridge.weights import plan

    orders = [True, False] if channels_last is None else [channels_last]
    if all(tensor.ndim not in (3, 4, 5) or not tensor.is_floating_point() for tensor in tensors):
        orders = orders[:1]
    made: list[Any] = []
    for last in orders:
        arrays = to_jax(
            [
                t.movedim(1, -1) if last and t.ndim in (3, 4, 5) and t.is_floating_point() else t
                for t in tensors
            ]
        )
        streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

        def init(arrays: Any, streams: Any = streams) -> Any:
            return module.init(streams, *arrays, **words)

        try:
            fits = plan(ours, jax.eval_shape(init, arrays), rules=hints).ok
        except (TypeError, ValueError):  # a shape that does not fit, if the other order does
            if last is orders[-1]:
                raise
            continue
        made.append((init, arrays))
        if fits:
            return init(arrays)
    init, arrays = made[0]
    return init(arrays)


def _as_data(found: "Parity") -> dict[str, Any]:
    rows = [asdict(row) for row in found.rows]
    for row in rows:
        row |= {name: _number(row[name]) for name in ("difference", "relative")}
    return {
        "ok": found.ok,
        "max_difference": _number(found.max_difference),
        "first": None if found.first is None else found.first.torch_path,
        "cause": None if found.cause is None else asdict(found.cause),
        "rows": rows,
        "settings": settings_as_data(found.settings),
        "notes": list(found.notes),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
