"""``torchjax-bridge convert``: reads the options, builds the two sides, converts, and prints the result."""

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from ._inputs import Inputs, Seed, TorchArguments, read_example
from ._options import (
    Debug,
    Key,
    Memory,
    Model,
    Rules,
    Template,
    parse_bytes,
    parse_dtype,
    parse_mesh,
    parse_part,
)
from ._settings import print_settings
from ._terminal import format_bytes, print_line, progress, report_library_errors

HELP = """Convert a checkpoint to the other framework, or to another format, one tensor at a time.

SRC and DST are files or folders: safetensors (also sharded), .pt/.pth/.th/.bin, .msgpack, Orbax, torch
Distributed Checkpoint (dcp). DST appears only when it is complete. From torch to Flax, --template defines the
result; from Flax to torch, --model does. With --model and --input, a run of the torch model shows who reads
flattened maps. With --part, several processes convert to Orbax or dcp without talking to each other; the last to
finish joins the parts.

\b
Examples:
  torchjax-bridge convert llama/ llama-flax/ --to flax --template my.models:flax_llama
  torchjax-bridge convert net.pth net.msgpack --to flax --template my.nets:variables --model my.nets:Net
  torchjax-bridge convert net.pt net.safetensors --to torch --dtype bf16
  torchjax-bridge convert dcp/ orbax/ --to flax --template my.models:llama --format orbax --mesh x=8 --part 0/2

Exit codes: 0 converted; 1 the source is damaged, the two sides do not fit, or DST cannot be written; 2 usage."""


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="What to read.")],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST", help="What to write: a file if the suffix names a format, else a folder."
        ),
    ],
    to: Annotated[Literal["flax", "torch"], typer.Option("--to", help="The framework of DST.")],
    format: Annotated[
        Literal["safetensors", "pt", "msgpack", "orbax", "dcp"] | None,
        typer.Option("--format", help="By default chosen by the name of DST, else safetensors."),
    ] = None,
    model: Model = None,
    template: Template = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Cast floating-point tensors: bf16, f16, f32, f64."),
    ] = None,
    rules: Rules = None,
    inputs: Inputs = None,
    torch_arg: TorchArguments = None,
    seed: Seed = 0,
    key: Key = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size",
            metavar="SIZE",
            help="The size of each file; by default the shards of SRC are kept.",
        ),
    ] = None,
    memory: Memory = "1GB",
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            metavar="AXES",
            help="Sizes for axes that the template names, such as x=8 or x=4,y=2; no devices are needed. Orbax "
            "output is stored in chunks that lie in one shard each.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            "--part", metavar="K/N", help="Convert one of N parts, from 0/N; run one process for each."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards or blocks that an interrupted run finished.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Parse, convert, report."""
    from torchjax_bridge.weights import PairingWarning, files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    cast = None if dtype is None else parse_dtype(dtype)
    limit, size = parse_bytes(memory), None if shard_size is None else parse_bytes(shard_size)
    axes, which = parse_mesh(mesh), parse_part(part)
    user_rules, example = read_rules(rules), read_example(inputs, torch_arg, seed)
    sides = torch_model(model, debug), flax_template(template, debug, axes)
    with report_library_errors(debug, model), ExitStack() as bars, warnings.catch_warnings():
        warnings.simplefilter("ignore", PairingWarning)  # printed below
        done = files.convert(
            src,
            dst,
            to=to,
            format=format,
            model=sides[0],
            template=sides[1],
            rules=user_rules,
            dtype=cast,
            memory=limit,
            shard_size=size,
            key=key,
            mesh=axes,
            part=which,
            resume=resume,
            overwrite=overwrite,
            **example,
            progress=lambda route: bars.enter_context(
                progress(f"converting {src}", route.nbytes // (which[1] if which else 1))
            ),
        )
    if done.note:
        print_line(f"note: {src} was read as {done.note}")
    if done.left:
        print_line(
            f"note: {dst} has no header for metadata: {', '.join(map(repr, done.left))} were not written"
        )
    if done.plan is not None:
        for text in done.plan.assumed:
            print_line(f"assumed: {text}")
        for note in done.plan.notes:
            print_line(f"note: {note}")
    print_settings(done.settings)
    if done.waiting and which:
        others = ", ".join(f"{other}/{which[1]}" for other in done.waiting)
        print_line(f"part {part} is done; {dst} appears when these are, too: {others}")
        return
    many = f" in {len(done.files)} files" if len(done.files) > 1 else ""
    print_line(f"wrote {done.leaves} tensors, {format_bytes(done.nbytes)}, to {dst}{many}")
