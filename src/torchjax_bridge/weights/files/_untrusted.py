"""Files that only running their content opens, and the line that takes the tensors out of one that is trusted.

Nothing here opens such a file: it looks at the names in the archive, and words what the owner of the file may do.
"""

import pathlib
import shlex
import struct
import zipfile

__all__ = ["extracting", "pickle_protocol", "program_in", "resaving"]

# What zipfile raises on a file that is no archive, or a damaged one, depends on where.
_NO_ARCHIVE = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)

# Walks mappings, sequences, namespaces and what has a state_dict, and keeps the tensors under the names they have.
_TENSORS = (
    "import sys, torch; "
    "T = lambda x: x.detach() if isinstance(x, torch.Tensor) else "
    'T(x.state_dict()) if hasattr(x, "state_dict") else '
    'T(vars(x)) if type(x).__name__.endswith("Namespace") else '
    "T(dict(enumerate(x))) if isinstance(x, (list, tuple)) else "
    "{str(k): y for k, v in x.items() if (y := T(v)) is not None} or None "
    "if isinstance(x, dict) else None; "
    't = T(torch.load(sys.argv[1], map_location="cpu", weights_only=False)); '
    'torch.save(t, sys.argv[2]) if t is not None else sys.exit("there is no tensor in it")'
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
    except _NO_ARCHIVE:
        return None
    if "constants.pkl" in names:
        return "a TorchScript archive"
    return "a program of torch.export" if "models/model.json" in names else None


def pickle_protocol(path: pathlib.Path) -> int:
    """The protocol of the pickle in a file of ``torch.save``; 0 where it does not say."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                start = file.read(2)
    except (*_NO_ARCHIVE, StopIteration):
        return 0
    return start[1] if start[:1] == b"\x80" else 0


def _line(code: str, path: pathlib.Path) -> str:
    target = path.with_name(f"{path.stem}-tensors.pt")
    return f"  python -c {shlex.quote(code)} {shlex.quote(str(path))} {shlex.quote(str(target))}"
