"""The attributes of one emitted instance: its layers, parameters, buffers and settings, as constructor trees.

Reads one module of the recorded copy. Knows which Flax class holds what; does not compare instances.
"""

import functools
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from torchjax_bridge.recording import Parameter, layer_class
from torchjax_bridge.weights import Twin

from ._attributes import is_container, tied_bias
from ._body import Body
from ._calls import is_function
from ._constructors import Call, Code, Column, Handed, Items, Text, Tree
from ._functions import is_activation
from ._handed import LOCAL, argument_of
from ._layers import is_layer
from ._model import Model
from ._own_layers import OWN_NAMES
from ._parameters import parameter_place, place_of
from ._placed import RefusedError
from ._reserved import attribute_name
from ._starts import buffer_start, parameter_start

__all__ = ["Own", "fields_of", "local_modules", "sequential_items", "state_fields"]


class Own(Text):
    """A child that becomes a class of its own: replaced by the call of that class when it is known."""

    def __init__(self, path: str) -> None:
        super().__init__(path)


def fields_of(model: Model, body: Body, path: str) -> dict[str, Tree]:
    """The attributes of the class of a module.

    Args:
        model: The whole translation.
        body: The body of the module.
        path: Its path.
    """
    module = model.modules[path]
    fields: dict[str, Tree] = {}
    if body.base_call:
        fields["super()"] = _layer(model.base_twin(path, module), path)
    fields.update(state_fields(body))
    for name, child in module._modules.items():
        if child is not None and name not in model.dropped(path):
            tree = _child(model, _join(path, name), child)
            if tree is not None:
                fields[attribute_name(name)] = tree
    for name in sorted(model.dropped(path)):
        bias = model.parameters.get(f"{_join(path, name)}.bias")
        if bias is not None and "." not in name and bias.path not in model.tied_parameters:
            fields[tied_bias(name)] = parameter_start(model, "bias", bias, (0,))
    if not body.base_call:
        for name, origin in model.shared_by(path).items():
            fields[name] = parameter_start(model, name, origin, place_of(origin)[1])
        fields.update(_own_tensors(model, path, module))
    fields.update(model.ties_in(path))
    return fields


def local_modules(model: Model, made: Mapping[str, str]) -> dict[str, Tree]:
    """Those of the modules that a class makes for others that are no attribute of it."""
    trees = {
        f"{LOCAL}{text}": _child(model, owner, model.modules[owner], is_made=True)
        for owner, text in made.items()
        if not text.startswith("self.")
    }
    return {name: tree for name, tree in trees.items() if tree is not None}


def _own_tensors(model: Model, path: str, module: nn.Module) -> dict[str, Tree]:
    """The parameters and saved buffers of a module itself, under the names of the layer that it derives from."""
    fields: dict[str, Tree] = {}
    is_layer = layer_class(module) is not None
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        origin = None if tensor is None else Parameter(module, name, _join(path, name), tensor)
        if origin is None or not origin.is_saved or origin.path in model.tied_parameters:
            continue
        if is_layer and name == "num_batches_tracked":
            continue  # nnx counts no batches
        field, order = parameter_place(origin, is_layer)
        field = attribute_name(field)
        if origin.is_buffer:
            fields[field] = buffer_start(model, field, origin, order, is_statistic=is_layer)
        else:
            fields[field] = parameter_start(model, field, origin, order)
    return fields


def state_fields(body: Body) -> dict[str, Tree]:
    """The attributes of a class that are no layers: settings, dropouts of its own, random numbers, its mode."""
    fields: dict[str, Tree] = {name: Column([value], name, name) for name, value in body.attributes.items()}
    fields |= {attribute_name(name): Column([code], name, name) for name, code in body.callables.items()}
    for name, (rate, together) in body.dropouts.items():
        settings: dict[str, Tree] = {"broadcast_dims": Column([together], "broadcast_dims", name)}
        sizes: list[Tree] = [Column([rate], "rate", name)]
        fields[name] = Call("nnx.Dropout", sizes, settings, {"broadcast_dims": ()}, ("rngs=rngs",))
    if body.random:
        fields["rngs"] = Text("rngs.dropout.fork()")
    if body.asks_mode:
        fields["deterministic"] = Text("False")
    return fields


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _child(model: Model, path: str, module: nn.Module, *, is_made: bool = False) -> Tree | None:
    """The constructor of a child, or the argument that it is; None if it needs no attribute."""
    if not is_made and (owner := model.handed.is_handed(path)) is not None:
        return Column([Handed(owner)], argument_of(path), path.rpartition(".")[2])
    if path in model.parts:
        return model.parts[path].tree(path) if path in model.called_layers else None
    if is_layer(module):
        if path not in model.called_layers and path not in model.read_owners:
            return None
        return _layer(model.twin(path, module), path)
    if is_container(module, nn.Sequential):
        if path in model.own_sequentials:
            return Own(path)
        body = model.bodies.get(path)
        if body is None:
            return None if not _called_inside(model, path) else _list("nnx.List([", model, path, module, "])")
        return Items("nnx.Sequential(", sequential_items(model, path, module, body), ")", path)
    if isinstance(module, nn.ModuleList):
        return _list("nnx.List([", model, path, module, "])") if _called_inside(model, path) else None
    if is_container(module, nn.ModuleDict):
        children = module._modules.items()
        trees = {
            name: _child(model, _join(path, name), child) for name, child in children if child is not None
        }
        return _by_name({name: tree for name, tree in trees.items() if tree is not None})
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return _parameter_container(model, path, module)
    if path in model.bodies:
        return Own(path)
    if isinstance(module, nn.Embedding) and path in model.read_owners:
        return _layer(
            model.base_twin(path, module), path
        )  # whose table others share, and which nothing calls
    if path in model.read_owners or _called_inside(model, path):
        return _holder(model, path, module)
    return None


def _holder(model: Model, path: str, module: nn.Module) -> Tree | None:
    """A module that is not called itself, while its tensors are read or modules below it are called."""
    if model.to == "linen":
        raise RefusedError(
            f"'{path}' is not called, and the model uses what it holds, for which linen has no place; port to nnx"
        )
    trees = _own_tensors(model, path, module)
    for name, child in module._modules.items():
        if child is not None and name not in model.dropped(path):
            tree = _child(model, _join(path, name), child)
            if tree is not None:
                trees[attribute_name(name)] = tree
    return _by_name(trees)


def _parameter_container(model: Model, path: str, module: nn.ParameterList | nn.ParameterDict) -> Tree | None:
    tensors = _own_tensors(model, path, module)
    if isinstance(module, nn.ParameterList):
        return Items("nnx.List([", list(tensors.values()), "])") if tensors else None
    return _by_name(tensors)


def _by_name(trees: Mapping[str, Tree]) -> Tree | None:
    """Layers and tensors by name, without a class."""
    items: list[Tree] = [Items(f'"{name}": ', [tree], "") for name, tree in trees.items()]
    return Items("nnx.Dict({", items, "})") if items else None


def _called_inside(model: Model, path: str) -> bool:
    inside = path + "."
    return any(
        known.startswith(inside)
        for known in (*model.bodies, *model.called_layers, *model.read_owners, *model.handed.aliases)
    )


def _list(start: str, model: Model, path: str, module: nn.Module, end: str) -> Items:
    items: list[Tree] = []
    for name, child in module._modules.items():
        tree = None if child is None else _child(model, _join(path, name), child)
        items.append(Text("None") if tree is None else tree)
    while items and isinstance(items[-1], Text) and items[-1].text == "None":
        items.pop()
    return Items(start, items, end)


def sequential_items(model: Model, path: str, module: nn.Module, body: Body) -> list[Tree]:
    """What stands in the ``nnx.Sequential``: layers, and functions for modules without weights."""
    items: list[Tree] = []
    for name, child in module._modules.items():
        place = _join(path, name)
        code = (
            child is None or name in model.dropped(path) or (is_function(child) and place not in model.parts)
        )
        tree = None if code or child is None else _child(model, place, child)
        items.append(_function(body, name, child) if tree is None else tree)
    return items


def _function(body: Body, name: str, module: nn.Module | None) -> Tree:
    """A module without weights; one that needs the state of the class is code of its ``__call__``."""
    text = body.functions[name][0] if name in body.functions else "lambda x: x"
    if "self." in text:
        return Text("None")
    is_setting = module is not None and is_activation(module)  # other instances may have another
    return Column([Code(text)], "activation", name) if is_setting else Text(text)


def _layer(twin: Twin, path: str) -> Call:
    settings = {**twin.settings, **twin.initializers}
    if twin.own and twin.flax not in OWN_NAMES:
        raise RefusedError(
            f"'{path}' needs {twin.flax} of torchjax_bridge.weights.layers, which no port calls"
        )
    function = OWN_NAMES[twin.flax] if twin.own else f"nnx.{twin.flax}"
    defaults = _defaults(twin.flax, twin.own, twin.flavour)
    place = path.rpartition(".")[2]
    args: list[Tree] = []
    for name, value in twin.sizes.items():
        parts = value if isinstance(value, tuple) and isinstance(value[0], Twin) else (value,)
        args += [
            _layer(part, path) if isinstance(part, Twin) else Column([part], name, place) for part in parts
        ]
    kwargs: dict[str, Tree] = {name: Column([value], name, place) for name, value in settings.items()}
    ends = () if twin.flax in ("PReLU", "RNN", "Bidirectional", "Sequential") else ("rngs=rngs",)
    return Call(function, args, kwargs, defaults, ends)


@functools.lru_cache(maxsize=64)
def _defaults(name: str, own: bool, flavour: str) -> dict[str, Any]:
    own_layers = import_module("torchjax_bridge.weights.layers")
    holder = getattr(own_layers, flavour) if own else import_module(f"flax.{flavour}")
    parameters = inspect.signature(getattr(holder, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
