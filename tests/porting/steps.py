"""A step of training in torch and in its port: outputs, gradients and statistics, in torch's layouts."""

import copy
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from torchjax_bridge import to_state_dict
from torchjax_bridge.porting import Port


@dataclass
class Step:
    """What a step of training gave.

    Attributes:
        outputs: Every tensor that the model returned.
        gradients: Of a weighted sum of all outputs, by the names of torch.
        statistics: The running statistics after the step.
    """

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]


def torch_step(module: nn.Module, x: torch.Tensor) -> Step:
    """A step of a copy of the module, in training mode."""
    own = copy.deepcopy(module).train()
    own.zero_grad()
    outputs = _tensors(own(x.clone()))
    sum((output * _weights(output)).sum() for output in outputs).backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    return Step([o.detach() for o in outputs], gradients, _statistics(own.state_dict()))


def flax_step(ported: Port, model: nnx.Module, module: nn.Module, x: torch.Tensor) -> Step:
    """A step of a copy of the port, in training mode."""
    model = nnx.clone(model)
    model.train()

    def loss(model: nnx.Module, x: jax.Array) -> Any:
        outputs = jax.tree.leaves(model(x))
        weights = [_as_images(_weights(torch.empty(_in_torch(output.shape)))) for output in outputs]
        return sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True)), outputs

    @nnx.jit
    def step(model: nnx.Module, x: jax.Array) -> Any:
        return nnx.value_and_grad(loss, has_aux=True)(model, x)

    with jax.default_matmul_precision("highest"):
        (_, outputs), gradients = step(model, _as_images(x))
    as_torch = [_as_torch(output) for output in outputs]
    statistics = _statistics(to_state_dict(model, module, rules=ported.rules))
    nnx.update(model, gradients)
    named = to_state_dict(model, module, rules=ported.rules)
    return Step(as_torch, {name: named[name] for name, _ in module.named_parameters()}, statistics)


def flax_outputs(model: nnx.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the model returns in the mode that it is in."""
    return [_as_torch(output) for output in jax.tree.leaves(model(_as_images(x)))]


def linen_step(ported: Port, module: nn.Module, x: torch.Tensor) -> Step:
    """A step of a port to linen, in training mode."""
    linen_module, variables = ported.model
    images = _as_images(x)
    state = {name: tree for name, tree in variables.items() if name != "params"}

    @jax.jit
    def loss(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        tree, after = linen_module.apply(
            {"params": params, **state}, images, train=True, rngs=rngs, mutable=[*state]
        )
        outputs = jax.tree.leaves(tree)
        weights = [_as_images(_weights(torch.empty(_in_torch(output.shape)))) for output in outputs]
        return sum(jnp.sum(o * w) for o, w in zip(outputs, weights, strict=True)), (outputs, after)

    with jax.default_matmul_precision("highest"):
        (_, (outputs, after)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    as_torch = [_as_torch(output) for output in outputs]
    statistics = _statistics(to_state_dict({**variables, **after}, module, rules=ported.rules))
    named = to_state_dict({**variables, "params": gradients}, module, rules=ported.rules)
    return Step(as_torch, {name: named[name] for name, _ in module.named_parameters()}, statistics)


def furthest(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference, relative to the largest element of each tensor, and the tensor that it is in."""
    largest = max(float(tensor.abs().max()) for tensor in want.values())
    found = (0.0, "")
    for name, tensor in want.items():
        scale = max(float(tensor.abs().max()), 1e-3 * largest)
        found = max(found, (float((got[name] - tensor).abs().max()) / scale, name))
    return found


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [tensor for item in tree for tensor in _tensors(item)] if isinstance(tree, tuple | list) else []


def _as_images(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray((tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).numpy())


def _as_torch(output: jax.Array) -> torch.Tensor:
    tensor = torch.from_numpy(jax.device_get(output).copy())
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


def _in_torch(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 else shape


def _weights(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.dim())) / tensor.numel()


def _statistics(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in state.items() if name.endswith(("running_mean", "running_var"))}
