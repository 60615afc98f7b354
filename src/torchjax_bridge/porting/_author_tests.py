"""Conditions of the author's, as the port asks them, and the statements under them.

Works on syntax trees.
"""

import ast
from collections.abc import Collection, Sequence

__all__ = ["asked", "conditional", "in_mode", "is_copy", "opposite", "reads"]

_LONGEST_CONDITIONAL = 90  # characters


def in_mode(test: ast.expr, training: bool) -> ast.expr:
    """A condition without ``self.training``, which is known."""

    class Change(ast.NodeTransformer):
        def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
            return ast.Constant(training) if ast.unparse(node) == "self.training" else node

        def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
            self.generic_visit(node)
            neutral = isinstance(node.op, ast.And)
            kept = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value is neutral)]
            return ast.BoolOp(node.op, kept) if len(kept) > 1 else (kept or node.values)[0]

    return Change().visit(ast.parse(ast.unparse(test), mode="eval").body)


def opposite(test: ast.expr) -> ast.expr:
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Compare(left=left, ops=[ast.IsNot()], comparators=others):
            return ast.Compare(left, [ast.Is()], others)
        case ast.Compare(left=left, ops=[ast.Is()], comparators=others):
            return ast.Compare(left, [ast.IsNot()], others)
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=others):
            return ast.Compare(left, [ast.NotEq()], others)
        case ast.Compare(left=left, ops=[ast.NotEq()], comparators=others):
            return ast.Compare(left, [ast.Eq()], others)
    return ast.UnaryOp(ast.Not(), test)


def asked(test: ast.expr, flags: Collection[str]) -> ast.expr:
    """A condition as the port asks it: ``hasattr(self, "layer")`` is whether the layer is there.

    Args:
        test: The author's condition.
        flags: Modules that the port has as code alone: its attributes of these names say whether there is one.
    """

    class Change(ast.NodeTransformer):
        def visit_Compare(self, node: ast.Compare) -> ast.AST:
            match node:
                case ast.Compare(
                    left=ast.Attribute(attr=name) as flag,
                    ops=[ast.Is() | ast.IsNot() as op],
                    comparators=[ast.Constant(value=None)],
                ) if name in flags:
                    return flag if isinstance(op, ast.IsNot) else ast.UnaryOp(ast.Not(), flag)
            return node

        def visit_Call(self, node: ast.Call) -> ast.AST:
            match node:
                case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value=str(name))]):
                    return ast.parse(f"self.{name} is not None", mode="eval").body
            return node

    changed = Change().visit(ast.parse(ast.unparse(test), mode="eval").body)
    if isinstance(changed, ast.UnaryOp) and isinstance(changed.op, ast.Not):
        return opposite(changed.operand)
    return changed


def conditional(test: ast.expr, yes: Sequence[ast.stmt], no: Sequence[ast.stmt]) -> ast.stmt | None:
    """``x = a if test else b``, or a ``return`` of it, if that is all that two arms do."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, yes, no = test.operand, no, yes
    match yes, no:
        case (
            [ast.Assign(targets=[ast.Name(id=one)], value=a)],
            [ast.Assign(targets=[ast.Name(id=other)], value=b)],
        ):
            text = f"{one} = {ast.unparse(ast.IfExp(test, a, b))}" if one == other else ""
        case ([ast.Return(value=ast.expr() as a)], [ast.Return(value=ast.expr() as b)]):
            text = f"return {ast.unparse(ast.IfExp(test, a, b))}"
        case _:
            return None
    return ast.parse(text).body[0] if text and len(text) <= _LONGEST_CONDITIONAL else None


def is_copy(line: ast.stmt) -> bool:
    return isinstance(line, ast.Assign) and isinstance(line.value, ast.Name)


def reads(lines: Sequence[ast.stmt], test: ast.expr, copies: Sequence[ast.stmt]) -> bool:
    """Whether an arm reads what the copies would overwrite."""
    read = {
        node.id
        for tree in (*lines, test)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return any(copy.targets[0].id in read for copy in copies)  # type: ignore[attr-defined]
