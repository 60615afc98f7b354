"""The ``wrap-torch`` suite: what JAX code called from torch costs, forward and backward.

The baseline is what one would write by hand: an ``autograd.Function`` over a jitted forward pass that returns
its pullback, and a jitted call of that pullback; and without gradients, ``to_torch(jitted(to_jax(x)))``. It takes
one flat list of tensors of one signature, hides its residuals from torch and has one derivative. Beside it
stands torch-jax-interop, and JAX alone on its own arrays, which is what no crossing would cost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from examples.cifar10.nnx_nets import Net, ResNet20
from torchjax_bridge import as_torch_function, as_torch_module, to_jax, to_torch

from ._case import Candidate, Findings, WrongResultError, ask
from ._peers import load_peer
from ._record import Promise
from ._setting import Setting

__all__ = ["run"]

OURS = "as_torch_function"
MODULE = "as_torch_module"
HAND = "autograd.Function by hand"
PLAIN = "to_torch(jitted(to_jax(x)))"
PEER = "torch-jax-interop"
JAX = "JAX alone"
TORCH = "torch alone"

Arrays = Sequence[jax.Array]
Tensors = Sequence[torch.Tensor]


def run(setting: Setting) -> Findings:
    """A small network and the CIFAR ``Net``, with and without gradients; and a ResNet-20."""
    found = setting.findings
    for problem in (_mlp(setting), _net(setting)):
        found += _forward(problem, setting)
        found += _training(problem, setting)
    found += _resnet(setting)
    return found


@dataclass(frozen=True)
class Problem:
    """A function ``fn(x, *weights)``, an input, weights, and a cotangent of the result."""

    key: str
    words: str
    fn: Callable[..., jax.Array]
    x: torch.Tensor
    weights: list[torch.Tensor]
    cotangent: torch.Tensor
    native: Callable[..., torch.Tensor] | None = None

    @property
    def operands(self) -> list[torch.Tensor]:
        return [self.x, *self.weights]


def _mlp(setting: Setting) -> Problem:
    def fn(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ first) @ second)

    def native(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x @ first) @ second)

    x, first, second, cotangent = _tensors(setting, (8, 64), (64, 64), (64, 64), (8, 64))
    weights = [first.requires_grad_(), second.requires_grad_()]
    return Problem("mlp", "a two-layer network (8x64)", fn, x, weights, cotangent, native)


def _net(setting: Setting) -> Problem:
    graph, state = nnx.split(Net(rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree_util.tree_flatten(state)

    def fn(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return nnx.merge(graph, jax.tree_util.tree_unflatten(structure, weights))(x)

    x, cotangent = _tensors(setting, (8, 32, 32, 3), (8, 10))
    weights = [to_torch(leaf, copy=True, device=setting.torch_device).requires_grad_() for leaf in leaves]
    return Problem("net", "the CIFAR Net on 8 images", fn, x, weights, cotangent)


def _tensors(setting: Setting, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(shape, generator=generator).to(setting.torch_device) for shape in shapes]


# --- the questions -----------------------------------------------------------------------------------------


def _forward(problem: Problem, setting: Setting) -> Findings:
    jitted = jax.jit(problem.fn)
    plain = [tensor.detach() for tensor in problem.operands]
    expected = [np.asarray(jitted(*to_jax(plain)))]
    wrapped = as_torch_function(problem.fn)
    arrays = to_jax(plain, copy=True)

    def by_hand(tensors: Tensors) -> torch.Tensor:
        return to_torch(jitted(*to_jax(tuple(tensors))))

    candidates = [
        Candidate(PLAIN, by_hand, plain, _right(expected)),
        # The weights require grad, and the baseline is handed them detached.
        Candidate(OURS, lambda xs: wrapped(*xs), problem.operands, _right(expected), ours=True),
        Candidate(JAX, lambda xs: jitted(*xs), arrays, _right(expected), limit=True),
    ]
    if problem.native:
        native = problem.native
        candidates.append(Candidate(TORCH, lambda xs: native(*xs), plain, _right(expected), limit=True))
    question = f"What does the forward of {problem.words} cost from torch under no_grad, run by JAX?"
    with torch.no_grad():
        case, rounds = ask(f"wrap-torch/{problem.key}-forward", question, candidates, setting, effort=3)
    name = f"{problem.key} forward, {OURS} / {PLAIN}"
    return Findings([case], [Promise(name, "at most", 1.5, "x", rounds.ratio(OURS, PLAIN))])


def _training(problem: Problem, setting: Setting) -> Findings:
    arrays = to_jax([tensor.detach() for tensor in problem.operands], copy=True)
    cotangent = to_jax(problem.cotangent, copy=True)

    @jax.jit
    def alone(x: jax.Array, *weights: jax.Array) -> Any:
        return jax.vjp(lambda *ws: problem.fn(x, *ws), *weights)[1](cotangent)

    expected = [np.asarray(gradient) for gradient in alone(*arrays)]

    def backward(call: Callable[..., torch.Tensor]) -> Callable[[Tensors], Tensors]:
        return lambda tensors: torch.autograd.grad(call(*tensors), problem.weights, problem.cotangent)

    candidates = [
        Candidate(HAND, backward(_by_hand(problem.fn)), problem.operands, _right(expected)),
        Candidate(
            OURS, backward(as_torch_function(problem.fn)), problem.operands, _right(expected), ours=True
        ),
        Candidate(JAX, lambda xs: jax.block_until_ready(alone(*xs)), arrays, _right(expected), limit=True),
    ]
    if problem.native:
        native = backward(problem.native)
        candidates.append(Candidate(TORCH, native, problem.operands, _right(expected), limit=True))
    peer = load_peer(PEER).module if setting.peers else None
    if peer is not None:
        # It differentiates the parameters of a module of its own, and only those.
        theirs = peer.WrappedJaxFunction(
            jax.jit(lambda weights, x: problem.fn(x, *weights)), tuple(arrays[1:])
        )
        weights = list(theirs.parameters())

        def interop(tensors: Tensors) -> Tensors:
            return torch.autograd.grad(theirs(tensors[0]), weights, problem.cotangent)

        candidates.append(Candidate(PEER, interop, problem.operands, _right(expected)))
    question = f"What do forward and backward of {problem.words} cost from torch, run by JAX?"
    case, rounds = ask(f"wrap-torch/{problem.key}-training", question, candidates, setting, effort=3)
    name = f"{problem.key} forward and backward"
    promises = [Promise(f"{name}, {OURS} / {HAND}", "at most", 1.5, "x", rounds.ratio(OURS, HAND))]
    if PEER in rounds.seconds and problem.key == "mlp":
        promises.append(Promise(f"{name}, {PEER} / {OURS}", "at least", 6, "x", rounds.ratio(PEER, OURS)))
    return Findings([case], promises)


def _resnet(setting: Setting) -> Findings:
    module = as_torch_module(ResNet20(rngs=nnx.Rngs(0))).to(setting.torch_device).eval()
    images, cotangent = _tensors(setting, (64, 32, 32, 3), (64, 10))
    weights = list(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    pure = module._definition.pure(training=False)
    values = to_jax({name: value.detach() for name, value in module.state_dict().items()}, copy=True)
    buffers = {name: values[name] for name, _ in module.named_buffers()}
    x, ct = to_jax((images, cotangent), copy=True)

    # JAX's own two steps, so that both sides hand residuals from one compiled program to another.
    @jax.jit
    def forward(parameters: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda p: pure(None, buffers, p, (x,), {})[0], parameters)

    pull = jax.jit(lambda pullback, ct: pullback(ct)[0])

    def alone(parameters: Any) -> Any:
        _, pullback = forward(parameters, x)
        gradients = pull(pullback, ct)
        jax.block_until_ready(gradients)
        return [gradients[name] for name in names]

    parameters = {name: values[name] for name in names}
    expected = [np.asarray(gradient) for gradient in alone(parameters)]

    def ours(_: Any) -> Tensors:
        return torch.autograd.grad(module(images), weights, cotangent)

    candidates = [
        Candidate(JAX, alone, parameters, _right(expected)),
        Candidate(MODULE, ours, None, _right(expected), ours=True),
    ]
    question = "What does as_torch_module add to forward and backward of a ResNet-20 on 64 images?"
    case, rounds = ask("wrap-torch/resnet20", question, candidates, setting)
    share = rounds.combine(lambda seconds: 100 * (1 - seconds[JAX] / seconds[MODULE]))
    return Findings([case], [Promise("overhead's share of ResNet-20, batch 64", "at most", 5.0, "%", share)])


# --- the candidates ------------------------------------------------------------------------------------------


def _by_hand(fn: Callable[..., jax.Array]) -> Callable[..., torch.Tensor]:
    """The shortest right way by hand, which differentiates the weights alone."""
    forward = jax.jit(lambda x, *weights: jax.vjp(lambda *ws: fn(x, *ws), *weights))
    pull = jax.jit(lambda pullback, cotangent: pullback(cotangent))

    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
            result, ctx.pullback = forward(*to_jax(tuple(tensor.detach() for tensor in tensors)))
            return to_torch(result)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            return (None, *to_torch(pull(ctx.pullback, to_jax(cotangents[0]))))

    return lambda *tensors: ByHand.apply(*tensors)


def _right(expected: list[np.ndarray]) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        leaves = [result] if isinstance(result, torch.Tensor) else jax.tree_util.tree_leaves(result)
        for leaf, value in zip(leaves, expected, strict=True):
            array = np.asarray(leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf)
            if array.shape != value.shape or not np.allclose(array, value, rtol=1e-3, atol=1e-4):
                raise WrongResultError(f"off by {np.abs(array - value).max():.2g}")

    return check
