"""A gradient as ``y.sum().backward()`` sends it: one number expanded to a shape, which cannot be shared."""

from .._case import Candidate, Findings, ask
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, Direction, check_crossed

__all__ = ["expanded"]

_LAID_OUT = f"{OURS}, after .contiguous()"


def expanded(direction: Direction, setting: Setting) -> Findings:
    """64x64 floats with strides of 0, laid out first and as they are."""
    tensor = direction.make(()).expand(64, 64)
    cross = direction.ours

    def copied(array: object) -> bool:
        return check_crossed(tensor, array, must_share=False)

    case, rounds = ask(
        "to_jax/expanded",
        "What does a 64x64 tensor cost that is one number expanded?",
        [
            Candidate(_LAID_OUT, lambda gradient: cross(gradient.contiguous()), tensor, copied),
            Candidate(OURS, cross, tensor, copied, ours=True),
        ],
        setting,
        effort=4,
    )
    on_cpu = setting.device == "cpu"
    promise = Promise(
        "to_jax of an expanded tensor / of its .contiguous()",
        "at most" if on_cpu else "reported",
        1.2 if on_cpu else None,
        "x",
        rounds.ratio(OURS, _LAID_OUT),
    )
    return Findings([case], [promise])
