"""Recognizes files that cannot be opened without running their code, and says how to extract their tensors.

Nothing here opens such a file. It reads the names in the archive and the start of the pickle, and returns a command
for a user who trusts the file.
"""

import pathlib
import shlex
import struct
import zipfile

__all__ = ["extract_note", "pickle_protocol", "program_kind", "resave_note"]

# zipfile raises any of these for a damaged archive, or for another file.
_ZIP_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)

# Extracts the tensors from mappings, sequences, namespaces and objects with a state_dict, under their names.
_RESAVE_CODE = (
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
_EXTRACT_CODE = {
    "a TorchScript archive": (
        "import sys, torch; "
        'torch.save(torch.jit.load(sys.argv[1], map_location="cpu").state_dict(), sys.argv[2])'
    ),
    "a program of torch.export": (
        "import sys, torch; torch.save(dict(torch.export.load(sys.argv[1]).state_dict), sys.argv[2])"
    ),
}


def resave_note(path: pathlib.Path) -> str:
    """How to extract the tensors from a pickle, for the note of an error."""
    line = _command(_RESAVE_CODE, path)
    return f"if you trust it and Python finds its classes, this writes only its tensors:\n{line}"


def extract_note(path: pathlib.Path, program: str) -> str:
    """How to extract the weights from a program, for the note of an error."""
    return f"if you trust it, this writes only its weights:\n{_command(_EXTRACT_CODE[program], path)}"


def program_kind(path: pathlib.Path) -> str | None:
    """The kind of a file that holds a program with its weights; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except _ZIP_ERRORS:
        return None
    if "constants.pkl" in names:
        return "a TorchScript archive"
    return "a program of torch.export" if "models/model.json" in names else None


def pickle_protocol(path: pathlib.Path) -> int:
    """The pickle protocol of a file of ``torch.save``; 0 if it is unknown."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                start = file.read(2)
    except (*_ZIP_ERRORS, StopIteration):
        return 0
    return start[1] if start[:1] == b"\x80" else 0


def _command(code: str, path: pathlib.Path) -> str:
    target = path.with_name(f"{path.stem}-tensors.pt")
    return f"  python -c {shlex.quote(code)} {shlex.quote(str(path))} {shlex.quote(str(target))}"
