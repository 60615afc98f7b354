"""Losses, for models whose forward computes one."""

from typing import Any

from torchjax_bridge.recording import Node, Value

from .._lowering import Lowering
from .._placed import Placed, RefusedError
from ._norms import length
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


def _pointwise(template: str, *settings: tuple[str, Any], helper: str = "") -> Translation:
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
        at.body.helpers |= {helper} if helper else set()
        given = {name: at.number(kwargs.get(name, default)) for name, default in settings}
        return _reduce(placed.with_text(template.format(x, y, **given)), reduction)

    return translate


operation("mse_loss")(_pointwise("jnp.square({} - {})"))
operation("l1_loss")(_pointwise("absolute({} - {})", helper="absolute"))
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
    texts, placed = operands(at, [input, target, *(one for one in (weight, pos_weight) if one is not None)])
    x, y = texts[:2]
    if last_name(node) == "binary_cross_entropy":
        at.body.helpers.add("binary_cross_entropy")
        text = f"binary_cross_entropy({x}, {y})"
    else:
        yes = f"{y} * nnx.log_sigmoid({x})"
        more = "" if pos_weight is None else f"{texts[-1]} * "
        text = f"-({more}{yes} + (1 - {y}) * nnx.log_sigmoid(-{x}))"
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
    axis = 1 if len(input.shape) > 1 else 0
    placed = at.in_torch_map_order(input)
    scores = placed.text
    if last_name(node) == "cross_entropy":
        scores = f"nnx.log_softmax({scores}, axis={axis_text(placed, (axis,))})"
    elif label_smoothing or (target.dtype is not None and target.dtype.is_floating_point):
        raise RefusedError("F.nll_loss of probabilities; use F.cross_entropy")
    scores = at.variable(scores, node.source)
    place, left = placed.place(axis), _without(placed, axis)
    classes = f"{scores}.shape[{place}]"
    smooth = at.number(label_smoothing)
    row = None if weight is None else _row(at, weight, placed.rank - 1 - place)
    if target.dtype is not None and target.dtype.is_floating_point:
        wanted = at.read(target, placed.order)
        if label_smoothing:
            wanted = f"((1 - {smooth}) * {wanted} + {smooth} / {classes})"
        weighted = scores if row is None else f"{row} * {scores}"
        text = f"-jnp.sum({wanted} * {weighted}, axis={place})"
        if reduction == "mean":
            return Placed(f"jnp.mean({text})", ())
        return _reduce(Placed(f"({text})", left), reduction)
    labels = at.read(target, left)
    kept = at.variable(f"({labels} != {at.number(ignore_index)})", node.source)
    index = at.variable(f"jnp.where({kept}, {labels}, 0)", node.source)
    each = f"jnp.take_along_axis({scores}, jnp.expand_dims({index}, {place}), axis={place})"
    losses = f"-{each}.squeeze({place})"
    counted = kept
    if weight is not None:
        counted = at.variable(f"jnp.where({kept}, {at.read(weight)}[{index}], 0)", node.source)
        losses = f"{counted} * {losses}"
    if label_smoothing:
        weighted = scores if row is None else f"{row} * {scores}"
        losses = f"(1 - {smooth}) * {losses} - {smooth} / {classes} * jnp.sum({weighted}, axis={place})"
    losses = f"jnp.where({kept}, {losses}, 0)"
    if reduction == "mean":
        return Placed(f"(jnp.sum({losses}) / jnp.sum({counted}))", ())
    return _reduce(Placed(losses, left), reduction)


def _without(placed: Placed, axis: int) -> tuple[int, ...]:
    return tuple(other - (other > axis) for other in placed.order if other != axis)


def _row(at: Lowering, weight: Value, behind: int) -> str:
    """The weights of the classes, so that they broadcast against the scores."""
    return at.read(weight) + (f"[:{', None' * behind}]" if behind else "")


@operation("triplet_margin_loss")
def triplet_margin_loss(
    at: Lowering,
    node: Node,
    anchor: Value,
    positive: Value,
    negative: Value,
    margin: Any = 1.0,
    p: Any = 2,
    eps: Any = 1e-6,
    swap: bool = False,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    pairs = [(anchor, positive), (anchor, negative), *([(positive, negative)] if swap else [])]
    near, far, *more = (_apart(at, one, other, p, eps) for one, other in pairs)
    further = f"jnp.minimum({far.text}, {more[0].text})" if more else far.text
    at.body.helpers.add("clamp")
    return _reduce(near.with_text(f"clamp({at.number(margin)} + {near.text} - {further}, 0)"), reduction)


def _apart(at: Lowering, one: Value, other: Value, p: Any, eps: Any) -> Placed:
    text = f"({at.in_torch_order(one)} - {at.in_torch_order(other)} + {at.number(eps)})"
    rank = max(len(one.shape), len(other.shape))
    return length(at, Placed(text, tuple(range(rank))), (rank - 1,), p, keepdim=False)


@operation("margin_ranking_loss")
def margin_ranking_loss(
    at: Lowering,
    node: Node,
    input1: Value,
    input2: Value,
    target: Value,
    margin: Any = 0.0,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    (x, y, sign), placed = operands(at, [input1, input2, target])
    at.body.helpers.add("clamp")
    return _reduce(placed.with_text(f"clamp({sign} * ({y} - {x}) + {at.number(margin)}, 0)"), reduction)


@operation("F.hinge_embedding_loss")
def hinge_embedding_loss(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    margin: Any = 1.0,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    (x, y), placed = operands(at, [input, target])
    at.body.helpers.add("clamp")
    apart = f"jnp.where({y} != 1, clamp({at.number(margin)} - {x}, 0), 0)"
    return _reduce(placed.with_text(f"({apart} + jnp.where({y} != -1, {x}, 0))"), reduction)


@operation("F.poisson_nll_loss")
def poisson_nll_loss(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    log_input: bool = True,
    full: bool = False,
    size_average: None = None,
    eps: Any = 1e-8,
    reduce: None = None,
    reduction: str = "mean",
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    (x, y), placed = operands(at, [input, target])
    text = f"jnp.exp({x}) - {y} * {x}" if log_input else f"{x} - {y} * jnp.log({x} + {at.number(eps)})"
    if full:  # Stirling's approximation of the factorial
        many = f"jnp.maximum({y}, 1)"
        text += f" + jnp.where({y} > 1, {y} * jnp.log({many}) - {y} + 0.5 * jnp.log(2 * jnp.pi * {many}), 0)"
    return _reduce(placed.with_text(f"({text})"), reduction)


@operation("F.gaussian_nll_loss")
def gaussian_nll_loss(
    at: Lowering,
    node: Node,
    input: Value,
    target: Value,
    var: Any,
    full: bool = False,
    eps: Any = 1e-6,
    reduction: str = "mean",
) -> Placed:
    if isinstance(var, Value) and len(var.shape) != len(input.shape):
        raise RefusedError("F.gaussian_nll_loss with fewer axes in var; use var.unsqueeze(-1)")
    (x, y, *more), placed = operands(at, [input, target, *([var] if isinstance(var, Value) else [])])
    if more:  # torch raises small variances without a derivative
        given = at.variable(more[0], node.source)
        spread = at.variable(
            f"{given} + jax.lax.stop_gradient(jnp.maximum({given}, {at.number(eps)}) - {given})", node.source
        )
    else:
        spread = at.variable(f"jnp.maximum({at.number(var)}, {at.number(eps)})", node.source)
    text = f"0.5 * (jnp.log({spread}) + jnp.square({x} - {y}) / {spread})"
    text = f"({text} + 0.5 * jnp.log(2 * jnp.pi))" if full else text
    return _reduce(placed.with_text(text), reduction)


@operation("cosine_embedding_loss")
def cosine_embedding_loss(
    at: Lowering,
    node: Node,
    input1: Value,
    input2: Value,
    target: Value,
    margin: Any = 0.0,
    size_average: None = None,
    reduce: None = None,
    reduction: str = "mean",
) -> Placed:
    _no_old_settings(node, size_average, reduce)
    (x, y), placed = operands(at, [input1, input2])
    where = f"axis={axis_text(placed, (placed.rank - 1,))}"
    squares = " * ".join(f"(jnp.sum(jnp.square({one}), {where}) + 1e-12)" for one in (x, y))
    cosine = at.variable(f"(jnp.sum({x} * {y}, {where}) / jnp.sqrt({squares}))", node.source)
    at.body.helpers.add("clamp")
    apart = f"clamp({cosine} - {at.number(margin)}, 0)"
    text = f"jnp.where({at.in_torch_order(target)} == 1, 1 - {cosine}, {apart})"
    return _reduce(Placed(text, tuple(range(placed.rank - 1))), reduction)
