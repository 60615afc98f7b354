"""Sequentials: when one stays an ``nnx.Sequential``, and what its modules without weights are as functions."""

import re
from collections.abc import Sequence

from ._body import Body, Statement

__all__ = ["function_text", "is_chain"]


def function_text(given: str, made: Sequence[Statement], result: str) -> str:
    """The statements that a module without weights became, as one function of ``x``."""
    known = {given: "x"}
    for statement in made:
        known[statement.target] = _replaced(statement.text, known)
    text = _replaced(result, known)
    alone = re.fullmatch(r"((?:nnx|jnp|jax\.nn)\.\w+)\(x\)", text)
    return alone.group(1) if alone else f"lambda x: {text}"


def _replaced(text: str, known: dict[str, str]) -> str:
    return re.sub(r"_v\d+_", lambda match: known.get(match.group(), match.group()), text)


def is_chain(body: Body) -> bool:
    """Whether a Sequential gives the result of each module to the next as it is."""
    children = list(body.frame.module._modules)
    if len(body.names) != 1:
        return False
    value = next(iter(body.names))
    calls = {statement.target: statement.text for statement in body.statements}
    targets = {text: target for target, text in calls.items()}
    for place, name in enumerate(children):
        if name in body.functions:
            _, given, result = body.functions[name]
            if given != value:
                return False
            value = result
        else:
            value = targets.get(f"self.layers[{place}]({value})", "")
    return body.result == value
