"""Whether sharing costs the same at any size, up to 1 GB."""

from .. import _units as units
from .._case import Candidate, Findings, ask
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, Direction, check_result

__all__ = ["flatness"]

_FULL = (4 * 1024, 1024**2, 32 * 1024**2, 1024**3)
_QUICK = (4 * 1024, 1024**2)


def flatness(direction: Direction, setting: Setting) -> Findings:
    """Ours at each size, with the smallest as baseline."""
    sizes = _QUICK if setting.quick else _FULL

    def candidate(nbytes: int) -> Candidate:
        operand = direction.make_operand((nbytes // 4,))
        return Candidate(
            f"{OURS}, {units.size(nbytes)}",
            direction.ours,
            operand,
            lambda result: check_result(operand, result, must_share=True),
            ours=True,
        )

    candidates = [candidate(nbytes) for nbytes in sizes]
    least, most = candidates[0].name, candidates[-1].name
    case, rounds = ask(
        f"{direction.name}/flat",
        f"Does sharing cost the same up to {units.size(sizes[-1])}, {direction.label}?",
        candidates,
        setting,
        effort=2,
    )
    promise = Promise(
        f"{direction.name} of {units.size(sizes[-1])} / of {units.size(sizes[0])}",
        "at most",
        1.2,
        "x",
        rounds.ratio(most, least),
    )
    return Findings([case], [promise])
