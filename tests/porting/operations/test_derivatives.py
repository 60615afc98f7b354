"""Where a function has a corner, or its formula divides by 0, its code has the derivative that torch has."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from .driver import as_jax, lowered, run, tensor

CORNERS = torch.tensor([[-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 20.0, -20.0, 2.0]])
ZEROS = torch.zeros(2, 3)
OF_ELEMENTS = """
    abs absolute relu relu6 selu elu celu leaky_relu hardtanh hardshrink softshrink hardswish hardsigmoid softplus gelu
    silu mish softsign sign nan_to_num sinc logsigmoid sqrt tanhshrink
"""


def _named(name: str) -> Callable[..., torch.Tensor]:
    return getattr(torch, name, None) or getattr(F, name)


CASES: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    **{name: (_named(name), (CORNERS,)) for name in OF_ELEMENTS.split()},
    "clamp": (lambda x: x.clamp(-1, 1), (CORNERS,)),
    "clamp_min": (lambda x: x.clamp(min=0), (CORNERS,)),
    "clamp_max": (lambda x: x.clamp_max(0), (CORNERS,)),
    "clamp by a tensor": (lambda x: x.clamp(min=torch.zeros(1)), (CORNERS,)),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.25])), (CORNERS,)),
    "threshold": (lambda x: F.threshold(x, 0.5, 2.0), (CORNERS,)),
    **{name: (_named(name), (CORNERS, CORNERS.clone())) for name in ("maximum", "minimum", "fmax", "fmin")},
    "norm of everything": (torch.norm, (ZEROS,)),
    **{
        f"norm {p}": (lambda x, p=p: x.norm(p=p, dim=1), (torch.cat([ZEROS, ZEROS + 1]),))
        for p in (1, 1.5, 2, 3, torch.inf)
    },
    "linalg": (
        lambda x: (
            torch.linalg.vector_norm(x, dim=1) + torch.linalg.norm(x, dim=1) + torch.linalg.matrix_norm(x)
        ),
        (ZEROS,),
    ),
    "cosine_similarity": (F.cosine_similarity, (torch.cat([ZEROS, ZEROS + 1]), torch.cat([ZEROS, ZEROS]))),
    "normalize": (lambda x: F.normalize(x) + F.normalize(x, p=1), (ZEROS,)),
    "cdist": (lambda x, y: torch.cdist(x, y) + torch.cdist(x, y, p=1), (ZEROS, ZEROS.clone())),
    "distances": (
        lambda x, y: torch.dist(x, y) + F.pairwise_distance(x, y, eps=0.0),
        (ZEROS, ZEROS.clone()),
    ),
    "std": (lambda x: x.std(1) + x.std(1, unbiased=False) + torch.std_mean(x, 0)[0].sum(), (ZEROS,)),
    "prod": (lambda x: x.prod(1) + x.cumprod(1).sum(1), (torch.tensor([[1.0, 0.0, 2.0]]),)),
    "softmax of what is masked": (lambda x: x.softmax(1), (torch.tensor([[0.0, -torch.inf, 1.0]]),)),
    "l1_loss": (F.l1_loss, (CORNERS, CORNERS.clone())),
    "huber": (lambda x, y: F.huber_loss(x, y) + F.smooth_l1_loss(x, y + 1), (CORNERS, CORNERS + 1)),
    "binary_cross_entropy": (
        lambda x: F.binary_cross_entropy(x, torch.tensor([[1.0, 1.0, 0.0, 0.3]])),
        (torch.tensor([[0.0, 1.0, 0.5, 0.3]]),),
    ),
    "max_pool of equal numbers": (lambda x: F.max_pool2d(x, 3, 2, 1), (-torch.ones(1, 1, 4, 4),)),
    "max_pool with gaps": (lambda x: F.max_pool2d(x, 2, 1, 1, (1, 2)), (tensor(1, 2, 5, 5),)),
}


def _as_torch_has_it(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    leaves = [one.clone().requires_grad_() for one in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, _weights(output))]


def _weights(output: Any) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape)


def test_a_derivative_at_a_corner_is_the_one_of_torch() -> None:
    wanted = {name: _as_torch_has_it(*case) for name, case in CASES.items()}
    bodies = {}
    for name, (function, inputs) in CASES.items():
        model, bodies[name] = lowered(function, inputs, [tuple(range(one.dim())) for one in inputs])
        assert not model.faults, name

    def total(arrays: dict[str, list[jax.Array]]) -> Any:
        outputs = {name: run(body, arrays[name])[0] for name, body in bodies.items()}
        return sum(
            jnp.sum(jnp.asarray(_weights(wanted[name][0]).numpy()) * one) for name, one in outputs.items()
        )

    arrays = {
        name: [as_jax(one, tuple(range(one.dim()))) for one in inputs] for name, (_, inputs) in CASES.items()
    }
    found = jax.jit(jax.grad(total))(arrays)
    close = functools.partial(np.allclose, rtol=1e-4, atol=1e-5, equal_nan=True)
    differ = {
        name: (got, want)
        for name, (_, *gradients) in wanted.items()
        for got, want in zip(found[name], gradients, strict=True)
        if not close(got, want.numpy())
    }
    assert not differ, differ
