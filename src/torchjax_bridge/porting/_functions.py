"""Activations that the instances of one class do not share: each instance is given its own, as a function.

Knows torch's modules that work on each element and have no weights.
"""

from collections.abc import Mapping

from torch import nn

__all__ = ["given_functions", "is_activation"]

_ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)


def given_functions(modules: Mapping[str, nn.Module]) -> set[str]:
    """The paths of such modules under one name of one class, where they are not all the same."""
    found: dict[tuple[type[nn.Module], str], dict[str, str]] = {}
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        holder = modules[above]
        if path and not isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            found.setdefault((type(holder), name), {})[path] = _description(module)
    return {
        path
        for kinds in found.values()
        if "" not in kinds.values() and len(set(kinds.values())) > 1
        for path in kinds
    }


def is_activation(module: nn.Module) -> bool:
    """Whether a module works on each element and has no weights."""
    return type(module) in _ELEMENTWISE


def _description(module: nn.Module) -> str:
    """What a module computes; nothing for one of another kind."""
    if not is_activation(module):
        return ""
    settings = [one for one in module.extra_repr().split(", ") if not one.startswith("inplace")]
    return f"{type(module).__name__}({', '.join(settings)})"
