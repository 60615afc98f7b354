"""The ``wrap-jax`` suite: what torch code called from JAX costs, forward and backward.

The baseline is what one would write by hand: a bare ``buffer_callback`` around the same torch code. Beside it
stands wrap-torch2jax, the fastest of the other libraries, where a C++ compiler let it be built.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental.buffer_callback import buffer_callback

from examples.cifar10.torch_nets import ResNet20
from torchjax_bridge import as_jax_function, as_jax_module, to_torch

from ._case import Candidate, Findings, WrongResultError, ask
from ._peers import load_peer
from ._record import Promise
from ._rehearsal import rehearsing
from ._setting import Setting

__all__ = ["run"]

OURS = "as_jax_function"
BARE = "bare buffer_callback"
PEER = "wrap-torch2jax"
TORCH = "torch alone"

_Arrays = Sequence[jax.Array]


def run(setting: Setting) -> Findings:
    """One operator, a small network forward and backward, and a ResNet-20."""
    found = setting.findings
    found += _forward("sin", "torch.sin of a 64x64 float32", torch.sin, _arrays(setting, (64, 64)), setting)
    operands = _arrays(setting, (8, 64), (64, 64), (64, 64))
    found += _forward("mlp", "the forward of a two-layer network (8x64)", _mlp, operands, setting)
    found += _gradient(operands, setting)
    found += _resnet(setting)
    return found


def _mlp(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.tanh(torch.tanh(x @ first) @ second)


def _loss(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return _mlp(x, first, second).pow(2).sum()


def _arrays(setting: Setting, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=shape).astype(np.float32) * 0.1 for shape in shapes]
    return [jax.device_put(value, setting.jax_device) for value in values]


def _forward(
    key: str, words: str, fn: Callable[..., torch.Tensor], operands: list[jax.Array], setting: Setting
) -> Findings:
    expected = fn(*to_torch(operands)).cpu().numpy()
    shape = jax.ShapeDtypeStruct(expected.shape, jnp.float32)
    candidates = [
        _candidate(BARE, jax.jit(_bare(fn, [shape], setting)), operands, [expected]),
        _candidate(OURS, jax.jit(as_jax_function(fn)), operands, [expected]),
    ]
    peer = _peer(setting)
    if peer:
        theirs = peer(fn, *to_torch(operands), output_shapes=shape)
        candidates.append(_candidate(PEER, jax.jit(lambda *xs: theirs(*xs)), operands, [expected]))
    question = f"What does {words} cost under jax.jit, run by torch?"
    case, rounds = ask(f"wrap-jax/{key}", question, candidates, setting, effort=3)
    promises = [Promise(f"{key}, {OURS} / {BARE}", "at most", 1.3, "x", rounds.ratio(OURS, BARE))]
    if PEER in rounds.seconds:
        promises.append(Promise(f"{key}, {OURS} / {PEER}", "at most", 1.1, "x", rounds.ratio(OURS, PEER)))
    return Findings([case], promises)


def _gradient(operands: list[jax.Array], setting: Setting) -> Findings:
    tensors = [x.clone().requires_grad_() for x in to_torch(operands)]
    expected = [g.cpu().numpy() for g in torch.autograd.grad(_loss(*tensors), tensors)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]

    def by_hand(*xs: torch.Tensor) -> Sequence[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(_loss(*inputs), inputs)

    wrt = (0, 1, 2)
    candidates = [
        _candidate(BARE, jax.jit(_bare(by_hand, shapes, setting)), operands, expected),
        _candidate(OURS, jax.jit(jax.grad(as_jax_function(_loss), wrt)), operands, expected),
        _candidate(
            "as_jax_function, recomputing",
            jax.jit(jax.grad(as_jax_function(_loss, residuals="recompute"), wrt)),
            operands,
            expected,
        ),
    ]
    peer = _peer(setting)
    if peer:
        theirs = peer(
            _loss, *to_torch(operands), output_shapes=jax.ShapeDtypeStruct((), jnp.float32), depth=2
        )
        candidates.append(
            _candidate(PEER, jax.jit(jax.grad(lambda *xs: theirs(*xs), wrt)), operands, expected)
        )
    question = "What does the gradient of a two-layer network (8x64) cost under jax.jit, run by torch?"
    case, rounds = ask("wrap-jax/gradient", question, candidates, setting, effort=3)
    promises = []
    if PEER in rounds.seconds:
        promises.append(Promise(f"gradient, {OURS} / {PEER}", "at most", 0.75, "x", rounds.ratio(OURS, PEER)))
    return Findings([case], promises)


def _resnet(setting: Setting) -> Findings:
    torch.manual_seed(0)
    module = ResNet20().eval().to(setting.torch_device)
    apply, variables = as_jax_module(module)
    (images,) = _arrays(setting, (64, 3, 32, 32))
    tensor = to_torch(images)

    def native(_: _Arrays) -> torch.Tensor:
        with torch.no_grad():
            return module(tensor)

    expected = native([images]).cpu().numpy()
    run_jitted = jax.jit(apply)
    candidates = [
        Candidate(TORCH, native, [images], _right([expected])),
        Candidate(
            "as_jax_module",
            lambda xs: run_jitted(variables, *xs),
            [images],
            _right([expected]),
            ours=True,
        ),
    ]
    question = "What does as_jax_module add to the forward of a ResNet-20 on 64 images?"
    case, rounds = ask("wrap-jax/resnet20", question, candidates, setting)
    share = rounds.combine(lambda seconds: 100 * (1 - seconds[TORCH] / seconds["as_jax_module"]))
    return Findings([case], [Promise("overhead's share of ResNet-20, batch 64", "at most", 5.0, "%", share)])


# --- the candidates --------------------------------------------------------------------------------------


def _candidate(
    name: str, call: Callable[..., Any], operands: list[jax.Array], expected: list[np.ndarray]
) -> Candidate:
    return Candidate(name, lambda xs: call(*xs), operands, _right(expected), ours=name.startswith(OURS))


def _right(expected: list[np.ndarray]) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        leaves = [
            np.asarray(leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf) for leaf in _leaves(result)
        ]
        for leaf, value in zip(leaves, expected, strict=True):
            if not np.allclose(leaf, value, rtol=1e-3, atol=1e-4):
                raise WrongResultError(f"off by {np.abs(leaf - value).max():.2g}")

    return check


def _leaves(result: Any) -> list[Any]:
    return [result] if isinstance(result, torch.Tensor) else jax.tree_util.tree_leaves(result)


def _bare(
    fn: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct], setting: Setting
) -> Callable[..., Any]:
    """The shortest right way by hand: views of XLA's buffers in, one copy out, on XLA's stream."""

    def run(outs: Sequence[Any], xs: Sequence[Any]) -> None:
        results = fn(*map(torch.from_dlpack, xs))
        for out, result in zip(
            outs, [results] if isinstance(results, torch.Tensor) else results, strict=True
        ):
            torch.from_dlpack(out).copy_(result)

    def on_cpu(_: Any, outs: Sequence[Any], *xs: Any) -> None:
        run(outs, xs)

    def on_cuda(context: Any, outs: Sequence[Any], *xs: Any) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(context.stream)):
            run(outs, xs)

    on_device = on_cpu if setting.device == "cpu" or rehearsing() else on_cuda
    return buffer_callback(on_device, list(shapes))


def _peer(setting: Setting) -> Callable[..., Any] | None:
    module = load_peer(PEER).module if setting.peers else None
    return None if module is None else module.torch2jax
