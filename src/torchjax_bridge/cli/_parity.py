"""``torchjax-bridge parity``: runs both models on the same inputs and prints where they differ."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._inputs import FlaxArguments, Inputs, Seed, TorchArguments, read_arguments, read_inputs
from ._options import AsJson, Debug, Key, Rules
from ._settings import settings_as_json
from ._terminal import print_line, report_library_errors, to_cli_wording

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchjax_bridge.weights import Parity, UserRule

HELP = """Run two models on the same inputs. Name the first layer that differs, and the cause.

The torch model gets the weights of CHECKPOINT (of either framework), if given. The weights are converted to
--template: an nnx module, a linen module, or (linen module, variables). Both models run in evaluation mode. Each
--input is one argument, in torch's layout; Flax gets images with their channels last.

\b
Examples:
  torchjax-bridge parity net.pth --model my.nets:Net --template my.nets:FlaxNet --input random:2x3x32x32
  torchjax-bridge parity --model my.nets:Bert --template my.nets:FlaxBert --input random:2x16:int:30522
  torchjax-bridge parity --model my.nets:Net --template my.nets:LinenNet --input x.npz --flax-arg train=false

Exit codes: 0 they agree; 1 they differ, do not fit, or cannot run on these inputs; 2 usage."""


def parity(
    model: Annotated[
        str,
        typer.Option("--model", metavar="MODULE:FACTORY", help="Builds the torch module."),
    ],
    template: Annotated[
        str,
        typer.Option(
            "--template",
            metavar="MODULE:FACTORY",
            help="Builds the nnx module, the linen module, or (linen module, variables).",
        ),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="CHECKPOINT", help="The weights; by default the initial ones of the torch module."
        ),
    ] = None,
    inputs: Inputs = None,
    torch_arg: TorchArguments = None,
    flax_arg: FlaxArguments = None,
    channels_last: Annotated[
        bool | None,
        typer.Option(
            "--channels-last/--channels-as-they-are",
            help="Whether Flax takes images with channels last; detected by default.",
        ),
    ] = None,
    atol: Annotated[
        float | None, typer.Option("--atol", min=0, help="The largest difference that counts as rounding.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option("--rtol", min=0, help="The same, relative to the largest value.")
    ] = None,
    rules: Rules = None,
    key: Key = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build both models, convert the weights, run, print."""
    import torch

    from torchjax_bridge.weights import PairingWarning, SettingsWarning
    from torchjax_bridge.weights import parity as compare

    from ._factory import flax_model, report_model_errors, torch_model
    from ._rules import read_rules

    user_rules, tensors = read_rules(rules), read_inputs(inputs, seed)
    torch_kwargs, flax_kwargs = read_arguments(torch_arg), read_arguments(flax_arg)
    if not tensors and not torch_kwargs:
        raise typer.BadParameter("the models need an input: give --input, such as random:1x3x32x32.")
    torch.manual_seed(seed)
    torch_module = torch_model(model, debug, concrete=True)
    flax = flax_model(template, debug, concrete=True)
    with report_library_errors(debug), report_model_errors(debug), warnings.catch_warnings():
        for category in (PairingWarning, SettingsWarning):  # the table shows what they say, or its effect
            warnings.simplefilter("ignore", category)
        example = {"inputs": tuple(tensors), "kwargs": torch_kwargs}
        flax = _fill_flax(
            torch_module, flax, checkpoint, key, user_rules, example, flax_kwargs, channels_last
        )
        torch_module.eval()
        found = compare(
            torch_module,
            flax,
            *tensors,
            rules=user_rules,
            atol=atol,
            rtol=rtol,
            channels_last=channels_last,
            torch_kwargs=torch_kwargs,
            flax_kwargs=flax_kwargs,
        )
    print_line(json.dumps(_as_json(found), indent=2) if as_json else to_cli_wording(str(found)))
    if not found.ok:
        raise typer.Exit(1)


def _fill_flax(
    torch_module: "nn.Module",
    flax: Any,
    checkpoint: Path | None,
    key: str | None,
    user_rules: "Sequence[UserRule]",
    example: Mapping[str, Any],
    flax_kwargs: Mapping[str, Any],
    channels_last: bool | None,
) -> Any:
    """Give both models the weights; return the Flax model as `parity` takes it."""
    from flax import nnx

    from torchjax_bridge.weights import files, load_flax, to_flax, to_state_dict

    flax_weights = False
    if checkpoint is not None:
        opened = files.open_checkpoint(checkpoint, key=key)
        flax_weights = files.framework_of(opened) == "flax"
        if not flax_weights:
            load_checkpoint(torch_module, checkpoint, key)
    module, template = (None, flax) if isinstance(flax, nnx.Module) else flax
    if template is None:
        template = _init_linen(torch_module, module, user_rules, example, flax_kwargs, channels_last)
    if flax_weights and checkpoint is not None:
        filled = load_flax(checkpoint, template)
        torch_module.load_state_dict(to_state_dict(filled, torch_module, rules=user_rules, **example))
    else:
        filled = to_flax(torch_module, template, rules=user_rules, **example)
    if module is not None:
        return module, filled
    filled.eval()
    return filled


def load_checkpoint(torch_module: "nn.Module", checkpoint: Path, key: str | None) -> None:
    """Give a torch module the weights of a torch checkpoint.

    Raises:
        CheckpointError: The file is damaged, or does not fit the module.
    """
    from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

    from torchjax_bridge.errors import CheckpointError
    from torchjax_bridge.weights import load_state_dict

    state = load_state_dict(checkpoint, key=key)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        torch_module.load_state_dict(state)
    except RuntimeError as err:
        raise CheckpointError(f"{checkpoint} does not fit the model: {err}") from err


def _init_linen(
    torch_module: "nn.Module",
    module: Any,
    user_rules: "Sequence[UserRule]",
    example: Mapping[str, Any],
    flax_kwargs: Mapping[str, Any],
    channels_last: bool | None,
) -> Any:
    """The variables that linen's ``init`` returns for these inputs.

    Tries images with channels last and, if the models do not fit, with channels first.
    """
    import jax

    from torchjax_bridge.exchange import to_jax
    from torchjax_bridge.weights import plan

    tensors: tuple[torch.Tensor, ...] = example["inputs"]
    orders = [True, False] if channels_last is None else [channels_last]
    if all(tensor.ndim not in (3, 4, 5) or not tensor.is_floating_point() for tensor in tensors):
        orders = orders[:1]
    candidates: list[Any] = []
    for last in orders:
        arrays = to_jax(
            [
                t.movedim(1, -1) if last and t.ndim in (3, 4, 5) and t.is_floating_point() else t
                for t in tensors
            ]
        )
        streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

        def init(arrays: Any, streams: Any = streams) -> Any:
            return module.init(streams, *arrays, **flax_kwargs)

        try:
            fits = plan(torch_module, jax.eval_shape(init, arrays), rules=user_rules, **example).ok
        except (TypeError, ValueError):  # this order does not fit; the other one may
            if last is orders[-1]:
                raise
            continue
        candidates.append((init, arrays))
        if fits:
            return init(arrays)
    init, arrays = candidates[0]
    return init(arrays)


def _as_json(found: "Parity") -> dict[str, Any]:
    rows = [asdict(row) for row in found.rows]
    for row in rows:
        row |= {name: _finite_or_none(row[name]) for name in ("difference", "relative")}
    return {
        "ok": found.ok,
        "max_difference": _finite_or_none(found.max_difference),
        "first": None if found.first is None else found.first.torch_path,
        "cause": None if found.cause is None else asdict(found.cause),
        "rows": rows,
        "settings": settings_as_json(found.settings),
        "notes": list(found.notes),
    }


def _finite_or_none(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
