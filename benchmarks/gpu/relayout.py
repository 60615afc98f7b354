"""The ``relayout`` suite: weights whose layout changes on the device, against ``copy_`` and the peak of the card.

A relayout reads every byte once and writes it once, as a copy does. So a copy of the same bytes is the limit.
"""

from collections.abc import Callable
from typing import Any

import torch
from flax import nnx
from torch import nn

from torchjax_bridge import link, to_flax, to_jax

from .. import _units as units
from .._case import Candidate, Findings, WrongResultError, ask
from .._memory import warm_copy
from .._record import Case, Promise
from .._setting import Setting
from ..weights import MODELS, TRANSFORMER, nnx_template, torch_module

__all__ = ["run"]

COPY = "copy_ of the same bytes"
OURS = "to_jax(permuted, copy=True)"
CLONE = "clone of the state_dict"
PUSH = "link.push"
PULL = "link.pull"


def run(setting: Setting) -> Findings:
    """One transposed matrix, one convolution's kernel, and a model pushed and pulled."""
    found = setting.findings
    side = 512 if setting.quick else 16384
    found += _one(
        "linear", f"a {side}x{side} matrix", torch.rand(side, side, device=setting.torch_device), setting
    )
    channels = 64 if setting.quick else 2048
    kernel = torch.rand(channels, channels, 3, 3, device=setting.torch_device)
    found += _one("conv", f"a {channels}x{channels}x3x3 kernel", kernel, setting)
    found += _model(setting)
    return found


def _one(key: str, words: str, weight: torch.Tensor, setting: Setting) -> Findings:
    """A weight in Flax's order of axes, as fresh memory of JAX's."""
    axes = (1, 0) if weight.ndim == 2 else (2, 3, 1, 0)

    def ours(source: torch.Tensor) -> Any:
        return to_jax(source.permute(axes), copy=True)

    def check(result: Any) -> bool:
        if not torch.equal(torch.from_dlpack(result), weight.permute(axes)):
            raise WrongResultError("the values differ")
        return False

    copied = warm_copy(weight)
    case, rounds = ask(
        f"relayout/{key}",
        f"What does it cost to bring {words} of float32 into Flax's layout?",
        [
            Candidate(COPY, copied, weight, lambda _: False, limit=True),
            Candidate(OURS, ours, weight, check, ours=True),
        ],
        setting,
        nbytes=weight.nbytes,
        effort=2,
    )
    promise = Promise(f"relayout of {words} / {COPY}", "reported", None, "x", rounds.ratio(OURS, COPY))
    return Findings([case], [promise], [_rate(case, words, weight.nbytes)])


def _rate(case: Case, words: str, nbytes: int) -> str:
    """Bytes read and written per second, and the share of the card's peak."""
    spread = case.row(OURS).microseconds
    moved = 2 * nbytes / (spread.median if spread else float("inf")) * 1e6
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    peak = 2e3 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8
    share = f", {100 * moved / peak:.0f} % of the card's peak of {units.rate(peak)}" if peak else ""
    return f"The relayout of {words} reads and writes {units.rate(moved)}{share}."


def _model(setting: Setting) -> Findings:
    """A repeated push and pull of a whole model, on the device."""
    description = MODELS[TRANSFORMER](setting.quick)
    module = torch_module(description).to(setting.torch_device)
    both = link(module, to_flax(module, nnx_template(description)))
    nbytes = sum(tensor.nbytes for tensor in module.state_dict().values())

    def clone(source: nn.Module) -> Any:
        return [tensor.clone() for tensor in source.state_dict().values()]

    case, rounds = ask(
        "relayout/push",
        f"What does it cost to push the weights of a {TRANSFORMER} model ({units.size(nbytes)}) once more?",
        [
            Candidate(CLONE, clone, module, lambda _: None),
            Candidate(PUSH, lambda _: both.push(), module, _check(module), ours=True),
        ],
        setting,
        nbytes=nbytes,
        effort=2,
    )
    back, back_rounds = ask(
        "relayout/pull",
        f"What does it cost to pull the weights of a {TRANSFORMER} model once more?",
        [
            Candidate(CLONE, clone, module, lambda _: None),
            Candidate(PULL, lambda _: both.pull(), module, lambda _: None, ours=True),
        ],
        setting,
        nbytes=nbytes,
    )
    return Findings(
        [case, back],
        [
            Promise(
                f"push of a {TRANSFORMER} model / {CLONE}", "reported", None, "x", rounds.ratio(PUSH, CLONE)
            ),
            Promise(
                f"pull of a {TRANSFORMER} model / {CLONE}",
                "reported",
                None,
                "x",
                back_rounds.ratio(PULL, CLONE),
            ),
        ],
    )


def _check(module: nn.Module) -> Callable[[Any], None]:
    def check(twin: nnx.Module) -> None:
        for path, variable in nnx.to_flat_state(nnx.state(twin)):
            name = ".".join(map(str, path))
            key = name.removesuffix("kernel") + "weight" if name.endswith("kernel") else name
            tensor = module.get_parameter(key).detach()
            if not torch.equal(
                torch.from_dlpack(variable.get_value()), tensor.t() if tensor.ndim == 2 else tensor
            ):
                raise WrongResultError(f"{key} differs")

    return check
