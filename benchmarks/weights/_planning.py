"""What it costs to understand a model before anything moves."""

from torchjax_bridge import plan

from .._case import Candidate, Findings, WrongResultError, ask
from .._record import Promise
from .._setting import Setting
from ._models import nnx_template, torch_module

__all__ = ["planning"]

_KEYS = "module.state_dict()"
_PLAN = "plan"


def planning(setting: Setting) -> Findings:
    """A plan for 1,000 tensors: 250 blocks of a linear layer and a norm without statistics."""
    blocks = 25 if setting.quick else 250
    description = {f"block{k}": {"a": ("linear", 8, 8), "b": ("linear", 8, 8)} for k in range(blocks)}
    module, template = torch_module(description), nnx_template(description)

    def check(made: object) -> None:
        if getattr(made, "ok", False) is not True:
            raise WrongResultError(f"the plan has faults: {made}")

    case, rounds = ask(
        "weights/plan",
        f"What does it cost to plan the conversion of {4 * blocks:,} tensors?",
        [
            Candidate(_KEYS, lambda source: source.state_dict(), module, lambda _: None),
            Candidate(_PLAN, lambda source: plan(source, template), module, check, ours=True),
        ],
        setting,
        effort=2,
    )
    milliseconds = rounds.combine(lambda seconds: 1e3 * seconds[_PLAN])
    text = f"plan of a {4 * blocks:,}-tensor model"
    return Findings(
        [case], [Promise(text, "at most", 100.0 if not setting.quick else 10.0, "ms", milliseconds)]
    )
