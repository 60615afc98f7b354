"""Whether a layer computes what its rule is about: a subclass, a patch or a hook may change that.

The weights of a subclass of ``nn.Linear`` lie as those of an ``nn.Linear`` do, but a ``forward`` of its own may use
them otherwise (standardised, scaled, quantised), and no array shows it. Owns the question and its words; a `Rule`
for the class or a `LayerType` for the layer is the answer. torch's own hooks (``weight_norm``) are for the rules.
"""

from ._torch_tree import TorchNode
from .rules import Rule

__all__ = ["taken_for_granted"]

# What a subclass of one of torch's layers overrides to compute something else.
_METHODS = ("forward", "_conv_forward", "__call__")


def taken_for_granted(rule: Rule, node: TorchNode) -> tuple[str, ...]:
    """What is assumed of a layer that may compute something else than its rule's class, one sentence each."""
    kind = node.kind
    if kind is None or node.said:
        return ()
    base = kind if kind in rule.types else next((one for one in kind.__mro__ if one in rule.types), kind)
    own = base is not kind and any(
        getattr(kind, name, None) is not getattr(base, name, None) for name in _METHODS
    )
    # torch keeps a patched method and hooks in these attributes and offers no other way to ask for them.
    state = getattr(node.module, "__dict__", {})
    hooks = [hook for name in _HOOKS if name in state for hook in state[name].values()]
    if base is kind and not hooks and "forward" not in state:
        return ()  # as nearly every layer is
    hooked = any(map(_is_foreign, hooks))
    found = []
    if own or "forward" in state:
        found.append(
            f"computed by a forward of {kind.__name__}'s own, which is taken to be that of {_spelt(base)}; "
            f"LayerType(<path>, {_spelt(base)}) says that it is, a Rule({kind.__name__}, ...) what it is else"
        )
    if hooked:
        found.append(
            f"it has hooks, which do not cross and are taken to change nothing; LayerType(<path>, {_spelt(base)}) "
            "says that they do not"
        )
    return tuple(found)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def _is_foreign(hook: object) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("torch.")


def _spelt(kind: type) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
