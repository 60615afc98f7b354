"""Files that only running their content opens, and the line that takes the tensors out of one that is trusted.

Nothing here opens such a file: it looks at the names in the archive, and words what the owner of the file may do.
"""

import pathlib
import shlex
import struct
import zipfile

__all__ = ["extracting", "program_in", "resaving"]

_TENSORS = (
    "import sys, torch; T = torch.Tensor; "
    'm = torch.load(sys.argv[1], map_location="cpu", weights_only=False); '
    'm = m if isinstance(m, dict) else {"model": m}; '
    'm = {k: getattr(v, "state_dict", lambda: v)() for k, v in m.items()}; '
    "torch.save({k: v for k, v in m.items() if isinstance(v, T) or isinstance(v, dict) and v and "
    "all(isinstance(x, T) for x in v.values())}, sys.argv[2])"
)
_PROGRAMS = {
    "a TorchScript archive": (
        "import sys, torch; "
        'torch.save(torch.jit.load(sys.argv[1], map_location="cpu").state_dict(), sys.argv[2])'
    ),
    "a program of torch.export": (
        "import sys, torch; torch.save(dict(torch.export.load(sys.argv[1]).state_dict), sys.argv[2])"
    ),
}


def resaving(path: pathlib.Path) -> str:
    """How to take the tensors out of a pickle, as the note of an error."""
    line = _line(_TENSORS, path)
    return f"if you trust it, this writes its tensors alone, where Python finds its classes:\n{line}"


def extracting(path: pathlib.Path, program: str) -> str:
    """How to take the weights out of a program, as the note of an error."""
    return f"if you trust it, this writes its weights alone:\n{_line(_PROGRAMS[program], path)}"


def program_in(path: pathlib.Path) -> str | None:
    """What a file is that holds a program with its weights; None if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
    ):
        return None
    if "constants.pkl" in names:
        return "a TorchScript archive"
    return "a program of torch.export" if "models/model.json" in names else None


def _line(code: str, path: pathlib.Path) -> str:
    target = path.with_name(f"{path.stem}-tensors.pt")
    return f"  python -c {shlex.quote(code)} {shlex.quote(str(path))} {shlex.quote(str(target))}"
