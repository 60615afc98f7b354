"""``torchjax-bridge convert``: read the options, build the two sides, convert, say what came out."""

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from ._options import Debug, Key, Memory, Model, Rules, Template, as_bytes, as_dtype
from ._settings import say_settings
from ._terminal import human, progress, say, spoken

HELP = """Convert a checkpoint to the other framework, or to another format, one tensor at a time.

SRC and DST are files or folders: safetensors (also sharded), .pt/.pth/.th/.bin, .msgpack, Orbax. DST appears only
when it is whole. From torch to Flax, --template says what comes out; from Flax to torch, --model does.

\b
Examples:
  torchjax-bridge convert llama/ llama-flax/ --to flax --template my.models:flax_llama
  torchjax-bridge convert net.pth net.msgpack --to flax --template my.nets:variables --model my.nets:Net
  torchjax-bridge convert net.pt net.safetensors --to torch --dtype bf16

Exit codes: 0 converted; 1 the source is damaged, the two sides do not fit, or DST cannot be written; 2 usage."""


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="What to read.")],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="What to write: a file by its suffix, else a folder.")
    ],
    to: Annotated[Literal["flax", "torch"], typer.Option("--to", help="The framework of DST.")],
    format: Annotated[
        Literal["safetensors", "pt", "msgpack", "orbax"] | None,
        typer.Option("--format", help="By default what the name of DST says, else safetensors."),
    ] = None,
    model: Model = None,
    template: Template = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="Cast floating-point tensors: bf16, f16, f32, f64."),
    ] = None,
    rules: Rules = None,
    key: Key = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            "--shard-size", metavar="SIZE", help="The size of one file; by default as SRC is sharded."
        ),
    ] = None,
    memory: Memory = "1GB",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that a run which was killed had finished.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it is there.")] = False,
    debug: Debug = False,
) -> None:
    """Parse, convert, report."""
    from torchjax_bridge.weights import PairingWarning, files

    from ._factory import flax_template, torch_model
    from ._rules import read_rules

    cast = None if dtype is None else as_dtype(dtype)
    limit, size = as_bytes(memory), None if shard_size is None else as_bytes(shard_size)
    hints = read_rules(rules)
    sides = torch_model(model, debug), flax_template(template, debug)
    with spoken(debug, model), ExitStack() as shown, warnings.catch_warnings():
        warnings.simplefilter("ignore", PairingWarning)  # said below, in our own way
        done = files.convert(
            src,
            dst,
            to=to,
            format=format,
            model=sides[0],
            template=sides[1],
            rules=hints,
            dtype=cast,
            memory=limit,
            shard_size=size,
            key=key,
            resume=resume,
            overwrite=overwrite,
            progress=lambda route: shown.enter_context(progress(f"converting {src}", route.nbytes)),
        )
    if done.note:
        say(f"note: {src} was read as {done.note}")
    if done.left:
        say(f"note: {dst} has no header for metadata: {', '.join(map(repr, done.left))} stayed behind")
    if done.plan is not None:
        for text in done.plan.assumed:
            say(f"assumed: {text}")
        for note in done.plan.notes:
            say(f"note: {note}")
    say_settings(done.settings)
    many = f" in {len(done.files)} files" if len(done.files) > 1 else ""
    say(f"wrote {done.leaves} tensors, {human(done.nbytes)}, to {dst}{many}")
