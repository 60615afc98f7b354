"""Source as the usual formatters lay it out: double quotes, no line longer than the limit.

A statement becomes text with places where a line may end; all those of one bracket end lines together.
"""

import ast
import math
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import TypeAlias

from ._printer import (
    END,
    SPACE,
    Break,
    Group,
    Indent,
    Text,
    bracketed,
    flat,
    in_optional_brackets,
    joined,
    printed,
)

__all__ = ["formatted"]

# Those that bind strongest first; comparisons have no sign here, and a conditional is weaker than all.
_STRENGTHS = ("**", "~", "* / // % @", "+ -", "<< >>", "&", "^", "|", "", "and or")
_WEIGHTS = {sign: place for place, signs in enumerate(_STRENGTHS, 1) for sign in signs.split()}
_NOTHING, _DOT, _COMPARISON, _CONDITION = -1, 0, 9, 11

_Chain: TypeAlias = ast.Attribute | ast.Call | ast.Subscript
_Operation: TypeAlias = ast.BinOp | ast.BoolOp | ast.Compare
_Comprehension: TypeAlias = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_Collection: TypeAlias = ast.Tuple | ast.List | ast.Set | ast.Dict
_ENDS = {ast.Tuple: "()", ast.GeneratorExp: "()", ast.List: "[]", ast.ListComp: "[]"}  # others have {}


def formatted(lines: list[str], limit: int) -> list[str]:
    """Lines of code, each a whole statement or the head of one, within a limit of characters.

    Args:
        lines: As ``ast.unparse`` gives them: one line each, with their indentation.
        limit: The most characters that a line should have; one without brackets may be longer.
    """
    return [one for line in lines for one in _statement(line, limit)]


def _statement(line: str, limit: int) -> list[str]:
    text = line.lstrip()
    source = text.removeprefix("el") if text.startswith("elif ") else text
    try:
        node = ast.parse(source + (" pass" if text.endswith(":") else "")).body[0]
    except (SyntaxError, IndexError):  # an else, a decorator, an empty line
        return [line.rstrip()]
    start = line[: len(line) - len(source)]
    return _Statement(source.encode(), limit, len(line) - len(text)).lines(start, node) or [line]


@dataclass(frozen=True)
class _Statement:
    source: bytes
    limit: int
    indent: int

    def lines(self, start: str, node: ast.stmt) -> list[str] | None:
        """The lines of a statement after what its line starts with; ``None`` for one to be left as it is."""
        match node:
            case ast.Assign(targets=[*others, target], value=value):
                start += "".join(f"{flat(self._target(other))} = " for other in others)
                return self._assigned([start, self._target(target), " = "], value)
            case ast.AugAssign(target=target, value=value):
                return self._assigned([start, self._text(target), f" {self._sign(target, value)} "], value)
            case ast.AnnAssign(target=target, annotation=kind, value=ast.expr() as value):
                head = f"{start}{flat(self._text(target))}: {flat(self._text(kind))} = "
                return self._assigned(head, value)
            case ast.Return(value=ast.expr() as value):
                return self._valued(f"{start}return ", value)
            case ast.Expr(value=ast.Call() as value) | ast.Raise(exc=ast.Call() as value, cause=None):
                start += "raise " if isinstance(node, ast.Raise) else ""
                own = self._needs(value) != "brackets"
                return (
                    self._in_lines([start, self._text(value, False)]) if own else self._valued(start, value)
                )
            case ast.If(test=test):
                return self._valued(f"{start}if ", test, ":")
            case ast.For(target=target, iter=value):
                return self._valued(f"{start}for {flat(self._target(target))} in ", value, ":")
            case ast.FunctionDef(args=ast.arguments(posonlyargs=[])):
                return self._defined(start, node)
        return None

    def _in_lines(self, text: Text, expand: bool = False) -> list[str]:
        return printed(text, self.limit, self.indent, expand).split("\n")

    def _fit(self, lines: list[str]) -> bool:
        return max(map(len, lines)) <= self.limit

    def _assigned(self, target: Text, value: ast.expr) -> list[str]:
        if len(flat(target)) < self.limit:
            return self._valued(flat(target), value)
        *lines, last = self._in_lines(target)
        return [*lines, *self._valued(last, value)]

    def _valued(self, head: str, value: ast.expr, tail: str = "") -> list[str]:
        """A statement that ends in a value, which gets brackets of its own where it needs them."""
        bare: list[Text] = [head, self._text(value, False), tail]
        wrapped: list[Text] = [head, "(", Indent([END, self._text(value)]), END, ")", tail]
        needs = self._needs(value)
        if needs == "nothing" or self._fit([flat(bare)]):
            return self._in_lines(bare)
        if needs == "brackets" and not self._may_stay_bare(value):
            return self._in_lines(wrapped)
        if self._fit(self._in_lines(bare, expand=True)):
            return self._in_lines(bare)
        helps = needs == "brackets" or self._fit(self._in_lines(wrapped, expand=True))
        return self._in_lines(wrapped if helps else bare)

    def _text(self, node: ast.expr, inside: bool = True) -> Text:
        """An expression; where not ``inside`` of brackets, lines may end only in its own."""
        match node:
            case ast.BinOp() | ast.BoolOp() | ast.Compare():
                return self._operation(node, inside)
            case ast.IfExp():
                parts = self._conditional(node, inside)
                return Group(parts) if inside else parts
            case ast.Attribute() | ast.Call() | ast.Subscript():
                fluent = inside and self._dots(node) > 1
                return Group(self._chain(node, inside, True)) if fluent else self._chain(node, inside)
            case ast.UnaryOp(operand=operand):
                sign = self.source[node.col_offset : operand.col_offset].decode().rstrip("(")
                tight = sign != "not " and isinstance(operand, ast.BinOp) and isinstance(operand.op, ast.Pow)
                return [sign, bracketed("()", self._text(operand)) if tight else self._part(operand, inside)]
            case ast.Lambda():
                return self._lambda(node, inside)
            case ast.Starred(value=value):
                return ["*", self._part(value, inside)]
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                return bracketed(_ENDS.get(type(node), "{}"), Group(self._comprehension(node)))
            case ast.Tuple() | ast.List() | ast.Set() | ast.Dict():
                return bracketed(_ENDS.get(type(node), "{}"), self._items(node))
            case ast.Slice():
                return self._slice(node)
        return _atom(node)

    def _target(self, node: ast.expr) -> Text:
        """What is assigned to; names with commas between them get brackets if they are in lines."""
        if isinstance(node, ast.Tuple) and len(node.elts) > 1:
            return in_optional_brackets(self._items(node))
        return self._text(node)

    def _defined(self, start: str, node: ast.FunctionDef) -> list[str]:
        found = node.args
        defaults = [*[None] * (len(found.args) - len(found.defaults)), *found.defaults, *found.kw_defaults]
        texts = list(map(self._parameter, [*found.args, *found.kwonlyargs], defaults))
        if found.vararg or found.kwonlyargs:
            texts.insert(len(found.args), ["*", self._parameter(found.vararg) if found.vararg else ""])
        texts += [["**", self._parameter(found.kwarg)]] if found.kwarg else []
        items = joined(texts, least=1)
        ends: Text = ["(", Indent([END, Group(items) if texts[1:] else items]), END, ")"] if texts else "()"
        returned = [" -> ", self._text(node.returns, False)] if node.returns else ""
        whole: list[Text] = [f"{start}def {node.name}", ends, returned, ":"]
        return [flat(whole)] if self._fit([flat(whole)]) else self._in_lines(whole)

    def _parameter(self, node: ast.arg, default: ast.expr | None = None) -> Text:
        kind = [": ", self._text(node.annotation)] if node.annotation else ""
        return [node.arg, kind, [" = " if kind else "=", self._text(default)] if default else ""]

    def _in_brackets(self, node: ast.expr) -> bool:
        before, after = self.source[: node.col_offset], self.source[node.end_col_offset :]
        return before.endswith(b"(") and after.startswith(b")")

    def _part(self, node: ast.expr, inside: bool = True) -> Text:
        return bracketed("()", self._text(node)) if self._in_brackets(node) else self._text(node, inside)

    def _operation(self, node: _Operation, inside: bool) -> Text:
        found: list[Text] = []
        before: ast.expr = node
        for sign, value in self._operands(node):
            tight = sign == "**" and self._is_short(before) and self._is_short(value)
            if sign:
                space = "" if tight else " "
                found += [Break(space) if inside else space, sign + space]
            found.append(self._part(value, inside))
            before = value
        return Group(found) if inside else found

    def _sign(self, left: ast.expr, right: ast.expr) -> str:
        return self.source[left.end_col_offset : right.col_offset].decode().strip(" ()")

    def _weights(self, node: ast.expr) -> list[int]:
        """How weakly each operator of an expression binds."""
        if isinstance(node, _Operation):
            signs = [self._sign(*pair) for pair in pairwise(_children(node))]
            return [_WEIGHTS.get(sign, _COMPARISON) for sign in signs]
        if isinstance(node, ast.Attribute):
            ends = isinstance(node.value, ast.Call | ast.Subscript | _Collection | _Comprehension)
            return [_DOT] if ends or self._in_brackets(node.value) else []
        if isinstance(node, ast.IfExp):
            return [_CONDITION, _CONDITION]
        return [_WEIGHTS["~"]] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert) else []

    def _operands(self, node: _Operation) -> list[tuple[str, ast.expr]]:
        """Each operand with the sign before it; those of a part that binds as weakly are operands too."""
        values = _children(node)
        signs = ["", *(self._sign(*pair) for pair in pairwise(values))]
        found: list[tuple[str, ast.expr]] = []
        for sign, value in zip(signs, values, strict=True):
            inner = [("", value)]
            if isinstance(value, _Operation) and not self._in_brackets(value):
                inner = self._operands(value) if self._weights(value)[0] == self._weights(node)[0] else inner
            found += [(sign, inner[0][1]), *inner[1:]]
        return found

    def _is_short(self, node: ast.expr) -> bool:
        """Whether a power is written with no spaces around its sign if its operands are as this one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return _is_simple(node) and not self._in_brackets(node)

    def _conditional(self, node: ast.IfExp, inside: bool) -> list[Text]:
        space = SPACE if inside else " "
        found = [self._part(node.body, inside), space, "if ", self._part(node.test, inside), space, "else "]
        if isinstance(node.orelse, ast.IfExp) and not self._in_brackets(node.orelse):
            return [*found, *self._conditional(node.orelse, inside)]
        return [*found, self._part(node.orelse, inside)]

    def _lambda(self, node: ast.Lambda, inside: bool) -> Text:
        body = self._part(node.body, inside)
        if self._needs(node.body) == "brackets":
            body = in_optional_brackets(self._part(node.body))
        return [f"lambda {ast.unparse(node.args)}".rstrip(), ": ", body]

    def _chain(self, node: _Chain, inside: bool, fluent: bool = False) -> Text:
        """Calls, attributes and items of each other; if ``fluent``, lines end before what follows a call."""
        (value,) = _children(node)
        in_brackets = self._in_brackets(value)
        if isinstance(value, _Chain) and not in_brackets:
            begin = self._chain(value, inside, fluent)
        else:
            begin = self._part(value, inside)
        if isinstance(node, ast.Call):
            return [begin, bracketed("()", self._arguments(node))]
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) > 1:
                return [begin, bracketed("[]", Group(self._items(node.slice)))]
            return [begin, bracketed("[]", self._text(node.slice))]
        ends = fluent and (isinstance(value, ast.Call | ast.Subscript) or in_brackets)
        return [begin, END if ends else "", f".{node.attr}"]

    def _dots(self, node: ast.expr) -> int:
        """How many attributes of a chain are those of a call, of an item, or of what is in brackets."""
        found, in_brackets = 0, False
        while isinstance(node, _Chain) and not in_brackets:
            (value,) = _children(node)
            in_brackets = self._in_brackets(value)
            if isinstance(node, ast.Attribute):
                found += in_brackets or isinstance(value, ast.Call | ast.Subscript)
            node = value
        return found

    def _arguments(self, node: ast.Call) -> Text:
        if not node.keywords and len(node.args) == 1:
            only = node.args[0]
            return Group(
                self._comprehension(only) if isinstance(only, ast.GeneratorExp) else self._text(only)
            )
        texts = [self._part(one) for one in node.args]
        texts += [[f"{one.arg}=" if one.arg else "**", self._part(one.value)] for one in node.keywords]
        return Group(joined(texts)) if texts else ""

    def _items(self, node: _Collection) -> Text:
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return joined([[*([self._part(a), ": "] if a else ["**"]), self._part(b)] for a, b in pairs])
        texts = [self._part(one) for one in node.elts]
        return [*texts, ","] if isinstance(node, ast.Tuple) and len(texts) == 1 else joined(texts)

    def _comprehension(self, node: _Comprehension) -> Text:
        of = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        found: list[Text] = [Group([self._part(of[0]), *([": ", self._part(of[1])] if of[1:] else [])])]
        for loop in node.generators:
            found += [SPACE, "for ", self._target(loop.target), " in ", self._part(loop.iter)]
            found += [part for test in loop.ifs for part in (SPACE, "if ", self._part(test))]
        return found

    def _slice(self, node: ast.Slice) -> Text:
        parts = [node.lower, node.upper, *([node.step] if node.step else [])]
        gap = "" if all(part is None or _is_simple(part) for part in parts) else " "
        found: list[Text] = [self._part(node.lower) if node.lower else ""]
        for before, part in pairwise(parts):
            found += [gap if before else "", ":", [gap, self._part(part)] if part else ""]
        return found

    def _needs(self, node: ast.expr) -> str:
        """What lets a value end lines: "brackets", "nothing", or "fit" where only brackets that help do."""
        if isinstance(node, ast.UnaryOp):
            return "nothing" if self._in_brackets(node.operand) else "brackets"
        if isinstance(node, _Chain) and self._dots(node) < 2:
            (value,) = _children(node)
            return "nothing" if self._in_brackets(value) else self._needs(value)
        if isinstance(node, _Operation | ast.IfExp | ast.Lambda | _Chain):
            return "brackets"
        return "nothing" if isinstance(node, _Collection | _Comprehension) else "fit"

    def _may_stay_bare(self, node: ast.expr) -> bool:
        """Whether a value may end its lines in the brackets that it has at its begin or at its end."""
        outer = self._outer(node)
        weights = [weight for one in outer if one for weight in self._weights(one)]
        weakest = max(weights, default=_NOTHING)
        own = (ast.Call, ast.Subscript, _Collection, _Comprehension)
        if weights.count(weakest) > 1 or not any(one is None or isinstance(one, own) for one in outer):
            return False
        return weakest <= _DOT or self._is_filled(node, 0) or self._is_filled(node, -1)

    def _outer(self, node: ast.expr) -> list[ast.expr | None]:
        """An expression and the parts of it that are outside of all brackets; ``None`` for one in brackets."""
        found: list[ast.expr | None] = [node]
        for child in _children(node):
            found += [None] if self._in_brackets(child) else self._outer(child)
        return found

    def _is_filled(self, node: ast.expr, side: int) -> bool:
        """Whether an expression begins (0) or ends (-1) with a bracket around something, but an item's."""
        while (side == 0 or not isinstance(node, _Chain)) and (children := _children(node)):
            if side == 0 and isinstance(node, ast.UnaryOp | ast.Lambda | ast.Starred):
                return False
            node = children[side]
            if self._in_brackets(node):
                return True
        match node:
            case ast.Call(args=args, keywords=keywords):
                return bool(args or keywords)
            case ast.Dict(values=items) | ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                return bool(items)
        return isinstance(node, _Comprehension)


def _children(node: ast.expr) -> list[ast.expr]:
    """The parts of an expression that are outside of its own brackets."""
    match node:
        case ast.BinOp(left=left, right=right):
            return [left, right]
        case ast.BoolOp(values=values):
            return values
        case ast.Compare(left=left, comparators=others):
            return [left, *others]
        case ast.IfExp(body=body, test=test, orelse=other):
            return [body, test, other]
        case ast.UnaryOp(operand=value) | ast.Lambda(body=value) | ast.Starred(value=value):
            return [value]
        case ast.Call(func=value) | ast.Attribute(value=value) | ast.Subscript(value=value):
            return [value]
    return []


def _is_simple(node: ast.expr) -> bool:
    while isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
        node = node.operand
    return isinstance(node, ast.Name | ast.Constant)


def _atom(node: ast.expr) -> str:
    """A name or a literal; double quotes, where that changes nothing else."""
    text = ast.unparse(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, complex):
        return text.replace("e+", "e")
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return _float_text(node.value, text)
    prefix, quote, rest = text.partition("'")
    plain = isinstance(node, ast.Constant | ast.JoinedStr) and prefix in ("", "b", "f") and '"' not in text
    return f'{prefix}"{rest[:-1]}"' if plain and quote else text


def _float_text(value: float, text: str) -> str:
    """A number as a person writes it: ``1e9`` and ``1e-5``, but ``0.001`` and ``10000.0``.

    Args:
        value: The number.
        text: As Python writes it.
    """
    if not math.isfinite(value):
        return text
    mantissa, _, power = f"{Decimal(repr(value)).normalize():e}".partition("e")
    short = f"{mantissa}e{int(power)}" if power else text
    return short if "e" in text or len(short) + 4 < len(text) else text
