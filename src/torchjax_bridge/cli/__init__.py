"""THE COMMAND LINE: ``torchjax-bridge``, also ``python -m torchjax_bridge``.

One file a command; what they do is done in the other rooms. Exit codes are the same everywhere: 0 it is done, or
the same; 1 it failed, or differs; 2 the command line itself is wrong.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from ._app import app
    except ModuleNotFoundError as err:
        if err.name not in ("typer", "rich", "click", "flax"):
            raise
        extras = "flax,cli" if err.name == "flax" else "cli"
        sys.stderr.write(
            f"error: the command line needs {err.name}: pip install 'torchjax-bridge[{extras}]'\n"
        )
        raise SystemExit(1) from None
    app(prog_name="torchjax-bridge")
