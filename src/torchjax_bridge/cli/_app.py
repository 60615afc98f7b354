"""The table of commands, and the options that belong to none of them."""

from typing import Annotated

import typer

import torchjax_bridge

from . import _audit, _bench, _convert, _doctor, _inspect, _parity, _plan, _verify

__all__ = ["app"]

_HELP = """PyTorch and JAX share tensors, weights and code: convert, inspect and compare checkpoints.

Exit codes: 0 it is done, or the same; 1 it failed, or differs; 2 the command line is wrong."""

app = typer.Typer(
    name="torchjax-bridge",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help reads the same in a pipe, a log and a page
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchjax-bridge {torchjax_bridge.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Only ``--version`` belongs to no command."""


for _command, _help, _short in (
    (_convert.convert, _convert.HELP, "A checkpoint to the other framework or another format."),
    (_inspect.inspect, _inspect.HELP, "What a checkpoint or a model holds."),
    (_plan.plan, _plan.HELP, "How tensors would cross, and every fault."),
    (_audit.audit, _audit.HELP, "Are two models set up alike?"),
    (_parity.parity, _parity.HELP, "Do two models compute the same?"),
    (_verify.verify, _verify.HELP, "Are two checkpoints the same weights?"),
    (_doctor.doctor, _doctor.HELP, "What is installed, and does it work?"),
    (_bench.bench, _bench.HELP, "How long a tensor takes to cross here."),
):
    app.command(help=_help, short_help=_short)(_command)
