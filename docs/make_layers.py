"""Writes docs/layers.md from the table of rules. Run ``python docs/make_layers.py`` after changing a rule."""

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as ln
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from torchjax_bridge.errors import SettingsError
from torchjax_bridge.weights import Plan, layers, plan, twin_of
from torchjax_bridge.weights.rules import PLAIN, Rule

PAGE = pathlib.Path(__file__).with_name("layers.md")

HEAD = """<!-- Written by docs/make_layers.py from the table of rules; do not edit. -->

# Layers

What `to_flax` and `to_state_dict` know about the layers of `torch.nn`: which tensor becomes which leaf, in which
layout, and which settings the Flax layer needs to compute the same.

- **Reading a table.** Shapes are those of an example. A layout reads from torch to Flax; its exact inverse converts
  back. In linen, statistics and `u` are in the collection `batch_stats`, all others in `params`.
- **A layer of your own** needs [a rule of your own](porting.md#a-layer-of-your-own).
- **Layers without tensors** (activations, pooling, dropout) need no rule, but have settings; see [Known
  differences](known-differences.md).
- **Additional Flax layers.** Flax's own layers cannot express all of torch's semantics.
  `torchjax_bridge.weights.layers` has `nnx.BatchNorm` and `linen.BatchNorm` with torch's unbiased running variance,
  `nnx.GRUCell` with all biases, `nnx.LayerNorm` and `nnx.RMSNorm` with a scale of several axes, and `nnx.PReLU` and
  `linen.PReLU` with a slope for each channel. They have the names of Flax's layers and can replace them.
- **Lossy** layouts make one leaf of several torch tensors, such as the sum of a recurrent layer's two biases. If
  the leaf is unchanged and the template is the original module, the tensors come back bit for bit. Otherwise a
  sum comes back as the sum and zero.
"""

COMPUTED = """## weight_norm and spectral_norm

They are supported on any tensor of any layer above, as hooks (`torch.nn.utils.weight_norm`) or as parametrizations
(`torch.nn.utils.parametrizations.weight_norm`). By default the plain Flax layer gets the weight of evaluation. On
the way back, the parts of the torch template stay if they still give this weight. Otherwise (the weight was
trained, or the template is on the meta device) the new parts are the weight and its norm, or the weight and its
singular vectors, which give the same weight. linen's wrappers keep the parts apart. So does `nnx.WeightNorm`, with
the sign of `g` in its kernel. `nnx.SpectralNorm` is refused. Any other parametrization, and pruning, is refused;
the message names the call that keeps its result.
"""

CONTAINERS = """## Composed layers and raw tensors

`Sequential`, `ModuleList`, `ModuleDict`, `TransformerEncoderLayer`, `TransformerDecoderLayer`,
`TransformerEncoder`, `TransformerDecoder`, `Transformer` and modules of your own have no rule: their children are
paired by name, by position, or because only one fits. Raw parameters and buffers cross unchanged, by name. A
`ParameterList` or `ParameterDict` is an `nnx.List` or `nnx.Dict`; in linen `scales.0` is the parameter `scales_0`
of the module.

A raw tensor may be a buffer on one side and a parameter on the other; the plan notes it. Layers that are stacked
for a scan are stacked along the first axis; a `PairingWarning` names them if another axis would fit as well.

A subclass follows the rule of its nearest ancestor. If it has its own `forward`, or if a layer has hooks, it may
compute something else, so it converts with a `PairingWarning`. To settle it, pass `LayerType("path", nn.Linear)`
if it computes what `nn.Linear` does, or else a `Rule` for the subclass. A subclass of a Flax layer with its own
`__call__` gives the same warning: always in an nnx module, in linen's variables only under an automatic name
(`Scaled_0`). `audit` with the linen module always detects it.

A layer of `torch.nn` with tensors and without a rule is refused; the message shows the rule to pass. These are
refused with a reason: `proj_size` of an LSTM, `add_bias_kv` and `add_zero_attn` of attention, `max_norm` of an
embedding, groups in Flax's `ConvTranspose`, a biased GRU in `nnx.GRUCell`.
"""


@dataclass(frozen=True)
class Example:
    """A torch layer with its linen and nnx counterparts."""

    torch: Callable[[], nn.Module]
    linen: ln.Module | None
    nnx: Callable[[nnx.Rngs], nnx.Module] | None
    shapes: tuple[tuple[int, ...], ...]
    title: str = ""
    settings: tuple[tuple[str, Any], ...] = ()

    def plans(self) -> Iterator[tuple[str, Plan]]:
        """The plan for linen and for nnx."""
        module = self.torch()
        if self.linen is not None:
            linen, settings = self.linen, dict(self.settings)
            dtype = jnp.int32 if isinstance(linen, ln.Embed) else jnp.float32
            xs = [jnp.zeros(shape, dtype) for shape in self.shapes]
            yield (
                "linen",
                plan(module, jax.eval_shape(lambda: linen.init(jax.random.key(0), *xs, **settings))),
            )
        if self.nnx is not None:
            make = self.nnx
            yield "nnx", plan(module, nnx.eval_shape(lambda: make(nnx.Rngs(0))))


class LinenBilinear(ln.Module):
    """The parameters of a bilinear layer."""

    @ln.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        weight = self.param("weight", ln.initializers.zeros, (4, x.shape[-1], y.shape[-1]))
        bias = self.param("bias", ln.initializers.zeros, (4,))
        return jnp.einsum("...i,oij,...j->...o", x, weight, y) + bias


class NnxBilinear(nnx.Module):
    """The parameters of a bilinear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.weight, self.bias = nnx.Param(jnp.zeros((4, 3, 2))), nnx.Param(jnp.zeros(4))


def _norm(kind: str, **settings: Any) -> tuple[ln.Module, Callable[[nnx.Rngs], nnx.Module]]:
    return getattr(ln, kind)(**settings), lambda rngs: getattr(nnx, kind)(4, rngs=rngs, **settings)


def _rnn(cell: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.RNN(cell(3, 2, rngs=rngs))


IMAGE, SEQUENCE = ((1, 8, 8, 4),), ((1, 5, 3),)

EXAMPLES = (
    Example(lambda: nn.Linear(3, 4), ln.Dense(4), lambda rngs: nnx.Linear(3, 4, rngs=rngs), ((1, 3),)),
    Example(
        lambda: nn.Linear(6, 8),
        ln.DenseGeneral((2, 4)),
        lambda rngs: nnx.LinearGeneral(6, (2, 4), rngs=rngs),
        ((1, 6),),
        "with heads",
    ),
    Example(
        lambda: nn.Linear(8, 6),
        None,
        lambda rngs: nnx.Einsum("BTNH,NHD->BTD", (2, 4, 6), (6,), rngs=rngs),
        (),
        "over heads, as an einsum",
    ),
    Example(
        lambda: nn.Linear(6, 8),
        ln.Conv(8, (1, 1)),
        lambda rngs: nnx.Conv(6, 8, (1, 1), rngs=rngs),
        ((1, 4, 4, 6),),
        "as a 1x1 convolution",
    ),
    Example(lambda: nn.Bilinear(3, 2, 4), LinenBilinear(), NnxBilinear, ((1, 3), (1, 2))),
    Example(
        lambda: nn.Conv2d(4, 6, (3, 5), groups=2),
        ln.Conv(6, (3, 5), feature_group_count=2),
        lambda rngs: nnx.Conv(4, 6, (3, 5), feature_group_count=2, rngs=rngs),
        IMAGE,
        "with groups=2",
    ),
    Example(
        lambda: nn.ConvTranspose2d(4, 6, (3, 5)),
        ln.ConvTranspose(6, (3, 5), transpose_kernel=True),
        lambda rngs: nnx.ConvTranspose(4, 6, (3, 5), transpose_kernel=True, rngs=rngs),
        IMAGE,
        "with transpose_kernel=True in Flax",
    ),
    Example(
        lambda: nn.ConvTranspose2d(4, 6, (3, 5)),
        ln.ConvTranspose(6, (3, 5)),
        lambda rngs: nnx.ConvTranspose(4, 6, (3, 5), rngs=rngs),
        IMAGE,
        "with transpose_kernel=False in Flax",
    ),
    Example(
        lambda: nn.ConvTranspose2d(4, 6, (3, 5), groups=2),
        ln.Conv(6, (3, 5), padding=((2, 2), (4, 4)), feature_group_count=2),
        lambda rngs: nnx.Conv(4, 6, (3, 5), padding=((2, 2), (4, 4)), feature_group_count=2, rngs=rngs),
        IMAGE,
        "with groups=2, as a Flax Conv",
    ),
    Example(lambda: nn.BatchNorm2d(4), *_norm("BatchNorm", use_running_average=True), IMAGE),
    Example(
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        *_norm("BatchNorm", use_running_average=False),
        IMAGE,
        "with track_running_stats=False",
    ),
    Example(lambda: nn.LayerNorm(4), *_norm("LayerNorm"), ((1, 4),)),
    Example(
        lambda: nn.LayerNorm((4, 8, 9)),
        ln.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
        None,
        ((1, 8, 9, 4),),
        "over (C, H, W), channels last in Flax",
    ),
    Example(lambda: nn.GroupNorm(2, 4), *_norm("GroupNorm", num_groups=2), IMAGE),
    Example(lambda: nn.InstanceNorm2d(4, affine=True), *_norm("InstanceNorm"), IMAGE, "with affine=True"),
    Example(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        *_norm("BatchNorm", use_running_average=True),
        IMAGE,
        "with track_running_stats=True, as a Flax BatchNorm",
    ),
    Example(lambda: nn.RMSNorm(4), *_norm("RMSNorm"), ((1, 4),)),
    Example(lambda: nn.Embedding(10, 4), ln.Embed(10, 4), lambda rngs: nnx.Embed(10, 4, rngs=rngs), ((1,),)),
    Example(
        lambda: nn.EmbeddingBag(10, 4), ln.Embed(10, 4), lambda rngs: nnx.Embed(10, 4, rngs=rngs), ((1,),)
    ),
    Example(
        lambda: nn.MultiheadAttention(6, 2),
        ln.MultiHeadDotProductAttention(2),
        lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs),
        ((1, 5, 6),),
    ),
    Example(
        lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=3, bias=False),
        ln.MultiHeadDotProductAttention(2, use_bias=False),
        None,
        ((1, 5, 6), (1, 5, 4), (1, 5, 3)),
        "with kdim, vdim and bias=False",
    ),
    Example(lambda: nn.LSTM(3, 2), ln.RNN(ln.LSTMCell(2)), _rnn(nnx.OptimizedLSTMCell), SEQUENCE),
    Example(
        lambda: nn.LSTM(3, 2, bias=False),
        None,
        _rnn(nnx.OptimizedLSTMCell),
        SEQUENCE,
        "with bias=False",
    ),
    Example(lambda: nn.LSTMCell(3, 2), None, lambda rngs: nnx.LSTMCell(3, 2, rngs=rngs), ()),
    Example(
        lambda: nn.GRU(3, 2, bidirectional=True),
        None,
        lambda rngs: nnx.Bidirectional(*(_rnn(layers.nnx.GRUCell)(rngs) for _ in range(2))),
        SEQUENCE,
        "with bidirectional=True, in our nnx GRUCell",
    ),
    Example(lambda: nn.GRU(3, 2), ln.RNN(ln.GRUCell(2)), None, SEQUENCE),
    Example(
        lambda: nn.GRUCell(3, 2, bias=False),
        None,
        lambda rngs: nnx.GRUCell(3, 2, rngs=rngs),
        (),
        "with bias=False",
    ),
    Example(lambda: nn.RNN(3, 2), ln.RNN(ln.SimpleCell(2)), _rnn(nnx.SimpleCell), SEQUENCE),
    Example(lambda: nn.RNNCell(3, 2), None, lambda rngs: nnx.SimpleCell(3, 2, rngs=rngs), ()),
    Example(lambda: nn.PReLU(), ln.PReLU(), lambda rngs: nnx.PReLU(), ((1,),)),
    Example(
        lambda: nn.PReLU(4),
        layers.linen.PReLU(4),
        lambda rngs: layers.nnx.PReLU(4),
        ((1, 4),),
        "with a slope a channel, in our PReLU",
    ),
)

PARTS = (
    Example(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        ln.Dense(4),
        lambda rngs: nnx.Linear(3, 4, rngs=rngs),
        ((1, 3),),
        "Linear under weight_norm",
    ),
    Example(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        ln.WeightNorm(ln.Dense(4)),
        None,
        ((1, 3),),
        "Linear under weight_norm, in linen's WeightNorm",
    ),
    Example(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        ln.Dense(4),
        lambda rngs: nnx.Linear(3, 4, rngs=rngs),
        ((1, 3),),
        "Linear under spectral_norm",
    ),
    Example(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        ln.SpectralNorm(ln.Dense(4)),
        None,
        ((1, 3),),
        "Linear under spectral_norm, in linen's SpectralNorm",
        (("update_stats", False),),
    ),
)


def page() -> str:
    """The whole page."""
    torch.manual_seed(0)
    parts = [HEAD]
    for rule in PLAIN:
        parts.append(f"## {rule.name}\n")
        if rule.flax_types:
            parts.append(f"In Flax: {', '.join(f'`{name}`' for name in rule.flax_types)}.\n")
        parts.append(f"Settings: {_text(rule.settings)}.\n")
        parts += _twins(rule)
        parts += [_tables(example) for example in examples_of(rule)]
    parts.append(COMPUTED)
    parts += [_tables(example) for example in PARTS]
    parts.append(CONTAINERS)
    return "\n".join(parts)


def _twins(rule: Rule) -> list[str]:
    """The constructor of the first example's twin, or why it has none."""
    module = examples_of(rule)[0].torch()
    name = type(module).__name__
    try:
        return [f"`twin_of`, for the first `{name}` below: `{twin_of(module)}`.\n"]
    except SettingsError as why:
        return [f"`twin_of` refuses it: {_text(str(why))}\n"]


def examples_of(rule: Rule) -> list[Example]:
    """The examples of the layers to which a rule applies."""
    return [example for example in EXAMPLES if type(example.torch()) in rule.types]


def _tables(example: Example) -> str:
    """One table, or a table each for linen and nnx if they differ."""
    found: dict[str, list[str]] = {}
    for flavour, example_plan in example.plans():
        assert example_plan.ok, example_plan
        found.setdefault(_rows(example, example_plan), []).append(flavour)
    name = example.title or type(example.torch()).__name__
    title = (
        f"{type(example.torch()).__name__} {example.title}"
        if example.title.startswith(("with", "over", "as a"))
        else name
    )
    return "\n".join(f"**{title}** ({' and '.join(who)})\n\n{rows}" for rows, who in found.items())


def _rows(example: Example, example_plan: Plan) -> str:
    state = example.torch().state_dict()
    lines = ["| torch | Flax | layout |", "|---|---|---|"]
    for move in example_plan.moves:
        tensors = " + ".join(f"`{key}` {tuple(state[key].shape)}" for key in move.torch_keys) or "(nothing)"
        leaves = ", ".join(_leaf(path, example_plan.flavour) for path in move.flax_paths)
        lines.append(f"| {tensors} | {leaves} | {_text(str(move.layout))} |")
    lines += [f"| `{key}` | (stays in torch) | |" for key in example_plan.torch_only]
    notes = dict.fromkeys(move.note for move in example_plan.moves if move.note)
    return "\n".join([*lines, "", *(f"Note: {_text(note)}.\n" for note in notes)])


def _leaf(path: tuple[str | int, ...], flavour: str) -> str:
    inside = path[1:] if flavour == "linen" else path
    return f"`{'.'.join(map(str, inside))}`"


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(page())
