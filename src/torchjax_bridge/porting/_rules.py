"""What `to_flax` must be told of a port: flattened maps, names that differ, weights that stay in torch."""

from typing import TypeAlias

from torch import nn

from torchjax_bridge.weights import Flatten, Keep, Rename

from ._lowering import attribute_name, is_container
from ._model import Model

__all__ = ["UserRule", "rules_of"]

UserRule: TypeAlias = Flatten | Keep | Rename


def rules_of(model: Model) -> tuple[UserRule, ...]:
    """The rules of a port, deepest paths first."""
    rules: list[UserRule] = [Flatten(path, shape) for path, shape in model.flattened.items()]
    used = model.called_layers | model.read_owners | set(model.bodies)
    for path, module in model.modules.items():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and path not in used and path not in model.tied_layers:
            rules.append(Keep(path))
    renames = []
    for path, module in model.modules.items():
        flax = _flax_path(model, path)
        if (
            flax != path
            and not any(True for _ in module.children())
            and next(module.parameters(), None) is not None
        ):
            renames.append(Rename(path, flax))
    return (*rules, *sorted(renames, key=lambda rule: -rule.torch.count(".")))


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
