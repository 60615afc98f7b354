"""The promises on one plain tensor: ours against the floor and against the stock route."""

from .._case import Findings, ask
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, RAW, STOCK, Direction

__all__ = ["headline"]

_SHAPE = (64, 64)
# Direction -> (at most this many times the cost of raw capsules, at least this many times faster than stock).
_LIMITS = {"to_jax": (1.6, 4.5), "to_torch": (2.0, 2.5)}


def headline(direction: Direction, setting: Setting) -> Findings:
    """One 64x64 float32 tensor through every route, with many rounds."""
    case, rounds = ask(
        f"{direction.name}/headline",
        f"What does one 64x64 float32 tensor cost to share, {direction.label}?",
        direction.sharing(direction.make_operand(_SHAPE)),
        setting,
        nbytes=_SHAPE[0] * _SHAPE[1] * 4,
        effort=4,
    )
    # The limits apply to the CPU. On a GPU every route also records an event and waits for it.
    above, below = _LIMITS[direction.name] if setting.device == "cpu" else (None, None)
    promises = []
    if RAW in rounds.seconds:
        promises.append(
            Promise(
                f"{direction.name} of one tensor / {RAW}",
                "at most" if above else "reported",
                above,
                "x",
                rounds.ratio(OURS, RAW),
            )
        )
    promises.append(
        Promise(
            f"{STOCK} / {direction.name} of one tensor",
            "at least" if below else "reported",
            below,
            "x",
            rounds.ratio(STOCK, OURS),
        )
    )
    return Findings([case], promises)
