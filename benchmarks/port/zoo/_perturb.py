"""Random values for what a fresh model leaves at zero, at one, or too small to be seen.

A head of zeros, a layer scale of 1e-6 and attention logits near zero hide errors: any port of such a model
agrees with it. Kernels get the gain that keeps a signal alive through many layers, and statistics of BatchNorm are
near those of the signal that comes in, as they are in a trained model, so that it neither fades nor overflows.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["calibrate", "perturb"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def perturb(module: nn.Module, seed: int) -> nn.Module:
    """Change every parameter and every running statistic of a module in place.

    - Kernels (``weight`` of two axes or more, of other layers than embeddings) get a root mean square of
      ``(gain / fan_in) ** 0.5``, with a gain of 2 for convolutions and 1 for matrices.
    - Other tables (embeddings, positions, tokens, biases of attention) get one of at least 0.5.
    - Vectors (scales, biases, layer scales) are scaled by a factor in ``(0.6, 1.4)``; those that were all below
      1e-2 are drawn anew with a deviation of 0.2.
    - Biases of BatchNorm are one larger: behind it most of a ReLU is open. With half of each closed a random net is
      chaotic: it magnifies rounding by a fifth at every layer, so that torch in float32 is 1e-4 from float64.
    - Running means are drawn with a deviation of 0.1, running variances from ``(0.6, 1.4)``.

    Args:
        module: Any module; its mode stays.
        seed: The same seed and module give the same values.

    Returns:
        The module.
    """
    draw = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.is_floating_point():
                seen.add(id(parameter))
                _fill(layer, name, parameter, draw)
        for name, buffer in layer.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0, 0.1, generator=draw)
            elif name == "running_var":
                buffer.uniform_(0.6, 1.4, generator=draw)
        if isinstance(layer, _BATCH_NORMS) and layer.affine:
            layer.bias.add_(1)
    return module


@torch.no_grad()
def calibrate(module: nn.Module, inputs: tuple[Any, ...], seed: int) -> nn.Module:
    """Set the running statistics of a module in place to those of what comes in, changed at random by a third.

    Each layer is set just before it runs in evaluation mode for the first time, with the layers before it as they
    will be. So a change that one layer makes does not grow in the next.

    Args:
        module: Any module; its mode stays.
        inputs: The arguments of its ``forward``.
        seed: The same seed, module and inputs give the same values.

    Returns:
        The module.
    """
    draw = torch.Generator().manual_seed(seed)
    seen: set[nn.Module] = set()

    def measure(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        mean, var = layer.running_mean, layer.running_var
        if layer in seen or not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            return
        seen.add(layer)
        values = given[0].transpose(0, 1).flatten(1)
        var.copy_(values.var(1))
        var.clamp_(min=0.1 * float(var.mean()))  # a channel that nothing reached would magnify whatever does
        mean.copy_(values.mean(1) + 0.1 * var.sqrt() * torch.empty_like(mean).normal_(generator=draw))
        var.mul_(torch.empty_like(var).uniform_(0.6, 1.4, generator=draw))

    hooks = [
        layer.register_forward_pre_hook(measure)
        for layer in module.modules()
        if isinstance(layer, _BATCH_NORMS)
    ]
    training = module.training
    module.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return module.train().train(
        training
    )  # training mode first: what was computed for evaluation is dropped there


def _fill(layer: nn.Module, name: str, parameter: Tensor, draw: torch.Generator) -> None:
    if parameter.squeeze().ndim < 2:
        if parameter.abs().max() < 1e-2:
            parameter.normal_(0, 0.2, generator=draw)
        else:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.6, 1.4, generator=draw))
        return
    if parameter.std() == 0:
        parameter.normal_(generator=draw)
    size = float(parameter.square().mean().sqrt())
    if name.endswith("weight") and not isinstance(layer, nn.Embedding):
        gain = 2 if parameter.ndim > 2 else 1
        parameter.mul_((gain / parameter[0].numel()) ** 0.5 / size)
    else:
        parameter.mul_(max(1.0, 0.5 / size))
