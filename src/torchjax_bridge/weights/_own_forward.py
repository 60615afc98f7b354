"""Whether a layer computes what its rule is about: a subclass, a patch or a hook may change that.

The weights of a subclass of ``nn.Linear`` lie as those of an ``nn.Linear`` do, but a ``forward`` of its own may use
them otherwise (standardised, scaled, quantised), and no array shows it. Owns the question and its words; a `Rule`
for the class or a `LayerType` for the layer is the answer. torch's own hooks (``weight_norm``) are for the rules.
"""

from collections.abc import Iterator

from torch import nn

from ._torch_tree import TorchNode
from .rules import Rule

__all__ = ["taken_for_granted"]

# What a subclass of one of torch's layers overrides to compute something else.
_METHODS = ("forward", "_conv_forward", "__call__")


def taken_for_granted(rule: Rule, node: TorchNode) -> Iterator[str]:
    """What is assumed of a layer that may compute something else than its rule's class, one sentence each."""
    if node.kind is None or node.said:
        return
    base = next((kind for kind in node.kind.__mro__ if kind in rule.types), node.kind)
    own = base is not node.kind and any(
        getattr(node.kind, name, None) is not getattr(base, name, None) for name in _METHODS
    )
    if own or "forward" in getattr(node.module, "__dict__", ()):
        yield (
            f"computed by a forward of {node.kind.__name__}'s own, which is taken to be that of {_spelt(base)}; "
            f"LayerType(<path>, {_spelt(base)}) says that it is, a Rule({node.kind.__name__}, ...) what it is else"
        )
    if node.module is not None and any(map(_is_foreign, _hooks(node.module))):
        yield (
            f"it has hooks, which do not cross and are taken to change nothing; LayerType(<path>, {_spelt(base)}) "
            "says that they do not"
        )


def _hooks(module: nn.Module) -> Iterator[object]:
    # torch keeps hooks in these attributes and offers no other way to ask for them.
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        yield from getattr(module, name, {}).values()


def _is_foreign(hook: object) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("torch.")


def _spelt(kind: type) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
