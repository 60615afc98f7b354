"""One body for instances of a class that ran other statements: where a setting decides, an ``if``.

The recordings say which statements each instance ran. The author's source says by which condition; it is a hint,
used if it holds for exactly the instances that ran them.
"""

import ast
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ._author_tests import asked, conditional, in_mode, is_copy, opposite, reads
from ._authors import author_conditions
from ._body import Body
from ._expressions import UnknownError, evaluated
from ._modes import of_both_modes, refusing_training
from ._names import VARIABLE, Line, names_of
from ._statements import Written, arguments, parsed, prepared

__all__ = ["Variant", "merged"]

_counter = itertools.count(1)


@dataclass
class Variant:
    """Instances with equal bodies.

    Attributes:
        body: The body of one of them.
        modules: The instances.
        layers: The attributes that they have.
    """

    body: Body
    modules: Sequence[nn.Module]
    layers: set[str]


@dataclass
class _Branch:
    """Statements that some variants run, and others that the others run."""

    arms: list[tuple[tuple[int, ...], list[Line]]]
    copies: list[list[Line]] = field(default_factory=lambda: [[], []])
    test: ast.expr | None = None
    is_expression: bool = False


class _FailedError(Exception):
    """The bodies have no common form."""


def merged(variants: Sequence[Variant]) -> tuple[Written, set[str]] | None:
    """One body for all variants, and the attributes that its conditions read; None where there is none."""
    trained = [replace(v, body=v.body.training or v.body) for v in variants]
    try:
        written, attributes = _Merge(variants).run()
        if any(v.body.training is not None for v in variants):
            training, more = _Merge(trained, in_training=True).run()
            written, attributes = of_both_modes(written, training), attributes | more
    except _FailedError:
        return None
    evaluates_only = any(v.body.evaluates_only for v in variants)
    return (refusing_training(written) if evaluates_only else written), attributes


class _Merge:
    def __init__(self, variants: Sequence[Variant], in_training: bool = False) -> None:
        self.variants = variants
        self.in_training = in_training
        self.lines = [prepared(variant.body) for variant in variants]
        if len({sum(line.is_alias for line in lines) for lines in self.lines}) > 1:
            self.lines = [prepared(variant.body, always=True) for variant in variants]
        self.known: list[dict[str, str]] = [
            {} for _ in variants
        ]  # the common variable of each of a variant's
        self.place: dict[str, int] = {}
        self.author: dict[str, Line] = {}
        self.items: list[Line | _Branch] = []
        self.joins: dict[tuple[tuple[int, str], ...], str] = {}
        self.attributes: set[str] = set()
        self.flags: set[str] = set()

    def run(self) -> tuple[Written, set[str]]:
        first = self.variants[0].body
        if any(arguments(v.body) != arguments(first) for v in self.variants):
            raise _FailedError
        texts = {text: variable for variable, text in first.names.items()}
        for known, variant in zip(self.known, self.variants, strict=True):
            for variable, text in variant.body.names.items():
                known[variable] = texts.setdefault(text, variable)
        everyone = tuple(range(len(self.variants)))
        for common in self._aligned():
            if isinstance(common, _Branch):
                self.items.append(common)
                for group, runs in self._groups(common):
                    lines = [self._line(group, alike, inside=True) for alike in zip(*runs, strict=True)]
                    common.arms.append((group, lines))
                self._condition(common)
            else:
                self.items.append(self._line(everyone, common))
        params = {variable: text for text, variable in texts.items()}
        return self._written(params, first), self.attributes

    # --- alignment ------------------------------------------------------------------------------------------

    def _aligned(self) -> Iterator[Any]:
        """Statements that all variants run, one line a variant, with a branch wherever they differ between."""
        tokens = [[_token(line) for line in lines] for lines in self.lines]
        shared = tokens[0]
        for other in tokens[1:]:
            blocks = difflib.SequenceMatcher(None, shared, other, autojunk=False).get_matching_blocks()
            shared = [token for block in blocks for token in shared[block.a : block.a + block.size]]
        at = [0] * len(tokens)
        for token in (*shared, None):
            ends = [
                len(given) if token is None else given.index(token, start)
                for given, start in zip(tokens, at, strict=True)
            ]
            if any(end > start for start, end in zip(at, ends, strict=True)):
                branch = _Branch([])
                self._runs = [
                    lines[start:end] for lines, start, end in zip(self.lines, at, ends, strict=True)
                ]
                yield branch
            if token is not None:
                yield [lines[end] for lines, end in zip(self.lines, ends, strict=True)]
                at = [end + 1 for end in ends]

    def _groups(self, branch: _Branch) -> list[tuple[tuple[int, ...], list[list[Line]]]]:
        groups: dict[tuple[object, ...], list[int]] = {}
        for variant, run in enumerate(self._runs):
            groups.setdefault(tuple(map(_token, run)), []).append(variant)
        if len(groups) > 2:
            raise _FailedError
        if len(groups) == 1:  # all ran the same lines, in another order
            raise _FailedError
        found = [(tuple(group), [self._runs[variant] for variant in group]) for group in groups.values()]
        return sorted(found, key=lambda pair: not pair[1][0])

    # --- variables ------------------------------------------------------------------------------------------

    def _line(self, group: tuple[int, ...], lines: Sequence[Line], inside: bool = False) -> Line:
        """The line of several variants, with common variables."""
        uses = [VARIABLE.findall(line.text) for line in lines]
        common = [
            self._common({v: self.known[v][names[i]] for v, names in zip(group, uses, strict=True)})
            for i in range(len(uses[0]))
        ]
        supply = iter(common)
        text = VARIABLE.sub(lambda _: next(supply), lines[0].text)
        for binds in zip(*(line.names for line in lines), strict=True):
            for variant, variable in zip(group, binds, strict=True):
                self.known[variant][variable] = binds[0]
            self.place[binds[0]] = len(self.items) - inside
            self.author[binds[0]] = lines[0]
        return replace(lines[0], text=text, path=frozenset(group) if inside else None)

    def _common(self, variables: Mapping[int, str]) -> str:
        """The variable that holds, for each variant, one of these."""
        if len(set(variables.values())) == 1:
            return next(iter(variables.values()))
        key = tuple(sorted(variables.items()))
        if key in self.joins:
            return self.joins[key]
        after = max(self.place.get(variable, 0) for variable in variables.values())
        for place, branch in enumerate(self.items):
            if place < after or not isinstance(branch, _Branch) or len(branch.arms) < 2:
                continue
            sides = [{variables[v] for v in group if v in variables} for group, _ in branch.arms]
            if any(len(side) > 1 for side in sides) or sides[0] == sides[1]:
                continue
            joined = f"_v{10**6 + next(_counter)}_"
            made = [self.author.get(variable) for side in sides for variable in side]
            wished = sorted(
                (line for line in made if line and len(line.author) == 1), key=lambda x: x.path is None
            )
            names = tuple(dict.fromkeys(line.author[0] for line in wished))
            for arm, (side, (group, _)) in enumerate(zip(sides, branch.arms, strict=True)):
                for variable in side:
                    path = frozenset(group) & frozenset(variables)
                    copy = Line((joined,), joined, variable, author=names, path=path, is_copy=True)
                    branch.copies[arm].append(copy)
            self.joins[key] = joined
            self.place[joined] = place
            self.author[joined] = Line((joined,), joined, "", author=names)
            return joined
        raise _FailedError

    # --- conditions -----------------------------------------------------------------------------------------

    def _condition(self, branch: _Branch) -> None:
        """Find what decides: a condition of the author's, else whether an optional layer is there."""
        lines = [line.source for _, arm in branch.arms for line in arm]
        code = self.variants[0].body.frame.code
        if code is not None:
            near = {source.line for source in lines if source.code is code}
            for test in (in_mode(test, self.in_training) for test in author_conditions(code, near)):
                for wanted, wish in ((True, test), (False, ast.UnaryOp(ast.Not(), test))):
                    if self._decides(test, branch, wanted) and self._readable(test):
                        branch.test = asked(wish, self.flags)
                        return
        yes, no = branch.arms[0][0], branch.arms[1][0]
        text = " ".join(line.text for line in branch.arms[0][1])
        for name in sorted(self.variants[yes[0]].layers):
            has = [variant for variant, one in enumerate(self.variants) if name in one.layers]
            if set(has) == set(yes) and re.search(rf"self\.{name}\b", text) and no:
                branch.test = ast.parse(f"self.{name} is not None", mode="eval").body
                return
        raise _FailedError

    def _decides(self, test: ast.expr, branch: _Branch, wanted: bool) -> bool:
        for arm, (group, _) in enumerate(branch.arms):
            for variant in group:
                for module in self.variants[variant].modules:
                    try:
                        if bool(evaluated(test, {}, module)) is not ((arm == 0) is wanted):
                            return False
                    except (UnknownError, TypeError):
                        return False
        return True

    def _readable(self, test: ast.expr) -> bool:
        """Whether the port can ask it: note the settings that it needs."""
        needed, flags = set(), set()
        for node in ast.walk(test):
            if isinstance(node, ast.Attribute):
                values = [getattr(m, node.attr, None) for v in self.variants for m in v.modules]
                if all(value is None or isinstance(value, nn.Module | nn.Parameter) for value in values):
                    held = [node.attr in v.layers for v in self.variants for _ in v.modules]
                    if any(isinstance(value, nn.Module) for value in values) and not any(held):
                        flags.add(node.attr)  # modules without weights, which are code where they are called
                    elif held != [value is not None for value in values]:
                        return False
                    continue
                if not all(isinstance(value, bool | int | float | str) for value in values):
                    return False
                needed.add(node.attr)
        self.attributes |= needed | flags
        self.flags |= flags
        return True

    # --- the result -----------------------------------------------------------------------------------------

    def _written(self, params: dict[str, str], body: Body) -> Written:
        flat: list[Line] = []
        for item in self.items:
            if isinstance(item, Line):
                flat.append(item)
            else:
                for arm, (_, lines) in enumerate(item.arms):
                    flat += [*lines, *item.copies[arm]]
        names = names_of(params, body.inputs, flat)
        found: list[ast.stmt] = []
        for item in self.items:
            found += [parsed(item, names)] if isinstance(item, Line) else self._branch(item, names)
        return Written(arguments(body), [ast.fix_missing_locations(line) for line in found])

    def _branch(self, branch: _Branch, names: Mapping[str, str]) -> list[ast.stmt]:
        if branch.test is None:
            raise _FailedError
        arms = []
        for arm, (_, lines) in enumerate(branch.arms):
            copies = [c for c in branch.copies[arm] if names[c.names[0]] != names.get(c.text, c.text)]
            arms.append([parsed(line, names) for line in (*lines, *copies)])
        yes, no = arms
        short = conditional(branch.test, yes, no)
        if short is not None:
            return [short]
        before: list[ast.stmt] = []
        if no and all(is_copy(line) for line in no) and not reads(yes, branch.test, no):
            before, no = no, []
        if not yes and no:
            return [*before, ast.If(opposite(branch.test), no, [])]
        if not yes:
            return before
        if isinstance(yes[-1], ast.Return):
            return [*before, ast.If(branch.test, yes, []), *no]
        return [*before, ast.If(branch.test, yes, no)]


def _token(line: Line) -> tuple[object, ...]:
    """What two statements of different bodies have in common if they are the same statement of the author's."""
    return line.statement[:1], line.target if not line.names else len(line.names), _abstract(line.text)


def _abstract(text: str) -> str:
    return VARIABLE.sub("_", text)
