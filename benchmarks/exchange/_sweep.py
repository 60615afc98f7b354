"""What one tensor costs to share and to copy, from 4 B to 256 MB (on a GPU to 4 GB), in both directions."""

from .. import _units as units
from .._case import Findings, ask
from .._setting import Setting
from ._routes import NUMPY, Direction

__all__ = ["sweep"]

_FULL = tuple(4**power for power in range(1, 15))  # 4 B, 16 B, ... 256 MB
_ON_GPU = (*_FULL, 2**30, 2**32)
_MOST_THROUGH_HOST = 2**28  # from here on, a single call through the host's memory takes seconds
_QUICK = (4, 4**6, 4**10)
_PANEL = {"share": "copy=None", "copy": "copy=True"}


def sweep(direction: Direction, setting: Setting) -> Findings:
    """Two cases for every size: sharing against the stock route, copying against a memcpy."""
    found = Findings()
    for nbytes in _QUICK if setting.quick else _FULL if setting.device == "cpu" else _ON_GPU:
        # A scalar, like a loss; otherwise a vector.
        operand = direction.make_operand(() if nbytes == 4 else (nbytes // 4,))
        for verb, candidates in (
            ("share", direction.sharing(operand)),
            ("copy", direction.copying(operand)),
        ):
            case, _ = ask(
                f"{direction.name}/{verb}/{nbytes}",
                f"What does it cost to {verb} {units.size(nbytes)} of float32, {direction.label}?",
                [one for one in candidates if nbytes <= _MOST_THROUGH_HOST or one.name != NUMPY],
                setting,
                nbytes=nbytes,
                panel=f"{direction.label}, {_PANEL[verb]}",
            )
            found.cases.append(case)
    return found
