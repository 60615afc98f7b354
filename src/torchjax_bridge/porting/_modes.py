"""One body for both modes: what evaluation and training share stands once, the rest under ``self.deterministic``.

Works on syntax trees. In either mode the statements that run are those of that mode, in their order.
"""

import ast
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from ._body import Body
from ._statements import Written, written

__all__ = ["in_both_modes", "of_both_modes", "refusing_training"]


def in_both_modes(body: Body) -> Written:
    """The code of a body, with that of its other mode."""
    lines = written(body)
    if body.training is not None:
        lines = of_both_modes(lines, written(body.training))
    return refusing_training(lines) if body.evaluates_only else lines


def of_both_modes(evaluation: Written, training: Written) -> Written:
    """A body that runs ``evaluation`` after ``model.eval()``, else ``training``; both take the same arguments."""
    first, second = evaluation.lines, training.lines
    lines: list[ast.stmt] = []
    same = SequenceMatcher(None, [*map(ast.dump, first)], [*map(ast.dump, second)], autojunk=False)
    for kind, start, end, other_start, other_end in same.get_opcodes():
        if kind == "equal":
            lines += first[start:end]
        elif (both := _same_question(first[start:end], second[other_start:other_end])) is not None:
            lines.append(both)
        else:
            lines += _branch(first[start:end], second[other_start:other_end])
    return replace(training, lines=lines)


def _same_question(evaluation: Sequence[ast.stmt], training: Sequence[ast.stmt]) -> ast.stmt | None:
    """Both modes ask the same, and do something else then."""
    match [*evaluation], [*training]:
        case [ast.If(test=test, body=body, orelse=[])], [ast.If(test=other, body=trained, orelse=[])]:
            if ast.dump(test) == ast.dump(other):
                return ast.If(test, of_both_modes(Written([], body), Written([], trained)).lines, [])
    return None


def refusing_training(evaluation: Written) -> Written:
    """A body that raises an error unless the model evaluates."""
    message = "this port evaluates only, as its first lines say: call model.eval()"
    stop = ast.parse(f"if not self.deterministic:\n    raise NotImplementedError({message!r})").body
    return replace(evaluation, lines=[*stop, *evaluation.lines])


def _branch(evaluation: Sequence[ast.stmt], training: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements that run in one mode only. One that returns needs no ``else``."""
    evaluates = ast.parse("self.deterministic", mode="eval").body
    if not evaluation:
        return [ast.If(ast.UnaryOp(ast.Not(), evaluates), [*training], [])]
    if isinstance(evaluation[-1], ast.Return):
        return [ast.If(evaluates, [*evaluation], []), *training]
    return [ast.If(evaluates, [*evaluation], [*training])]
