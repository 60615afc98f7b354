"""What `to_flax` must be told of a port: flattened maps, names that differ, weights that stay in torch."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn

from torchjax_bridge.recording import Parameter, has_hooks, layer_class
from torchjax_bridge.weights import TWIN_RULES, Flatten, Keep, LayerType, Rename, Rule

from ._attributes import is_container, tied_bias
from ._model import Model
from ._parameters import place_of
from ._reserved import attribute_name

__all__ = ["UserRule", "rules_of"]

UserRule: TypeAlias = Flatten | Keep | LayerType | Rename | Rule

# Layers of features that never read a map in Flax's order, unless it is noted.
_READ_IN_TORCH_ORDER = (
    nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.BatchNorm1d, nn.GroupNorm, nn.PReLU,
)  # fmt: skip


def rules_of(model: Model) -> tuple[UserRule, ...]:
    """The rules of a port, deepest paths first."""
    flattened = {_first_path(model, path): shape for path, shape in model.flattened.items()}
    rules: list[UserRule] = [Flatten(path, shape) for path, shape in flattened.items()]
    layers = {_first_path(model, path) for path in model.called_layers - {*model.parts}}
    called = {path: model.modules[path] for path in sorted(layers)}
    readers = [path for path, module in called.items() if isinstance(module, _READ_IN_TORCH_ORDER)]
    rules += (Flatten(path, None) for path in readers if path not in flattened)
    used = {_first_path(model, path) for path in model.called_layers | model.read_owners | set(model.bodies)}
    if model.to == "linen":  # whose layers have weights only if they are called
        dead = tuple(f"{path}." for path in model.uncalled)
        used -= {path for path in used - model.read_owners if f"{path}.".startswith(dead)}
    # A Linear keeps torch's order of outputs: the port moves the axes of a map that is made of them.
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules.values()):
        rules += (
            Flatten(path, None, output=True)
            for path in sorted(used - {*model.parts})
            if isinstance(model.modules[path], nn.Linear)
        )
    places = []
    for path, module in model.modules.items():
        if any(model.is_layer(above) for above in _above(path)):
            continue  # it goes where the layer goes
        is_part = path in model.parts
        own = _holds_weights(module, deep=is_part)
        holds = any(other.startswith(f"{path}.") for other in used)  # it is not called, what it holds is
        if own and path not in used and path not in model.tied_layers and not holds:
            rules.append(Keep(path))
            continue
        base = layer_class(module)
        if own and not is_part and base is not None and _has_own_class(model, path, module):
            rules.append(LayerType(path, base))
        if path and (own or model.is_layer(path)):
            places.append(path)
    rules += _rules_of_parts(model)
    if model.to == "linen" and any(
        isinstance(one, nn.modules.conv._ConvTransposeNd) for one in called.values()
    ):
        rules += TWIN_RULES
    return (*rules, *_renamed_tensors(model), *_renames(model, places))


def _renamed_tensors(model: Model) -> Iterator[Rename]:
    """The other names of single tensors: reserved ones, and the bias of a layer whose weight is another layer's."""
    for path, parameter in model.read_parameters.items():
        holder, _, name = path.rpartition(".")
        holder = _first_path(model, holder)
        held = attribute_name(name)
        is_listed = isinstance(parameter.owner, nn.ParameterList | nn.ParameterDict)
        if held != name and layer_class(parameter.owner) is None and not is_listed:
            renamed = ".".join(filter(None, (holder, name)))
            yield Rename(renamed, ".".join(filter(None, (_flax_path(model, holder), held))))
    embeddings = {path for path, _ in model.shared}
    for path in sorted(model.tied_layers):
        bias = f"{path}.bias"
        if bias in model.parameters and bias not in model.tied_parameters and path not in embeddings:
            holder, _, name = path.rpartition(".")
            yield Rename(bias, ".".join(filter(None, (_flax_path(model, holder), tied_bias(name)))))
    yield from _first_places(model)


def _first_places(model: Model) -> Iterator[Rename]:
    """Where nnx finds a shared variable first, if that is not the place of its owner: names are in their order."""
    places: dict[str, list[str]] = {}
    for (path, name), owner in model.shared.items():
        places.setdefault(owner, []).append(".".join(filter(None, (_flax_path(model, path), name))))
    for owner, others in places.items():
        held, _ = place_of(model.parameters[owner])
        own = ".".join(filter(None, (_flax_path(model, owner.rpartition(".")[0]), held)))
        first = min((own, *others), key=_in_order)
        if first.rpartition(".")[2] != held and first not in model.parameters:
            yield Rename(owner, first)


def _in_order(path: str) -> list[tuple[int, int, str]]:
    """The key by which nnx sorts: attributes by name, items of a list by number."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


def _renames(model: Model, places: Sequence[str]) -> list[Rename]:
    """The other names of layers, deepest first; in a Sequential beside one or a tied layer, all are said."""
    renamed = {path for path in places if any(_is_renamed(model, at) for at in (*_above(path), path))}
    tied = model.tied_layers  # of which a Sequential has no leaf to be known by
    holders = {above for path in renamed for above in _outermost(model, _above(path))}
    holders |= {above for path in tied for above in _outermost(model, ["", *_above(path)])}
    beside = tuple(f"{above}." if above else "" for above in holders)
    lacking = tied - {path for path, _ in model.shared}
    named = [path for path in places if path in renamed or (path.startswith(beside) and path not in lacking)]
    return [
        Rename(path, _flax_path(model, path)) for path in sorted(named, key=lambda path: -path.count("."))
    ]


def _first_path(model: Model, path: str) -> str:
    """The path of a module; through one that several classes hold, that under which nnx finds it first."""
    first = ""
    for part in path.split(".") if path else ():
        first = f"{first}.{part}" if first else part
        if first in model.handed.owners:
            places = [one.rpartition(".") for one in model.handed.places(first)]
            found = [f"{_first_path(model, holder)}{dot}{name}" for holder, dot, name in places]
            first = min(found, key=lambda one: _in_order(_flax_path(model, one)))
    return first


def _outermost(model: Model, paths: Sequence[str]) -> list[str]:
    """The first of these modules that is a Sequential, if any."""
    return [path for path in paths if is_container(model.modules[path], nn.Sequential)][:1]


def _rules_of_parts(model: Model) -> list[Rule | LayerType]:
    """The rules of the parts that the model calls, each once."""
    called = {path: part for path, part in model.parts.items() if path in model.called_layers}
    found = [rule for path, part in called.items() for rule in part.rules_at(path)]
    return [rule for place, rule in enumerate(found) if not any(rule is other for other in found[:place])]


def _holds_weights(module: nn.Module, *, deep: bool) -> bool:
    """Whether a ``state_dict`` has a tensor of a module itself, or of one below it."""
    return any(
        Parameter(owner, name, name, tensor).is_saved
        for owner in (module.modules() if deep else (module,))
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    )


def _above(path: str) -> list[str]:
    """The paths of the modules that hold a module, without the root."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _is_renamed(model: Model, path: str) -> bool:
    """Whether a module has another name in the port than `to_flax` expects: a Sequential numbers its items."""
    above, _, name = path.rpartition(".")
    holder = model.modules[above]
    if is_container(holder, nn.Sequential):
        return name != str(list(holder._modules).index(name))
    numbered = isinstance(holder, nn.ModuleList) or is_container(holder, nn.ModuleDict)
    return not numbered and attribute_name(name) != name


def _has_own_class(model: Model, path: str, module: nn.Module) -> bool:
    """Whether `to_flax` does not know the class of a torch layer in the file, or what becomes of its hooks."""
    return not model.is_layer(path) or has_hooks(module) or model.twin(path, module).own


def _flax_path(model: Model, path: str) -> str:
    """Where a module is in the port."""
    module: nn.Module = model.modules[""]
    parts: list[str] = []
    walked = ""
    for part in path.split(".") if path else ():
        if is_container(module, nn.Sequential):
            place = str(list(module._modules).index(part))
            parts += ["layers", place] if walked in model.framed else [place]
        else:
            parts.append(
                part
                if isinstance(module, nn.ModuleList) or is_container(module, nn.ModuleDict)
                else attribute_name(part)
            )
        child = module._modules[part]
        walked = f"{walked}.{part}" if walked else part
        module = child if child is not None else module
    return ".".join(parts)
