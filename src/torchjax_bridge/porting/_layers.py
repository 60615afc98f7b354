"""Calls of torch's own layers: the order of axes that the Flax twin wants, and the order of what it gives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchjax_bridge.recording import Node, Value, is_leaf, tensors_of

from ._attributes import is_container, tied_bias
from ._lowering import Lowering
from ._masks import is_blocking
from ._placed import Placed, RefusedError, channels_last, torch_order

__all__ = ["call_layer", "is_layer"]

Call = Callable[[Lowering, Node, Any, str, Value], Placed]


def is_layer(module: nn.Module) -> bool:
    """Whether a module becomes one Flax layer: a layer of torch's own, or a subclass that computes the same."""
    return is_leaf(module)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a layer normalizes with statistics that it averages in training."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def call_layer(at: Lowering, node: Node) -> Placed | list[Placed]:
    """The call of a layer's twin."""
    module = node.module
    owner = at.model.tied_owner(node.path)
    path = node.path
    if owner is not None and not isinstance(module, nn.Embedding):
        return _tied(at, node, owner)
    if owner is not None and at.model.to == "linen":
        path = _embedding_of(at, owner)
    elif owner is not None:
        at.model.share(node.path, "embedding", owner)
    me = at.attribute(path)
    inputs = [*node.args, *node.kwargs.values()]
    for kinds, call in _CALLS:
        if isinstance(module, kinds):
            at.model.twin(node.path, module)  # refused here, where it is called, if there is none
            return call(at, node, module, me, inputs[0])
    at.model.twin(node.path, module)  # which may say why it has none
    raise RefusedError(
        f"nn.{type(module).__name__} has no Flax counterpart that a port could call; keep it in torch with "
        "as_jax_module"
    )


def _embedding_of(at: Lowering, owner: str) -> str:
    """The Embedding that owns a weight: in linen, where layers share none, it is called in the other's place."""
    path = owner.rpartition(".")[0]
    if not isinstance(at.model.modules[path], nn.Embedding):
        raise RefusedError(f"an Embedding shares the weight of '{path}', which linen can give no Embedding")
    at.model.called_layers.add(path)
    return path


def _tied(at: Lowering, node: Node, owner: str) -> Placed:
    """A Linear whose weight is another layer's: the product is written out, so that the weight stays one."""
    module = node.module
    if not isinstance(module, nn.Linear):
        raise RefusedError(
            f"'{node.path}' shares its weight with '{owner}'; only a Linear or an Embedding can"
        )
    parameter = at.model.parameters[owner]
    kernel = at.parameter(parameter)
    value = node.args[0]
    rank = len(value.shape)
    placed = at.in_torch_map_order(value)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    text = kernel.text if kernel.order == (1, 0) else f"{kernel.text}.T"
    product = f"{at.read(value, order)} @ {text}"
    if module.bias is not None and f"{node.path}.bias" in at.model.tied_parameters:
        bias = at.model.parameters[at.model.tied_parameters[f"{node.path}.bias"]]
        product += f" + {at.parameter(bias).text}"
    elif module.bias is not None:
        holder, _, name = node.path.rpartition(".")
        if any(
            is_container(at.model.modules[holder], kind)
            for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        ):
            raise RefusedError(
                f"'{node.path}' shares its weight with '{owner}', and its own bias has no place in a list"
            )
        product += f" + {at.attribute(holder)}.{tied_bias(name)}[...]"
    return Placed(f"({product})", order)


def _features_last(at: Lowering, value: Value) -> tuple[str, Placed]:
    rank = len(value.shape)
    placed = at.in_torch_map_order(value)
    order = placed.order if placed.order[-1] == rank - 1 else torch_order(rank)
    return at.read(value, order), Placed("", order)


def _linear(at: Lowering, node: Node, module: nn.Linear, me: str, value: Value) -> Placed:
    placed = at.at(value)
    is_first = at.model.flattened.get(node.path, placed.map_shape) == placed.map_shape
    if placed.map_axis is not None and placed.map_axis == placed.rank - 1 and is_first:
        at.model.note_map(node.path, placed.map_shape)
        return Placed(f"{me}({placed.text})", placed.order)
    at.model.note_map(node.path, None)
    text, result = _features_last(at, value)
    return result.with_text(f"{me}({text})")


def _last_axis(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed:
    if len(module.normalized_shape) == 1:
        at.model.note_map(node.path, None)
        text, result = _features_last(at, value)
        return result.with_text(f"{me}({text})")
    return Placed(f"{me}({at.in_torch_order(value)})", torch_order(len(value.shape)))


def _channels_last(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed:
    rank = len(value.shape)
    space = next((int(digit) for digit in type(module).__name__ if digit.isdigit()), None)
    if space is not None and rank != space + 2:
        raise RefusedError(f"'{node.path}' is given {rank} axes, without a batch; add the axis with x[None]")
    order = channels_last(rank)
    return Placed(f"{me}({at.read(value, order)})", order)


def _batch_norm(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed:
    keywords = "".join(
        f", {name}={given!r}" for name, given in at.model.call_settings(node.path, module).items()
    )
    placed, order = at.at(value), channels_last(len(value.shape))
    if placed.rank == 2 and placed.order == order:
        at.model.note_map(node.path, placed.map_shape if placed.map_axis is not None else None)
        return placed.with_text(f"{me}({placed.text}{keywords})")
    return Placed(f"{me}({at.read(value, order)}{keywords})", order)


def _convolution(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed:
    if len(value.shape) != len(module.kernel_size) + 2:
        raise RefusedError("a convolution of an input without a batch; add the axis with x[None]")
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and len(node.args) + len(node.kwargs) > 1:
        raise RefusedError(f"'{node.path}' is called with output_size; set output_padding instead")
    order = channels_last(len(value.shape))
    text = at.read(value, order)
    pad = at.model.twin(node.path, module).pad
    if pad is not None:
        text = pad.source(text)
    return Placed(f"{me}({text})", order)


def _embedding(at: Lowering, node: Node, module: nn.Embedding, me: str, value: Value) -> Placed:
    placed = at.in_torch_map_order(value)
    return Placed(f"{me}({placed.text})", (*placed.order, placed.rank))


def _elementwise(at: Lowering, node: Node, module: nn.Module, me: str, value: Value) -> Placed:
    placed = at.at(value)
    return placed.with_text(f"{me}({placed.text})")


def _prelu(at: Lowering, node: Node, module: nn.PReLU, me: str, value: Value) -> Placed:
    if module.num_parameters == 1:
        return _elementwise(at, node, module, me, value)
    return _channels_last(at, node, module, me, value)


def _dropout(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed:
    placed = at.at(value)
    if isinstance(module, nn.Dropout) or module.p == 0:
        return placed.with_text(f"{me}({placed.text})")
    return _channels_last(at, node, module, me, value)


def _attention(
    at: Lowering, node: Node, module: nn.MultiheadAttention, me: str, value: Value
) -> list[Placed]:
    names = (
        *("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights"),
        "is_causal",
    )
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weights = node.result[1]
    query, key, value = given["query"], given["key"], given["value"]
    if len(query.shape) != 3:
        raise RefusedError(f"'{node.path}' is given inputs without a batch; add the axis with x[None]")
    order = (0, 1, 2) if module.batch_first else (1, 0, 2)
    same = query is key and key is value
    texts = [at.read(query, order)] if same else [at.read(tensor, order) for tensor in (query, key, value)]
    masks, added = list[str](), list[str]()
    for name, shape in (("attn_mask", ""), ("key_padding_mask", "[:, None, None, :]")):
        mask = given.get(name)
        if mask is None:
            continue
        allowed = _allowed(at, mask)
        text = allowed or at.in_torch_order(mask)
        if len(mask.shape) == 3:
            text = f"{text}.reshape(-1, {module.num_heads}, *{text}.shape[1:])"
        (added if allowed is None else masks).append(text + shape)
    mask_text = f", mask={' & '.join(masks)}" if masks else ""
    reads_weights = isinstance(weights, Value) and weights.uses
    if not (added or reads_weights):
        called = Placed(f"{me}({', '.join(texts)}{mask_text})", order)
        return [
            called,
            *([Placed("None", torch_order(len(weights.shape)))] if isinstance(weights, Value) else []),
        ]
    if at.model.to == "linen":
        what, instead = "weights are read", "write the attention out"
        if not reads_weights:
            what = "scores are added to"
            instead = "pass a mask of booleans, or use F.scaled_dot_product_attention"
        raise RefusedError(
            f"the attention {what} in '{node.path}', which is translated for nnx alone; port to nnx, or {instead}"
        )
    at.body.helpers.add("attend")
    bias_text = f", bias={' + '.join(added)}" if added else ""
    both = at.variable(
        f"attend({me}, {', '.join(texts if len(texts) == 3 else texts * 3)}{mask_text}{bias_text})",
        node.source,
        "tuple",
    )
    called = Placed(f"{both}[0]", order)
    if not isinstance(weights, Value):
        return [called]
    mean = ".mean(1)" if len(weights.shape) == 3 else ""
    return [called, Placed(f"{both}[1]{mean}", torch_order(len(weights.shape)))]


def _allowed(at: Lowering, mask: Value) -> str | None:
    """What may be attended to, of a mask of what may not: true, or minus infinity. None for other numbers."""
    text = at.in_torch_order(mask)
    if mask.dtype == torch.bool:
        return f"(~{text})"
    return f"({text} == 0)" if is_blocking(mask, at.model.outer) else None


def _recurrent(at: Lowering, node: Node, module: Any, me: str, value: Value) -> list[Placed]:
    """An RNN: as one call where its outputs alone are read and it starts from zeros, else layer by layer."""
    outputs, *given_states = node.result
    states = list(tensors_of(given_states))
    starts = list(
        tensors_of((node.args[1:], {name: v for name, v in node.kwargs.items() if name != "input"}))
    )
    at.model.twin(node.path, module)
    packed = None if isinstance(value, Value) else at.model.packed.get(value.data)
    if packed is None and (not isinstance(value, Value) or len(value.shape) != 3):
        raise RefusedError(f"'{node.path}' is given no batch; pass a padded batch, as x[None] is one")
    order = (0, 1, 2) if module.batch_first else (1, 0, 2)
    text, lengths = (at.read(value, order), "") if packed is None else packed[:2]
    lengths = lengths and f", seq_lengths={lengths}"
    if packed is None and not starts and not any(state.uses for state in states):
        none = [Placed("None", torch_order(len(state.shape))) for state in states]
        return [Placed(f"{me}({text})", order), *none]
    if module.num_layers > 1 and at.model.to == "linen":
        raise RefusedError(
            f"'{node.path}' has a state that is read or given, or a packed sequence, and linen's Sequential "
            f"of {module.num_layers} layers takes and gives neither; read the last output, or write one after "
            "the other"
        )
    lstm, directions = isinstance(module, nn.LSTM), 2 if module.bidirectional else 1
    step = 2 if module.dropout else 1
    carries: list[str] = []
    for layer in range(module.num_layers):
        own = f"{me}.layers[{layer * step}]" if module.num_layers > 1 else me
        first = ["({1}[{0}], {2}[{0}])" if lstm else "{1}[{0}]" for _ in range(directions)]
        given = [f"{at.in_torch_order(start)}{_sorted(at, value, 'sorted_indices')}" for start in starts]
        names = given[::-1]  # torch's state is (h, c), that of Flax (c, h)
        start = (
            [one.format(layer * directions + place, *names) for place, one in enumerate(first)]
            if given
            else []
        )
        carry = (
            f", initial_carry={start[0] if directions == 1 else f'({start[0]}, {start[1]})'}" if start else ""
        )
        if layer and module.dropout:
            text = f"{me}.layers[{layer * step - 1}]({text})"
        both = at.variable(f"{own}({text}{carry}{lengths}, return_carry=True)", node.source, "tuple")
        carries += [f"{both}[0]"] if directions == 1 else [f"{both}[0][0]", f"{both}[0][1]"]
        text = f"{both}[1]"
    stacked = [
        f"{carries[0]}{name}[None]"
        if len(carries) == 1
        else f"jnp.stack([{', '.join(c + name for c in carries)}])"
        for name in (("[1]", "[0]") if lstm else ("",))
    ]
    carried = [Placed(f"{state}{_sorted(at, value, 'unsorted_indices')}", (0, 1, 2)) for state in stacked]
    if packed is None:
        return [Placed(text, order), *carried]
    at.model.packed[outputs.data] = text, packed[1], packed[2]
    given_order = [at.at(part) for part in tensors_of(tuple(value)[2:])]
    return [at.nowhere(2), at.nowhere(1), *given_order, *carried]


def _sorted(at: Lowering, value: Any, name: str) -> str:
    """The index of the batch of a state, where a packed sequence has another order than the caller's."""
    indices = None if isinstance(value, Value) else getattr(value, name)
    return "" if indices is None else f"[:, {at.in_torch_order(indices)}]"


def _cell(at: Lowering, node: Node, module: Any, me: str, value: Value) -> Placed | list[Placed]:
    """One step of an RNN; without a state it starts from zeros."""
    if len(value.shape) != 2:
        raise RefusedError(f"'{node.path}' is given an input without a batch; add the axis with x[None]")
    x = at.in_torch_order(value)
    starts = [at.in_torch_order(start) for start in list(tensors_of((node.args, node.kwargs)))[1:]]
    lstm = isinstance(module, nn.LSTMCell)
    zeros = f"jnp.zeros(({x}.shape[0], {module.hidden_size}))"
    carry = f"({', '.join(starts[::-1] or [zeros, zeros])})" if lstm else (starts or [zeros])[0]
    if not lstm:
        return Placed(f"{me}({carry}, {x})[1]", (0, 1))
    both = at.variable(f"{me}({carry}, {x})", node.source, "tuple")
    return [Placed(f"{both}[0][1]", (0, 1)), Placed(f"{both}[0][0]", (0, 1))]


_CALLS: tuple[tuple[Any, Any], ...] = (
    (nn.Linear, _linear),
    (nn.modules.batchnorm._BatchNorm, _batch_norm),
    (nn.modules.conv._ConvNd, _convolution),
    ((nn.GroupNorm, nn.modules.instancenorm._InstanceNorm), _channels_last),
    ((nn.LayerNorm, nn.RMSNorm), _last_axis),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.modules.dropout._DropoutNd, _dropout),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
)
