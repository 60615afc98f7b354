"""Dropout and random numbers. The emitted class draws them from a stream of its own, ``self.rngs``."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Axes, Placed, RefusedError, channels_last
from ._creation import spread_order
from ._operands import listed
from ._table import operation, table_name

__all__: list[str] = []

# What nn.SELU goes to for large negative inputs, negated: alpha dropout sets elements to it.
_SELU_LIMIT = 1.7580993408473766


def _drops(at: Lowering, node: Node, p: float, training: Any) -> bool:
    """Whether a dropout is code of the port, in both modes.

    Raises:
        RefusedError: It drops in evaluation too.
    """
    if training and p > 0 and not at.model.recording.module.training:
        raise RefusedError(
            f"{table_name(node.function)}(training=True) drops in evaluation, where nnx.Dropout does nothing; "
            "pass training=self.training"
        )
    return p > 0 and (bool(training) or node in at.model.dropouts)


@operation("dropout", "dropout1d", "dropout2d", "dropout3d")
def dropout(
    at: Lowering, node: Node, input: Value, p: float = 0.5, training: Any = True, inplace: bool = False
) -> Placed:
    if not _drops(at, node, p, training):
        return at.at(input)
    name, rank = table_name(node.function), len(input.shape)
    if name == "dropout":
        placed = at.at(input)
        return placed.with_text(f"self.{at.add_dropout(float(p))}({placed.text})")
    if rank != int(name.removeprefix("dropout").removesuffix("d")) + 2:
        raise RefusedError(f"{name} of {rank} axes; add the axis of the batch with x[None]")
    order = channels_last(rank)
    attribute = at.add_dropout(float(p), tuple(range(1, rank - 1)))
    return Placed(f"self.{attribute}({at.read(input, order)})", order)


@operation("alpha_dropout")
def alpha_dropout(
    at: Lowering, node: Node, input: Value, p: float = 0.5, training: Any = False, inplace: bool = False
) -> Placed:
    if not _drops(at, node, p, training):
        return at.at(input)
    scale = ((1 - p) * (1 + p * _SELU_LIMIT**2)) ** -0.5
    placed = at.at(input)
    kept = f"jax.random.bernoulli({_key(at)}, {1 - float(p)!r}, {placed.text}.shape)"
    chosen = f"jnp.where({kept}, {placed.text}, {-_SELU_LIMIT!r})"
    return placed.with_text(f"({scale!r} * {chosen} + {scale * _SELU_LIMIT * p!r})")


@operation("rrelu")
def rrelu(
    at: Lowering,
    node: Node,
    input: Value,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: Any = False,
    inplace: bool = False,
) -> Placed:
    placed = at.at(input)
    low, high = at.number(lower), at.number(upper)
    slope = f"(({low} + {high}) / 2)"
    if training:
        slope = f"jax.random.uniform({_key(at)}, {placed.text}.shape, {placed.text}.dtype, {low}, {high})"
    return placed.with_text(f"jnp.where({placed.text} >= 0, {placed.text}, {slope} * {placed.text})")


# --- random numbers -----------------------------------------------------------------------------------------


def _key(at: Lowering) -> str:
    at.body.random = True
    return "self.rngs()"


def _like(at: Lowering, value: Value) -> tuple[str, Placed]:
    """The shape of a tensor whose values do not matter, and how it stands."""
    placed, origin = at.at(value), value.origin
    if isinstance(origin, Node) and table_name(origin.function) in ("empty", "zeros", "ones"):
        sizes = listed(origin.args, origin.kwargs, "size")
    elif isinstance(origin, Node) and table_name(origin.function) in ("new_empty", "new_zeros", "new_ones"):
        sizes = listed(origin.args[1:], origin.kwargs, "size")
    else:
        return f"{placed.text}.shape", placed
    return at.number(tuple(sizes[axis] for axis in placed.order)), placed


@operation("bernoulli")
def bernoulli(at: Lowering, node: Node, input: Value, p: Any = None, *, generator: None = None) -> Placed:
    shape, placed = _like(at, input)
    if node.function.endswith("bernoulli_"):
        if isinstance(p, Value):
            raise RefusedError("bernoulli_ with a tensor of probabilities; use torch.bernoulli(p)")
        probability = "0.5" if p is None else at.number(p)
    elif p is None:
        probability, shape = placed.text, f"{placed.text}.shape"
    else:
        probability = at.number(p)
    drawn = f"jax.random.bernoulli({_key(at)}, {probability}, {shape})"
    return placed.with_text(f"{drawn}.astype({at.number(node.result.dtype)})")


@operation("uniform")
def uniform(at: Lowering, node: Node, input: Value, *ends: Any, **kwargs: Any) -> Placed:
    low, high = ({"from": 0.0, "to": 1.0} | dict(zip(("from", "to"), ends, strict=False)) | kwargs).values()
    shape, placed = _like(at, input)
    settings = f"{at.number(node.result.dtype)}, {at.number(low)}, {at.number(high)}"
    return placed.with_text(f"jax.random.uniform({_key(at)}, {shape}, {settings})")


@operation("normal")
def normal(at: Lowering, node: Node, input: Any, mean: Any = 0.0, std: Any = 1.0, **kwargs: Any) -> Placed:
    if not node.function.endswith("normal_") or kwargs:
        raise RefusedError("torch.normal; write mean + std * torch.randn_like(mean)")
    shape, placed = _like(at, input)
    drawn = f"jax.random.normal({_key(at)}, {shape}, {at.number(node.result.dtype)})"
    return placed.with_text(f"({at.number(mean)} + {at.number(std)} * {drawn})")


@operation("exponential")
def exponential(at: Lowering, node: Node, input: Value, lambd: Any = 1) -> Placed:
    shape, placed = _like(at, input)
    drawn = f"jax.random.exponential({_key(at)}, {shape}, {at.number(node.result.dtype)})"
    return placed.with_text(drawn if lambd == 1 else f"({drawn} / {at.number(lambd)})")


@operation("rand_like", "randn_like")
def random_like(at: Lowering, node: Node, input: Value, **kwargs: Any) -> Placed:
    placed = at.at(input)
    kind = "normal" if "randn" in node.function else "uniform"
    dtype = at.number(node.result.dtype)
    return placed.with_text(f"jax.random.{kind}({_key(at)}, {placed.text}.shape, {dtype})")


@operation("rand", "randn")
def random(at: Lowering, node: Node, *size: Any, **kwargs: Any) -> Placed:
    if kwargs.get("generator") is not None:
        raise RefusedError(f"{node.function} with a generator of its own; leave it out")
    sizes = listed(size, kwargs, "size")
    kind = "normal" if node.function.endswith("randn") else "uniform"
    order: Axes = spread_order(sizes)
    text = f"jax.random.{kind}({_key(at)}, {at.number(tuple(sizes))}, {at.number(node.result.dtype)})"
    return Placed(text, order)


@operation("randperm")
def permutation(at: Lowering, node: Node, n: Any, **kwargs: Any) -> Placed:
    if kwargs.get("generator") is not None:
        raise RefusedError("torch.randperm with a generator of its own; leave it out")
    return Placed(f"jax.random.permutation({_key(at)}, {at.number(n)})", (0,))


@operation("feature_dropout", "feature_alpha_dropout")
def feature_dropout(
    at: Lowering, node: Node, input: Value, p: float = 0.5, training: Any = False, inplace: bool = False
) -> Placed:
    if _drops(at, node, p, training):
        raise RefusedError(f"no translation of {node.function} in training; use F.dropout")
    return at.at(input)


@operation("randint", "randint_like", "multinomial")
def refused(at: Lowering, node: Node, *args: Any, **kwargs: Any) -> Placed:
    raise RefusedError(
        f"no translation of {node.function}, which draws random numbers; use torch.rand, torch.randn or F.dropout"
    )


@operation("gumbel_softmax")
def gumbel_softmax(
    at: Lowering,
    node: Node,
    logits: Value,
    tau: Any = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: Any = -1,
) -> Placed:
    placed = at.in_torch_map_order(logits)
    x, axis = placed.text, placed.place(dim)
    noisy = f"({x} + jax.random.gumbel({_key(at)}, {x}.shape, {x}.dtype))"
    scaled = noisy if tau == 1 else f"{noisy} / {at.number(tau)}"
    soft = f"nnx.softmax({scaled}, axis={axis})"
    if not hard:
        return placed.with_text(soft)
    soft = at.variable(soft, node.source)
    chosen = f"jax.nn.one_hot(jnp.argmax({soft}, axis={axis}), {soft}.shape[{axis}], axis={axis})"
    return placed.with_text(f"({chosen} - jax.lax.stop_gradient({soft}) + {soft})")
