"""Dropout and random numbers. The emitted class draws them from its own ``rngs``."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._table import operation

__all__: list[str] = []


@operation(
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
)
def dropout(
    at: Lowering, node: Node, input: Value, p: float = 0.5, training: Any = True, inplace: bool = False
) -> Placed:
    name = node.function.rpartition(".")[2].strip("_")
    if not training or p == 0:
        return at.at(input)
    if not at.model.recording.module.training:
        raise RefusedError(f"{name}(training=True) in evaluation: nnx.Dropout is off in evaluation")
    if name != "dropout":
        raise RefusedError(f"{name} as a function in training; use the layer nn.{name[0].upper()}{name[1:]}")
    if not at.model.with_dropout:
        return at.at(input)
    attribute = at.add_dropout(float(p))
    placed = at.at(input)
    return placed.with_text(f"self.{attribute}({placed.text})")


@operation("bernoulli")
def bernoulli(at: Lowering, node: Node, input: Value, p: Any = None, *, generator: None = None) -> Placed:
    at.body.random = True
    placed = at.at(input)
    probability = placed.text if p is None else at.read(p)
    drawn = f"jax.random.bernoulli(self.rngs.dropout(), {probability}, {placed.text}.shape)"
    return placed.with_text(f"{drawn}.astype({placed.text}.dtype)")


@operation(
    "rand", "rand_like", "randn", "randn_like", "uniform", "normal", "randint", "randperm", "multinomial"
)
def random(at: Lowering, node: Node, *args: Any, **kwargs: Any) -> Placed:
    if node.function.endswith(("rand_like", "randn_like")):
        at.body.random = True
        placed = at.at(args[0] if args else kwargs["input"])
        kind = "normal" if "randn" in node.function else "uniform"
        text = f"jax.random.{kind}(self.rngs.dropout(), {placed.text}.shape, {placed.text}.dtype)"
        return placed.with_text(text)
    if node.function in ("torch.rand", "torch.randn"):
        at.body.random = True
        sizes = (
            list(args[0])
            if len(args) == 1 and isinstance(args[0], tuple | list)
            else list(args or kwargs["size"])
        )
        kind = "normal" if "randn" in node.function else "uniform"
        text = f"jax.random.{kind}(self.rngs.dropout(), {at.number(tuple(sizes))}, {at.number(node.result.dtype)})"
        return Placed(text, tuple(range(len(node.result.shape))))
    raise RefusedError(f"no translation of {node.function}, which draws random numbers")
