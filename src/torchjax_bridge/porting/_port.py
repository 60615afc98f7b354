"""`port`: the way in, and what it gives."""

import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchjax_bridge.errors import PortError
from torchjax_bridge.recording import Fault, record
from torchjax_bridge.weights import to_flax

from ._classes import definitions
from ._model import Model
from ._rules import UserRule, rules_of
from ._source import source_of

__all__ = ["Port", "port"]


@dataclass
class Port:
    """A torch module as Flax source.

    Attributes:
        source: The text of the file.
        model: The nnx module of that source, with the weights.
        rules: What `to_flax`, `to_state_dict`, `to_optax` and `parity` need to pair the two models.
    """

    source: str
    model: Any
    rules: tuple[UserRule, ...]
    name: str

    def save(self, path: str | Path) -> None:
        """Write the source to a file."""
        Path(path).write_text(self.source)


def port(module: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None) -> Port:
    """Write a torch module as Flax source."""
    recording = record(module, inputs, kwargs)
    model = Model(recording)
    model.run()
    refuse(model.faults, type(module).__name__)
    classes = definitions(model)
    source = source_of(classes, header(module))
    twin = _load(source, classes[-1].name)
    rules = rules_of(model, classes)
    filled = _filled(module, twin, rules)
    return Port(source, filled, rules, classes[-1].name)


def header(module: nn.Module) -> str:
    """The docstring of the file."""
    kind = type(module)
    return (
        f"{kind.__name__} of {kind.__module__}, in Flax.\n\n"
        f"Made from PyTorch {torch.__version__.partition('+')[0]} on {date.today():%Y-%m-%d}. "
        "Images have their channels last: ``(N, H, W, C)``.\n"
    )


def refuse(faults: Sequence[Fault], name: str) -> None:
    """Raise one error with every fault."""
    if not faults:
        return
    lines = [f"  '{f.path}' ({f.source}: {f.source.text}): {f.reason}" for f in faults]
    error = PortError(f"{name} cannot be ported:\n" + "\n".join(lines))
    error.faults = tuple(faults)
    raise error


def _load(source: str, name: str) -> Any:
    """The class of the source, which runs as a module of its own."""
    module = types.ModuleType(f"ported_{name}")
    sys.modules[module.__name__] = module
    code = compile(source, f"<{module.__name__}>", "exec")
    exec(code, module.__dict__)
    return getattr(module, name)


def _filled(module: nn.Module, twin: Any, rules: Iterable[UserRule]) -> Any:
    from flax import nnx

    template = nnx.eval_shape(lambda: twin(rngs=nnx.Rngs(0)))
    return to_flax(module, template, rules=tuple(rules))
