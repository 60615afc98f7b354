"""The command line: ``torchjax-bridge``, also ``python -m torchjax_bridge``.

Each command has a file, and calls the other packages for its work. It imports them inside its functions:
torch and jax take seconds to import, and ``--help`` and a shell's completion should answer at once.

Exit codes: 0 done, or the same; 1 failed, or different; 2 wrong command line.
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
            sys.excepthook = _print_unexpected_error
            sys.unraisablehook = _print_unraisable
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


def _print_unexpected_error(
    kind: type[BaseException], err: BaseException, trace: TracebackType | None
) -> None:
    """An exception hook for unforeseen errors: bugs of this library, or faults of the machine."""
    del trace
    reason = (str(err).splitlines() or [""])[0]
    sys.stderr.write(f"error: {kind.__name__}: {reason} (--debug shows where)\n")


def _print_unraisable(fault: "sys.UnraisableHookArgs") -> None:
    """The hook for errors that no caller can catch.

    Silent about one: Orbax gives up on a damaged checkpoint while a thread of TensorStore still reads it.
    """
    if fault.exc_type is RuntimeError and str(fault.exc_value) == "Event loop is closed":
        return
    _print_unexpected_error(fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
