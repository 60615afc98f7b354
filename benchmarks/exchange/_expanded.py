"""A gradient as ``y.sum().backward()`` makes it: one number expanded to a shape, which cannot be shared."""

from .._case import Candidate, Findings, ask
from .._record import Promise
from .._setting import Setting
from ._routes import OURS, Direction, check_result

__all__ = ["expanded"]

_CONTIGUOUS_FIRST = f"{OURS}, after .contiguous()"


def expanded(direction: Direction, setting: Setting) -> Findings:
    """64x64 floats with strides of 0: made contiguous first, and as they are."""
    tensor = direction.make_operand(()).expand(64, 64)
    cross = direction.ours

    def check_copied(array: object) -> bool:
        return check_result(tensor, array, must_share=False)

    case, rounds = ask(
        "to_jax/expanded",
        "What does a 64x64 tensor cost that is one number expanded?",
        [
            Candidate(_CONTIGUOUS_FIRST, lambda tensor: cross(tensor.contiguous()), tensor, check_copied),
            Candidate(OURS, cross, tensor, check_copied, ours=True),
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
        rounds.ratio(OURS, _CONTIGUOUS_FIRST),
    )
    return Findings([case], [promise])
