"""``python -m benchmarks.gpu._child [--rehearse] MODULE ARGUMENTS``: runs a module, with the stand-in if asked to.

Every process of the proof starts here, so that a rehearsal and a run differ in one word.
"""

import ctypes
import runpy
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["command"]


def command(module: str, arguments: Sequence[str], *, rehearse: bool) -> list[str]:
    """The command line that runs a module here."""
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu._child",
        *(["--rehearse"] if rehearse else []),
        module,
        *arguments,
    ]


def _die_with_parent() -> None:
    """If the proof itself is killed, nothing that it started goes on holding the GPU (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _run(argv: Sequence[str]) -> None:
    _die_with_parent()
    if argv[:1] == ["--rehearse"]:
        from ._stand_in import install

        install()
        argv = argv[1:]
    module, *arguments = argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(sys.argv[1:])
