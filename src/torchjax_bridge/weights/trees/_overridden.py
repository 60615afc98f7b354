"""Finds layers that may not compute what their rule assumes: subclasses, patched methods, hooks.

A subclass of ``nn.Linear`` has the weights of an ``nn.Linear``, but its own ``forward`` may use them
differently (standardised, scaled, quantised). Arrays do not show that, nor an own ``__call__`` of a subclass
of ``nnx.Linear``. Owns the check on both sides, and its messages. A `Rule` for the class or a `LayerType` for
the layer is the answer. The rules know torch's own hooks (``weight_norm``).
"""

from collections.abc import Iterator

from flax import linen

from torchjax_bridge.exchange import Path

from ..layers import linen as ours
from ..rules import RULES, Rule, own_methods
from ..settings import is_flaxs_layer, overridden_call
from ._flax_tree import FlaxNode
from ._torch_tree import TorchNode

__all__ = [
    "flax_assumptions",
    "overridden_call_words",
    "source_name",
    "square_leaf_assumption",
    "torch_assumptions",
]


def torch_assumptions(rule: Rule, node: TorchNode) -> tuple[str, ...]:
    """The assumptions about a torch layer that may compute something else than its rule's class."""
    kind = node.kind
    if kind is None or node.declared:
        return ()
    base = kind if kind in rule.types else next((one for one in kind.__mro__ if one in rule.types), kind)
    own = base is not kind and own_methods(kind, base)
    # torch keeps a patched method and hooks in these attributes and offers no other way to ask for them.
    state = getattr(node.module, "__dict__", {})
    held = [state[name] for name in _HOOKS if state.get(name)]
    if base is kind and not held and "forward" not in state:
        return ()  # nearly every layer
    hooked = any(_is_foreign(hook) for hooks in held for hook in hooks.values())
    found = []
    if own or "forward" in state:
        found.append(
            f"computed by a forward of {kind.__name__}'s own, which is assumed to act like that of "
            f"{source_name(base)}; LayerType(<path>, {source_name(base)}) says that it does, "
            f"a Rule({kind.__name__}, ...) what else it does"
        )
    if hooked:
        found.append(
            "it has hooks, which do not cross and are assumed to change nothing; "
            f"LayerType(<path>, {source_name(base)}) says that they do not"
        )
    return tuple(found)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def flax_assumptions(rule: Rule, node: TorchNode, flax_node: FlaxNode) -> Iterator[str]:
    """The same for the Flax side: judges a live module by its class, linen variables by automatic names."""
    if node.declared or id(rule) not in _BUILT_IN:
        return
    torch_class = node.kind or next(iter(rule.types), None)
    for part in flax_node.walk():
        kind = type(part.module)
        base = overridden_call(kind) if part.module is not None else None
        if base is not None:
            yield overridden_call_words(kind.__name__, base, torch_class)
        elif part.module is None and part.kind and part.leaves and not _is_flaxs(part.kind):
            yield (
                f"its place in Flax is named for a class that is not Flax's ({part.kind}), which is assumed to "
                f"compute what Flax's own layer does{_answer(torch_class)}"
            )


def square_leaf_assumption(rule: Rule, node: TorchNode, flax_node: FlaxNode, path: Path) -> str | None:
    """The assumption about a square leaf of an nnx class that is not Flax's: its shape does not show its layout."""
    if node.declared or id(rule) not in _BUILT_IN:
        return None
    for name in path[:-1]:
        flax_node = flax_node.children[name]
    if flax_node.module is None or is_flaxs_layer(type(flax_node.module)):
        return None
    return (
        f"'{path[-1]}' of a class of your own ({flax_node.kind}) is square, and assumed to lie as that of "
        f"Flax's own layer does{_answer(node.kind or next(iter(rule.types), None))}"
    )


_BUILT_IN = frozenset(map(id, RULES))


def overridden_call_words(name: str, base: type, torch_class: type | None) -> str:
    """The assumption about a Flax class with its own ``__call__``, beside a torch layer of ``torch_class``."""
    how = f"which is assumed to act like that of {base.__name__}{_answer(torch_class)}"
    return f"its twin has a __call__ of {name}'s own, {how}"


def _answer(torch_class: type | None) -> str:
    return f"; LayerType(<path>, {source_name(torch_class)}) says that it does" if torch_class else ""


def _is_flaxs(kind: str) -> bool:
    return hasattr(linen, kind) or hasattr(ours, kind)


def _is_foreign(hook: object) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("torch.")


def source_name(kind: type) -> str:
    """A class as source code."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
