"""Losses, for models whose forward computes one."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._operands import axis_text, operands
from ._table import Translation, last_name, operation

__all__: list[str] = []


def _reduce(placed: Placed, reduction: str) -> Placed:
    if reduction == "none":
        return placed
    return Placed(f"jnp.{reduction}({placed.text})", ())


def _no_old_settings(node: Node, size_average: Any, reduce: Any) -> None:
    if size_average is not None or reduce is not None:
        raise RefusedError(f"{node.function} with size_average or reduce; use reduction=")


def _pointwise(template: str, *settings: tuple[str, Any]) -> Translation:
    def translate(
        at: Lowering,
        node: Node,
        input: Value,
        target: Value,
        size_average: None = None,
        reduce: None = None,
        reduction: str = "mean",
        weight: Any = None,
        **kwargs: Any,
    ) -> Placed:
        _no_old_settings(node, size_average, reduce)
        if weight is not None or kwargs.keys() - {name for name, _ in settings}:
            raise RefusedError(f"{node.function} with weight or with settings that have no translation")
        (x, y), placed = operands(at, [input, target])
        given = {name: at.number(kwargs.get(name, default)) for name, default in settings}
        return _reduce(placed.with_text(template.format(x, y, **given)), reduction)

    return translate


operation("mse_loss")(_pointwise("jnp.square({} - {})"))
operation("l1_loss")(_pointwise("jnp.abs({} - {})"))
operation("soft_margin_loss")(_pointwise("jnp.log1p(jnp.exp(-{1} * {0}))"))


def _huber(at: Lowering, input: Value, target: Value, reduction: str, border: str, slope: bool) -> Placed:
    (x, y), placed = operands(at, [input, target])
    apart = f"jnp.abs({x} - {y})"
    inner, outer = (
        (f"0.5 * {apart} ** 2", f"{border} * ({apart} - 0.5 * {border})")
        if slope
        else (f"0.5 * {apart} ** 2 / {border}", f"{apart} - 0.5 * {border}")
    )
    return _reduce(placed.with_text(f"jnp.where({apart} < {border}, {inner}, {outer})"), reduction)


@operation("smooth_l1_loss")
def smooth_l1_loss(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    beta: Any = 1.0,
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    if beta == 0:
        raise RefusedError("F.smooth_l1_loss(beta=0); use F.l1_loss")
    return _huber(at, input, target, reduction, at.number(beta), slope=False)


@operation("huber_loss")
def huber_loss(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    reduction: str = "mean",
    delta: Any = 1.0,
    weight: Any = None,
) -> Placed:
    if weight is not None:
        raise RefusedError("F.huber_loss with weight; multiply the losses yourself")
    return _huber(at, input, target, reduction, at.number(delta), slope=True)


@operation("kl_div")
def kl_div(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    (x, y), placed = operands(at, [input, target])
    text = (
        f"(jnp.exp({y}) * ({y} - {x}))" if log_target else f"(jax.scipy.special.xlogy({y}, {y}) - {y} * {x})"
    )
    if reduction == "batchmean":
        return Placed(f"(jnp.sum({text}) / {x}.shape[{placed.place(0)}])", ())
    return _reduce(placed.with_text(text), reduction)


@operation("binary_cross_entropy", "F.binary_cross_entropy_with_logits")
def binary_cross_entropy(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    weight: Any = None,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    if pos_weight is not None:
        raise RefusedError(f"{node.function} with pos_weight; write it with F.logsigmoid")
    texts, placed = operands(at, [input, target, *([] if weight is None else [weight])])
    x, y = texts[:2]
    if last_name(node) == "binary_cross_entropy":
        yes, no = f"jnp.maximum(jnp.log({x}), -100)", f"jnp.maximum(jnp.log1p(-{x}), -100)"
    else:
        yes, no = f"nnx.log_sigmoid({x})", f"nnx.log_sigmoid(-{x})"
    text = f"-({y} * {yes} + (1 - {y}) * {no})"
    text = f"({text})" if weight is None else f"({text} * {texts[2]})"
    return _reduce(placed.with_text(text), reduction)


@operation("cross_entropy", "nll_loss", "F.nll_loss2d")
def cross_entropy(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    weight: Any = None,
    size_average: None = None,
    ignore_index: Any = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: Any = 0.0,
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    if weight is not None or label_smoothing:
        raise RefusedError(f"{node.function} with weight or label_smoothing; write it with F.log_softmax")
    axis = 1 if len(input.shape) > 1 else 0
    placed = at.in_torch_map_order(input)
    scores = placed.text
    if last_name(node) == "cross_entropy":
        scores = f"nnx.log_softmax({scores}, axis={axis_text(placed, (axis,))})"
    scores = at.variable(scores, node.source)
    place = placed.place(axis)
    if target.dtype is not None and target.dtype.is_floating_point:
        if last_name(node) != "cross_entropy":
            raise RefusedError("F.nll_loss of probabilities; use F.cross_entropy")
        text = f"-jnp.sum({at.read(target, placed.order)} * {scores}, axis={place})"
        left = _without(placed, axis)
        if reduction == "mean":
            return Placed(f"jnp.mean({text})", ())
        return _reduce(Placed(f"({text})", left), reduction)
    left = _without(placed, axis)
    labels = at.read(target, left)
    kept = at.variable(f"({labels} != {at.number(ignore_index)})", node.source)
    index = f"jnp.expand_dims(jnp.where({kept}, {labels}, 0), {place})"
    chosen = f"jnp.take_along_axis({scores}, {index}, axis={place})"
    losses = f"jnp.where({kept}, -{chosen}.squeeze({place}), 0)"
    if reduction == "mean":
        return Placed(f"(jnp.sum({losses}) / jnp.sum({kept}))", ())
    return _reduce(Placed(losses, left), reduction)


def _without(placed: Placed, axis: int) -> tuple[int, ...]:
    return tuple(other - (other > axis) for other in placed.order if other != axis)
