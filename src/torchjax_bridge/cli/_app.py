"""The table of commands, and the options of the program itself."""

from typing import Annotated

import typer

import torchjax_bridge

from . import _audit, _bench, _convert, _doctor, _inspect, _parity, _plan, _port, _verify

__all__ = ["app"]

_HELP = """PyTorch and JAX share tensors, weights and code: port models; convert, inspect and compare checkpoints.

Exit codes: 0 done, or the same; 1 failed, or different; 2 wrong command line."""

app = typer.Typer(
    name="torchjax-bridge",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help reads the same in a pipe, a log and a page
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"torchjax-bridge {torchjax_bridge.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Holds ``--version``, the only option without a command."""


for _command, _help, _short in (
    (_port.port, _port.HELP, "Write a torch model as Flax source, with its weights and a proof."),
    (_convert.convert, _convert.HELP, "Convert a checkpoint to the other framework or another format."),
    (_inspect.inspect, _inspect.HELP, "Show what a checkpoint or a model holds."),
    (_plan.plan, _plan.HELP, "Show how a checkpoint would be converted, and every fault."),
    (_audit.audit, _audit.HELP, "Compare the settings of two models."),
    (_parity.parity, _parity.HELP, "Compare the outputs of two models."),
    (_verify.verify, _verify.HELP, "Compare the weights of two checkpoints."),
    (_doctor.doctor, _doctor.HELP, "Check the installation."),
    (_bench.bench, _bench.HELP, "Time how long a tensor takes to cross on this machine."),
):
    app.command(help=_help, short_help=_short)(_command)
