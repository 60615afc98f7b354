"""``torchjax-bridge port``: writes a torch model as Flax source, with its weights, and prints the proof."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ._inputs import Inputs, Seed, TorchArguments, read_arguments, read_inputs
from ._options import AsJson, Debug, Key
from ._parity import load_checkpoint
from ._terminal import print_line, report_library_errors, to_cli_wording

HELP = """Write a torch model as Flax source, class for class, and prove that it computes the same.

MODEL is called without arguments and builds the torch module, which gets the weights of --checkpoint, if given.
Each --input is one argument, in torch's layout. The source goes to --output, the weights to --weights. Nothing
is written unless the whole model was ported and proved. What cannot be ported is listed, with a way out.

\b
Examples:
  torchjax-bridge port my.nets:Net --input random:1x3x32x32 --checkpoint net.pth -o net_flax.py
  torchjax-bridge port my.nets:Net --input random:1x3x32x32 -o net_flax.py --weights net.safetensors
  torchjax-bridge port my.nets:Bert --input random:2x16:int:30522 -o bert_flax.py --keep encoder.mixer
  torchjax-bridge port my.nets:Net --input random:1x3x32x32 -o net.py --module my.nets:Mixer=my.layers:FlaxMixer

Exit codes: 0 written; 1 refused, or it differs from torch, or a file cannot be written; 2 usage."""


def port(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="MODULE:FACTORY, which builds the torch module.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.py", help="The Flax source.")],
    inputs: Inputs = None,
    torch_arg: TorchArguments = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", help="The weights; by default the initial ones."),
    ] = None,
    key: Key = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights", metavar="FILE", help="Where the Flax weights go: .safetensors, .msgpack or a folder."
        ),
    ] = None,
    to: Annotated[
        Literal["nnx", "linen"], typer.Option("--to", help="Which Flax the source is for.")
    ] = "nnx",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep", metavar="PATH", help="A module that stays in torch; repeat it for the next one."
        ),
    ] = None,
    op: Annotated[
        list[str] | None,
        typer.Option(
            "--op", metavar="TORCH=JAX", help="JAX code for a torch function; repeat it for the next one."
        ),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            "--module",
            metavar="TORCH=FLAX",
            help="A Flax class (MODULE:CLASS) for a torch class (MODULE:CLASS); repeat it for the next one.",
        ),
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            "--assume", metavar="FILE.py:LINE", help="A line that decides by values, as for these inputs."
        ),
    ] = None,
    exact_statistics: Annotated[
        bool,
        typer.Option(
            "--exact-statistics", help="Keep the unbiased running variance of BatchNorm, as torch does."
        ),
    ] = False,
    training: Annotated[
        Literal["optional", "required", "none"],
        typer.Option("--training", help="Whether a model that can be ported in evaluation alone is refused."),
    ] = "optional",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the port with torch.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build, port, write, print."""
    import torch

    from torchjax_bridge.porting import port as port_model
    from torchjax_bridge.weights import files

    from ._factory import report_model_errors, torch_model
    from ._replacements import read_modules, read_ops

    if output.suffix != ".py":
        raise typer.BadParameter(f"--output {output} is no Python file: its name ends in .py.")
    tensors, kwargs = read_inputs(inputs, seed), read_arguments(torch_arg)
    if not tensors and not kwargs:
        raise typer.BadParameter("the model needs an input: give --input, such as random:1x3x32x32.")
    torch.manual_seed(seed)
    module = torch_model(model, debug, concrete=True, option="MODEL")
    with report_library_errors(debug), report_model_errors(debug):
        for target in filter(None, (output, weights)):
            folder = target.suffix not in (".py", ".safetensors", ".msgpack")
            files.check_target(target, folder=folder, overwrite=overwrite)
        if checkpoint is not None:
            load_checkpoint(module, checkpoint, key)
        ported = port_model(
            module,
            *tensors,
            kwargs=kwargs,
            to=to,
            ops=read_ops(op),
            modules=read_modules(replace) or None,
            keep=keep or (),
            assume=assume or (),
            exact_statistics=exact_statistics,
            training=training,
            verify=not no_verify,
        )
        ported.save(output, weights=weights)
    written = [str(target) for target in (output, weights) if target is not None]
    if as_json:
        print_line(json.dumps(_as_json(ported, written), indent=2))
        return
    print_line(to_cli_wording(str(ported)))
    print_line(f"wrote {' and '.join(written)}")


def _as_json(ported: Any, written: list[str]) -> dict[str, Any]:
    checks = ported.proof.checks if ported.proof is not None else ()
    return {
        "name": ported.name,
        "lines": ported.lines,
        "classes": ported.classes,
        "notes": list(ported.notes),
        "checks": [{"what": check.what, "difference": check.difference} for check in checks],
        "rules": [str(rule) for rule in ported.rules],
        "files": written,
    }
