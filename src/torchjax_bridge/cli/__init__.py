"""The command line: ``torchjax-bridge``, also ``python -m torchjax_bridge``.

Each command has a file, and calls the other packages for its work. It imports them inside its functions:
torch and jax take seconds to import, and ``--help`` and a shell's completion should answer at once.

Exit codes, for every command: 0 it is done, or the same; 1 it failed, or differs; 2 the command line is wrong.
"""

import sys
from types import TracebackType

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from typer.main import get_command

        from ._app import app

        if "--debug" not in sys.argv:
            sys.excepthook = _in_one_line
            sys.unraisablehook = _beside_the_point
        get_command(app)(prog_name="torchjax-bridge")
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if missing not in ("typer", "rich", "flax"):
            raise
        extras = "flax,cli" if missing == "flax" else "cli"
        sys.stderr.write(
            f"error: the command line needs {missing}: pip install 'torchjax-bridge[{extras}]'\n"
        )
        raise SystemExit(1) from None


def _in_one_line(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
    """What nobody foresaw: a fault of ours, or of the machine."""
    del trace
    reason = (str(err).splitlines() or [""])[0]
    sys.stderr.write(f"error: {kind.__name__}: {reason} (--debug shows where)\n")


def _beside_the_point(fault: "sys.UnraisableHookArgs") -> None:
    """What a thread could tell nobody: Orbax gives up on a damaged checkpoint while TensorStore still reads it."""
    if fault.exc_type is RuntimeError and str(fault.exc_value) == "Event loop is closed":
        return
    _in_one_line(fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
