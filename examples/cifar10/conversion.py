"""Takes a torch network to Flax: by `port`, which writes the source, and into twins written by hand."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from torch import Tensor, nn

from torchjax_bridge import port, to_flax, to_state_dict
from torchjax_bridge.porting import Port

from .networks import Network


@dataclass(frozen=True)
class FlaxTwin:
    """A converted network.

    Attributes:
        kind: ``"nnx"`` or ``"linen"``.
        model: The nnx module, or the linen variables.
        forward: Images ``(N, 32, 32, 3)`` to logits ``(N, 10)``, compiled.
        parameters: The number of converted parameters.
        statistics: The number of converted statistics (BatchNorm's running mean and variance).
        seconds: The median time of the conversion.
        round_trip: Whether the weights come back to torch bit for bit.
        rules: What pairs it with the torch network.
        port: For a port: its source and its proof.
    """

    kind: str
    model: Any
    forward: Callable[[jax.Array], jax.Array]
    parameters: int
    statistics: int
    seconds: float
    round_trip: bool
    rules: Sequence[Any]
    port: Port | None = None


def to_port(net: nn.Module, pixels: Tensor) -> FlaxTwin:
    """The port of ``net``, with its weights, in evaluation mode.

    Args:
        net: The torch network, with its weights.
        pixels: Example images ``(N, 3, 32, 32)``.

    Raises:
        PortError: The network has parts without a counterpart in Flax, or the port differs from torch.
    """
    ported, seconds = _timed(lambda: port(net, pixels), runs=1)
    return FlaxTwin(
        kind="port",
        model=ported.model,
        forward=nnx_forward(ported.model),
        parameters=_size(nnx.state(ported.model, nnx.Param)),
        statistics=_size(nnx.state(ported.model, nnx.BatchStat)),
        seconds=seconds,
        round_trip=_same_bits(net.state_dict(), to_state_dict(ported.model, net, rules=ported.rules)),
        rules=ported.rules,
        port=ported,
    )


def to_nnx(net: nn.Module, network: Network) -> FlaxTwin:
    """The nnx twin of ``net``, with its weights, in evaluation mode."""
    template = nnx.eval_shape(
        lambda: network.make_nnx(rngs=nnx.Rngs(0))
    )  # shapes only: nothing is initialised
    model, seconds = _timed(lambda: to_flax(net, template, rules=network.rules))
    model.eval()  # BatchNorm uses the converted statistics
    return FlaxTwin(
        kind="nnx",
        model=model,
        forward=nnx_forward(model),
        parameters=_size(nnx.state(model, nnx.Param)),
        statistics=_size(nnx.state(model, nnx.BatchStat)),
        seconds=seconds,
        round_trip=_same_bits(net.state_dict(), to_state_dict(model, net, rules=network.rules)),
        rules=network.rules,
    )


def to_linen(net: nn.Module, network: Network) -> FlaxTwin:
    """The linen twin of ``net``, with its weights as variables."""
    module = network.make_linen()
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    template = jax.eval_shape(module.init, jax.random.key(0), image)
    variables, seconds = _timed(lambda: to_flax(net, template, rules=network.rules))
    return FlaxTwin(
        kind="linen",
        model=variables,
        forward=partial(_apply_linen, module, variables),
        parameters=_size(variables["params"]),
        statistics=_size(variables.get("batch_stats", {})),
        seconds=seconds,
        round_trip=_same_bits(net.state_dict(), to_state_dict(variables, net, rules=network.rules)),
        rules=network.rules,
    )


def nnx_forward(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    """The compiled forward pass of ``model`` as it is now."""
    return partial(_apply_nnx, *nnx.split(model))


@partial(jax.jit, static_argnums=0)
def _apply_nnx(graph: Any, state: Any, pixels: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(pixels)


@partial(jax.jit, static_argnums=0)
def _apply_linen(module: Any, variables: Any, pixels: jax.Array) -> jax.Array:
    return module.apply(variables, pixels)


def _same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state_dicts hold the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and tensor.numpy().tobytes() == other[name].numpy().tobytes()
        for name, tensor in one.items()
    )


def _timed(convert: Callable[[], Any], runs: int = 5) -> tuple[Any, float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = convert()
        jax.block_until_ready(jax.tree.leaves(result))
        times.append(time.perf_counter() - start)
    return result, median(times)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
