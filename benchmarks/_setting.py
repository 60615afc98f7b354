"""What a suite is told: the device, the effort, whether to time peers; and how to wait for that device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import torch

from ._findings import Findings
from ._timing import Pace

__all__ = ["OutOfTime", "Setting", "why_no_device"]


class OutOfTime(BaseException):
    """The process was asked to stop; what was found so far is still to be written."""


def _silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Setting:
    """Handed to every suite."""

    device: str
    """``"cpu"`` or ``"cuda"``: torch's name."""
    quick: bool = False
    """Seconds instead of minutes: fewer sizes and rounds, to see that everything runs."""
    brisk: bool = False
    """A quarter of the rounds, for a machine that is lent by the minute."""
    peers: bool = False
    """Whether other libraries are timed too, where they are installed."""
    findings: Findings = field(default_factory=Findings, compare=False)
    """What a suite adds to, question by question, so that a run that is stopped keeps what it has."""
    progress: Callable[[str], None] = field(default=_silent, compare=False)
    """Told what is being measured."""

    @property
    def pace(self) -> Pace:
        """The effort for an ordinary question."""
        if self.quick:
            return Pace(5, 3, 2e-4, 0.15)
        return Pace(20, 5, 1e-3, 0.75) if self.brisk else Pace(80, 7, 1e-3, 3.0)

    @property
    def jax_device(self) -> jax.Device:
        """The JAX device on which operands live."""
        return jax.devices("cpu" if self.device == "cpu" else "gpu")[0]

    @property
    def torch_device(self) -> torch.device:
        """The torch device on which operands live."""
        return torch.device("cpu") if self.device == "cpu" else torch.device("cuda", 0)

    @property
    def settle(self) -> Callable[[Any], None]:
        """Return only when what the calls have started has ended, in both frameworks."""
        return _settle_cpu if self.device == "cpu" else _settle_cuda


def _settle_cpu(last: Any) -> None:
    # torch's CPU calls have ended when they return; JAX may still be computing a result.
    if isinstance(last, jax.Array):
        last.block_until_ready()


def _settle_cuda(last: Any) -> None:
    _settle_cpu(last)
    # Waits for every stream of the device's context, which torch and JAX share.
    torch.cuda.synchronize()


def why_no_device(device: str) -> str:
    """Why nothing can be measured on a device; empty when it can."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no"
        return f"torch sees no CUDA device (torch {torch.__version__} was built with {built} CUDA)"
    try:
        jax.devices("gpu")
    except RuntimeError:
        return f"JAX sees no CUDA device (jax {jax.__version__}; install jax[cuda13] to give it one)"
    return ""
