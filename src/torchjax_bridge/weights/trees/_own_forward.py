"""Whether a layer computes what its rule is about: a subclass, a patch or a hook may change that.

The weights of a subclass of ``nn.Linear`` lie as those of an ``nn.Linear`` do, but a ``forward`` of its own may use
them otherwise (standardised, scaled, quantised), and no array shows it; nor does one show a ``__call__`` of a
subclass of ``nnx.Linear``. Owns the question, on both sides, and its words; a `Rule` for the class or a `LayerType`
for the layer is the answer. torch's own hooks (``weight_norm``) are for the rules.
"""

from collections.abc import Iterator

from flax import linen

from torchjax_bridge.exchange import Path

from ..layers import linen as ours
from ..rules import RULES, Rule
from ..settings import is_flaxs_layer, overridden_call
from ._flax_tree import FlaxNode
from ._torch_tree import TorchNode

__all__ = ["call_of_its_own", "lies_by_its_name", "spelt", "taken_for_granted", "taken_for_granted_in_flax"]

# What a subclass of one of torch's layers overrides to compute something else.
_METHODS = ("forward", "_conv_forward", "__call__")


def taken_for_granted(rule: Rule, node: TorchNode) -> tuple[str, ...]:
    """What is assumed of a layer that may compute something else than its rule's class, one sentence each."""
    kind = node.kind
    if kind is None or node.declared:
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
            f"computed by a forward of {kind.__name__}'s own, which is taken to be that of {spelt(base)}; "
            f"LayerType(<path>, {spelt(base)}) says that it is, a Rule({kind.__name__}, ...) what it is else"
        )
    if hooked:
        found.append(
            f"it has hooks, which do not cross and are taken to change nothing; LayerType(<path>, {spelt(base)}) "
            "says that they do not"
        )
    return tuple(found)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def taken_for_granted_in_flax(rule: Rule, node: TorchNode, flax_node: FlaxNode) -> Iterator[str]:
    """The same of the Flax side: of a live module by its class, of linen's variables by an automatic name."""
    if node.declared or id(rule) not in _BUILT_IN:
        return
    said = node.kind or next(iter(rule.types), None)
    for part in flax_node.walk():
        kind = type(part.module)
        base = overridden_call(kind) if part.module is not None else None
        if base is not None:
            yield call_of_its_own(kind.__name__, base, said)
        elif part.module is None and part.kind and part.leaves and not _is_flaxs(part.kind):
            yield (
                f"its place in Flax is named for a class that is not Flax's ({part.kind}), which is taken to "
                f"compute what Flax's own layer does{_answer(said)}"
            )


def lies_by_its_name(rule: Rule, node: TorchNode, flax_node: FlaxNode, path: Path) -> str | None:
    """What is assumed of a square leaf, which does not show its layout, of an nnx class that is not Flax's."""
    if node.declared or id(rule) not in _BUILT_IN:
        return None
    for name in path[:-1]:
        flax_node = flax_node.children[name]
    if flax_node.module is None or is_flaxs_layer(type(flax_node.module)):
        return None
    return (
        f"'{path[-1]}' of a class of your own ({flax_node.kind}) is square, and taken to lie as that of Flax's own "
        f"layer does{_answer(node.kind or next(iter(rule.types), None))}"
    )


_BUILT_IN = frozenset(map(id, RULES))


def call_of_its_own(name: str, base: type, said: type | None) -> str:
    """The words for a Flax class with a ``__call__`` of its own, where torch has a layer of class ``said``."""
    return f"its twin has a __call__ of {name}'s own, which is taken to be that of {base.__name__}{_answer(said)}"


def _answer(said: type | None) -> str:
    return f"; LayerType(<path>, {spelt(said)}) says that it does" if said else ""


def _is_flaxs(kind: str) -> bool:
    return hasattr(linen, kind) or hasattr(ours, kind)


def _is_foreign(hook: object) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("torch.")


def spelt(kind: type) -> str:
    """A class as one types it."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
