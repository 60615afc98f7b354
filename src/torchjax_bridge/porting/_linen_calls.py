"""Bodies in linen's form: each call of a layer with a mode is told whether the model trains.

Works on syntax trees, before runs of equal lines become loops. Owns which modules have a mode.
"""

import ast
from collections.abc import Iterator, Sequence

from flax import linen
from torch import nn

from torchjax_bridge.recording import Fault, SourceLine

from ._argument_trees import takes
from ._attributes import is_container
from ._body import Body
from ._layers import is_layer
from ._model import Model
from ._reserved import attribute_name

__all__ = ["LINEN_NAMES", "MODE", "Modes"]

MODE = "train"  # the argument that says whether the model trains
# What every linen module has already, so that no attribute can be called so.
LINEN_NAMES = frozenset({*dir(linen.Module), "name", "parent", "scope"})
_Step = str | int
_NNX_ADVICE = "call model.eval()"
_LINEN_ADVICE = f"leave {MODE}=False"


class Modes:
    """Which modules of a model do something else in training, and what their calls are told.

    Args:
        model: The translation.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: set[object] = set()
        while True:
            found = {self._place(path) for path in model.bodies if self.has_mode(path)}
            if found <= self._known:
                break
            self._known |= found

    def has_mode(self, path: str) -> bool:
        """Whether a call of the module says whether the model trains. All instances of a class agree."""
        model, module = self.model, self.model.modules[path]
        if self._is_called_layer(path):
            return path in model.called_layers and self.keyword(path) is not None
        if self._place(path) in self._known:
            return True
        body = model.bodies.get(path)
        if body is not None and (body.asks_mode or body.dropouts or self._base_keyword(path, body)):
            return True
        inside = (f"{path}.{name}" if path else name for name, child in module._modules.items() if child)
        return any(map(self.has_mode, inside))

    def _is_called_layer(self, path: str) -> bool:
        return self.model.is_layer(path) and path not in self.model.bodies

    def _place(self, path: str) -> object:
        """What instances that must agree have in common: the class; of a Sequential, the place in its class."""
        model, kind = self.model, type(self.model.modules[path])
        if not is_container(model.modules[path], nn.Sequential) or path in model.own_sequentials:
            return kind, kind is nn.Sequential
        above = path.rpartition(".")[0]
        while is_container(model.modules[above], nn.Sequential) and above in model.bodies and above:
            above = above.rpartition(".")[0]
        return type(model.modules[above]), path[len(above) :]

    def keyword(self, path: str) -> str | None:
        """The argument that tells a layer, or a module of a class of its own, whether the model trains."""
        module = self.model.modules[path]
        if not self._is_called_layer(path):
            return MODE if self.has_mode(path) else None
        if path in self.model.parts:
            return MODE if self.model.parts[path].takes(MODE) else None
        twin = self.model.twin(path, module)
        if twin.flax == "BatchNorm":
            told = "use_running_average" in self.model.call_settings(path, module)
            return None if told else "use_running_average"
        drops = twin.flax == "Dropout" or twin.settings.get("dropout_rate")
        return "deterministic" if drops else None

    def _base_keyword(self, path: str, body: Body) -> str | None:
        """The same for the layer that a class derives from."""
        if body.base_call:
            twin = self.model.base_twin(path, self.model.modules[path])
            return "use_running_average" if twin.flax == "BatchNorm" else None
        return None

    def told(self, path: str, lines: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements of a module's body in linen's form.

        Args:
            path: The module.
            lines: The statements, which are changed.
        """
        kind = type(self.model.modules[path])
        alike = [path, *(other for other in self.model.bodies if type(self.model.modules[other]) is kind)]
        body = self.model.bodies[path]
        names = {node.id for line in lines for node in ast.walk(line) if isinstance(node, ast.Name)}
        if self.has_mode(path) and MODE in {*names, *(name for name, tree in body.inputs if takes(tree))}:
            reason = f"a variable is called {MODE}, as linen's mode is; give it another name, or port to nnx"
            self.model.fault(Fault(reason, path, SourceLine()))
        change = _Told(self, list(dict.fromkeys(alike)))
        return [ast.fix_missing_locations(change.visit(line)) for line in lines]


class _Told(ast.NodeTransformer):
    """Changes the statements of one body.

    Args:
        modes: Of the model.
        paths: The module, and the others of its class, which may have layers that it lacks.
    """

    def __init__(self, modes: Modes, paths: Sequence[str]) -> None:
        self.modes = modes
        self.model = modes.model
        self.paths = paths

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) == "self.deterministic":
            return ast.UnaryOp(ast.Not(), ast.Name(MODE, ast.Load()))
        self.generic_visit(node)
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.UnaryOp(op=ast.Not(), operand=ast.UnaryOp(op=ast.Not(), operand=inner)):
                return inner
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            node.value = node.value.replace(_NNX_ADVICE, _LINEN_ADVICE)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """``self.scale[...]`` as ``self.scale``, items of lists alike, a buffer as ``self.buffer.value``."""
        self.generic_visit(node)
        match node:
            case ast.Subscript(value=ast.Attribute(value=owner, attr=name), slice=ast.Constant(value=item)):
                if item is ... and (steps := _steps(owner)) is not None:
                    return self._tensor(node.value, name, steps)
            case ast.Subscript(value=ast.Subscript() as parameter, slice=ast.Constant(value=item)):
                if item is ... and _steps(parameter) is not None:
                    return parameter
        return node

    def _tensor(self, read: ast.expr, name: str, steps: Sequence[_Step]) -> ast.AST:
        for path in self._modules(steps):
            module = self.model.modules[path]
            if steps and is_layer(module) and not isinstance(module, nn.Embedding):
                reason = (
                    f"other code reads the {name} of '{path}', which linen keeps in its layer; port to nnx"
                )
                self.model.fault(Fault(reason, self.paths[0], SourceLine()))
            is_statistic = name in ("mean", "var") and "running_mean" in module._buffers
            is_buffer = name in map(attribute_name, module._buffers) or is_statistic
            return ast.Attribute(read, "value", ast.Load()) if is_buffer else read
        return read

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called == "self.rngs":
            return ast.parse('self.make_rng("dropout")', mode="eval").body
        if called == "super().__call__":
            node.func = ast.parse("self.base", mode="eval").body
            keyword = self.modes._base_keyword(self.paths[0], self.model.bodies[self.paths[0]])
        else:
            steps = _steps(node.func)
            keyword = None if steps is None else self._keyword(steps)
        if keyword and keyword not in [given.arg for given in node.keywords]:
            mode = ast.parse(MODE if keyword == MODE else f"not {MODE}", mode="eval").body
            node.keywords.append(ast.keyword(keyword, mode))
        return node

    def _keyword(self, steps: Sequence[_Step]) -> str | None:
        if not steps:
            return None
        for path in self._modules(steps):
            return self.modes.keyword(path)
        names = {name for path in self.paths for name in self.model.bodies[path].dropouts}
        return "deterministic" if len(steps) == 1 and steps[0] in names else None

    def _modules(self, steps: Sequence[_Step]) -> Iterator[str]:
        """The modules at a place of each instance."""
        for path in self.paths:
            found: str | None = path
            for step in steps:
                found = None if found is None else self._child(found, step)
            if found is not None:
                yield found

    def _child(self, path: str, step: _Step) -> str | None:
        module = self.model.modules[path]
        names = list(module._modules)
        if step == "layers" and is_container(module, nn.Sequential) and "layers" not in names:
            return path
        if isinstance(step, int):
            name = names[step] if 0 <= step < len(names) else None
        else:
            name = next((name for name in names if step in (name, attribute_name(name))), None)
        if name is None or module._modules[name] is None:
            return None
        return f"{path}.{name}" if path else name


def _steps(node: ast.expr) -> list[_Step] | None:
    """The attributes and items that lead from ``self`` to an expression; None if it is something else."""
    match node:
        case ast.Name(id="self"):
            return []
        case ast.Attribute(value=inner, attr=name):
            above = _steps(inner)
            return None if above is None else [*above, name]
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() | int() as item)):
            above = _steps(inner)
            return None if above is None else [*above, item]
    return None
