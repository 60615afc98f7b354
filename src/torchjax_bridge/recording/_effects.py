"""What a ``forward`` changes of its module, which no port translates: parameters, buffers, numbers it counts."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._faults import Fault
from ._frames import Node, Parameter, Value
from ._functions import short_name
from ._leaves import layer_class
from ._numbers import Attribute, Dim, Expression, Operation, Real
from ._source import SourceLine

__all__ = [
    "buffer_changed", "changed_buffer", "counted_numbers", "saved_buffers", "written_buffers",
    "written_parameter",
]  # fmt: skip

_CHANGES = "forward changes the buffer '"
_INPLACE = re.compile(r"__(i\w+|set|setitem)__|[a-z]\w*[a-z0-9]_")
_SHARES_MEMORY = re.compile(r"\.(detach|__getitem__|view|t|T\.__get__|transpose)$")

Held = tuple[nn.Module, str, str, torch.Tensor, int]


def written_parameter(function: str, args: Sequence[Any]) -> Parameter | None:
    """What a call is about to write to, its first argument or a view of it: a parameter, or the data of a buffer.

    Other writes to buffers are seen by their versions, which setting ``buffer.data`` leaves as they are.
    """
    value = args[0] if args and _INPLACE.fullmatch(short_name(function)) else None
    while isinstance(value, Value) and isinstance(value.origin, Node):
        if not _SHARES_MEMORY.search(value.origin.function):
            return None
        value = value.origin.args[0]
    origin = value.origin if isinstance(value, Value) else None
    if isinstance(origin, Parameter) and (not origin.is_buffer or function.endswith(".data.__set__")):
        return origin
    return None


def saved_buffers(modules: Mapping[str, nn.Module], whole: Collection[int]) -> list[Held]:
    """The saved buffers of modules that are looked into, with their versions; torch's own layers may write theirs.

    Args:
        modules: Every module by path.
        whole: The identities of modules that are recorded as one call, which may write theirs, too.
    """
    found = []
    for path, module in modules.items():
        if layer_class(module) is not None or id(module) in whole or ".parametrizations." in path:
            continue
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found.append((module, name, f"{path}.{name}".lstrip("."), tensor, tensor._version))
    return found


def written_buffers(held: Sequence[Held]) -> Iterator[Fault]:
    """A fault for each buffer that is not what it was before the run."""
    for module, name, path, tensor, version in held:
        now = module._buffers.get(name)
        if now is not tensor or now._version != version:
            yield Fault(buffer_changed(path), path.rpartition(".")[0], SourceLine())


def buffer_changed(path: str) -> str:
    """The reason for a fault: a buffer does not stay as it was."""
    return f"{_CHANGES}{path}', and a port has no translation of that"


def changed_buffer(fault: Fault) -> str:
    """The full name of the buffer that a fault says is changed, or ``""``."""
    return fault.reason.removeprefix(_CHANGES).partition("'")[0] if fault.reason.startswith(_CHANGES) else ""


def counted_numbers(modules: Mapping[str, nn.Module]) -> Iterator[Fault]:
    """A fault for each number among the attributes of modules that became another, computed from itself."""
    for path, module in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, Dim | Real) and _reads(value.expression, Attribute(path, name)):
                reason = f"forward counts in self.{name}, and a port keeps no count; pass it as an argument"
                yield Fault(reason, path, SourceLine())


def _reads(expression: Expression, attribute: Attribute) -> bool:
    if not isinstance(expression, Operation):
        return False
    parts = (expression.left, expression.right)
    return attribute in parts or any(_reads(part, attribute) for part in parts)
