"""Recurrent layers and their cells.

torch stacks the gates of a cell in one ``weight_ih (gates * hidden, input)`` and one ``weight_hh (gates *
hidden, hidden)``, in the order i, f, g, o for an LSTM and r, z, n for a GRU, each with a bias of its own (the
formulas of https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html and ``GRU.html``). linen keeps a
kernel a gate (``ii``, ``hi``, ...; ``i`` and ``h`` in a ``SimpleCell``); nnx does so in its ``LSTMCell``
(``if_`` for ``if``) and stacks them (``dense_i``, ``dense_h``) in its other cells, in torch's order. torch
adds its two biases, so Flax has one: their sum. The way back splits the sum as before if it is still the same
(`Sum`). Only the GRU's n gate keeps both, since one of them is inside the reset. ``nnx.GRUCell`` has no place
for it, so in nnx a GRU with biases needs the ``GRUCell`` of `torchjax_bridge.weights.layers`.

A torch layer is one cell, or ``num_layers`` times one or two directions of cells. Its Flax twin is a cell, an
``RNN`` or ``Bidirectional`` around cells, a list of those, or a scope with numbered cells; for two directions they
are called forward and backward. linen names a cell in the scope where its ``RNN`` is made (``LSTMCell_0``, ...).
Those numbers count layer by layer, forward before backward.

Settings for parity: ``features``; ``activation_fn=nn.relu`` for ``RNN(nonlinearity="relu")``;
``reverse=True, keep_order=True`` for a lone backward ``RNN``; ``time_major`` unless ``batch_first``. The carry
of an LSTM is ``(c, h)`` in Flax and ``(h, c)`` in torch. ``proj_size`` has no counterpart and is refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from torchjax_bridge.exchange import Path, join_path

from ..layouts import Constant, Each, Layout, Permute, Split, Sum, then
from ._flattened import channels_last
from ._recurrent_twins import cell_twin, layer_twin
from ._rule import Entry, Layer, Rule

__all__ = ["CELL_MARKS", "RULES"]


@dataclass(frozen=True)
class GateBiases(Layout):
    """The two biases ``(3 * hidden,)`` of a GRU as the four of linen's cell: sums for r and z, both for n."""

    is_view = False
    lossless = False

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(b_ih, b_hh)`` to the biases of ``ir``, ``iz``, ``in`` and ``hn``."""
        (in_r, in_z, in_n), (rec_r, rec_z, rec_n) = _gates(tensors)
        (r,), (z,) = Sum().forward((in_r, rec_r)), Sum().forward((in_z, rec_z))
        return r, z, in_n, rec_n

    def inverse(self, tensors: Sequence[Tensor], was: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The biases of ``ir``, ``iz``, ``in`` and ``hn`` to ``(b_ih, b_hh)``; see `Sum` for the sums."""
        r, z, in_n, rec_n = tensors
        before: list[tuple[Tensor, ...] | None] = [None, None]
        if was is not None:
            before[:] = list(zip(*_gates(was), strict=True))[:2]
        (in_r, rec_r), (in_z, rec_z) = (
            Sum().inverse((total,), terms) for total, terms in zip((r, z), before, strict=True)
        )
        return Split(3).inverse((in_r, in_z, in_n)) + Split(3).inverse((rec_r, rec_z, rec_n))

    def __str__(self) -> str:
        return "split in 3, sum of two for r and z (lossy)"


def _gates(biases: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return [Split(3).forward((bias,)) for bias in biases]


# --- which cell is which -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """What a kind of cell calls its gates.

    Attributes:
        kind: The torch class.
        gates: The letters of the gates, in torch's order; one empty letter for a cell without gates.
    """

    kind: str
    gates: tuple[str, ...]

    def kernels(self, side: str) -> tuple[str, ...]:
        """The kernels that read the input (``"i"``) or the state (``"h"``), as linen calls them."""
        return tuple(side + gate for gate in self.gates)

    @property
    def marks(self) -> frozenset[str]:
        """The kernels by which a scope is recognised as such a cell, with one kernel a gate or stacked."""
        return frozenset({self.kernels("h")[0], "dense_h"})


_LSTM = _Family("LSTM", ("i", "f", "g", "o"))
_GRU = _Family("GRU", ("r", "z", "n"))
_RNN = _Family("RNN", ("",))

CELL_MARKS = _LSTM.marks | _GRU.marks | _RNN.marks
"""The kernels by which a scope is recognised as a cell of some kind."""


def _entries_of(family: _Family) -> Callable[[Layer], Iterable[Entry]]:
    def entries(layer: Layer) -> Iterable[Entry]:
        suffixes = _suffixes(layer)
        _check(family, layer, suffixes)
        directions = 2 if any(suffix.endswith("_reverse") for suffix in suffixes) else 1
        cells, note = _order_cells(_cells(family, layer), len(suffixes) // directions, directions)
        for suffix, cell in zip(suffixes, cells, strict=True):
            for entry in _cell(family, layer, suffix, cell):
                if layer.features and entry.torch_names == (f"weight_ih{suffix}",) and suffix in _FIRST:
                    rows = layer.torch[f"weight_ih{suffix}"].shape[0]
                    columns = channels_last(layer.features, before=(rows,))
                    entry = replace(entry, layout=then(columns, entry.layout))
                yield replace(entry, note=entry.note or note)
                note = ""

    return entries


_FIRST = ("", "_l0", "_l0_reverse")  # what reads the input of the whole layer


def _suffixes(layer: Layer) -> list[str]:
    """``_l0``, ``_l0_reverse``, ``_l1``, ... of a layer, or nothing of a cell, in torch's order."""
    found = [name.removeprefix("weight_ih") for name in layer.torch if name.startswith("weight_ih")]
    return sorted(found, key=lambda suffix: (int("0" + re.sub(r"\D", "", suffix)), suffix))


def _check(family: _Family, layer: Layer, suffixes: Sequence[str]) -> None:
    if any(name.startswith("weight_hr") for name in layer.torch):
        raise ValueError("proj_size projects the hidden state, which no Flax cell does")
    for suffix in suffixes:
        size, hidden = layer.torch[f"weight_hh{suffix}"].shape
        if size != hidden * len(family.gates):
            raise ValueError(f"weight_hh{suffix} ({size}, {hidden}) has not the {len(family.gates)} gates")


def _cells(family: _Family, layer: Layer) -> list[Path]:
    """Every scope at or below this one that holds the kernels of such a cell."""
    return [
        path[:-2]
        for path in layer.flax
        if path[-1] == "kernel" and len(path) > 1 and path[-2] in family.marks
    ]


_DIRECTION = re.compile(r"_?(forward|fwd|backward|bwd|reverse)_?")
_BACKWARD = frozenset({"backward", "bwd", "reverse"})


def _order_cells(cells: Sequence[Path], layers: int, directions: int) -> tuple[list[Path], str]:
    """The cells layer by layer, forward before backward, and a note if only numbers gave that order.

    Raises if the names do not say which is which.
    """
    count = layers * directions
    if len(cells) != count:
        wanted = "1 cell" if count == 1 else f"{count} cells ({layers} layers, {directions} directions)"
        raise ValueError(f"it needs {wanted}, and {len(cells)} are there")
    if count == 1:
        return list(cells), ""
    places = {_place(cell): cell for cell in cells}
    numbers = sorted({number for number, _ in places})
    stems = {_DIRECTION.sub("", re.sub(r"\d+", "#", join_path(cell))) for cell in cells}
    if len(stems) == 1 and len(places) == count:
        if len(numbers) == count and not any(backward for _, backward in places):
            turns = ", forward and backward in turn" if directions == 2 else ""
            note = f"the {count} cells are taken in the order of their numbers{turns}"
            return [cell for number in numbers for place, cell in places.items() if place[0] == number], note
        pairs = {(number, bool(backward)): cell for (number, backward), cell in places.items()}
        if directions == 2 and len(numbers) == layers and len(pairs) == count:
            return [pairs[number, backward] for number in numbers for backward in (False, True)], ""
    names = ", ".join(f"'{join_path(cell)}'" for cell in cells)
    one, other = _NAMES[layers > 1, directions > 1]
    raise ValueError(
        f"the names of the cells {names} do not say which layer and direction each is; call them "
        f"'{one}', '{other}' and so on: one name for all, a number for the layer, forward, fwd, backward, bwd or "
        "reverse for the direction"
    )


# Examples, by whether there are several layers and whether there are two directions.
_NAMES = {
    (True, False): ("rnn_0", "rnn_1"),
    (False, True): ("rnn_fwd", "rnn_bwd"),
    (True, True): ("rnn_0_fwd", "rnn_0_bwd"),
}


def _place(cell: Path) -> tuple[tuple[int, ...], bool | None]:
    """The numbers in the path of a cell, and whether its name says backward (None: no direction)."""
    name = join_path(cell)
    words = _DIRECTION.findall(name)
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", name))
    return numbers, any(word in _BACKWARD for word in words) if words else None


# --- one cell ----------------------------------------------------------------------------------------


def _cell(family: _Family, layer: Layer, suffix: str, cell: Path) -> Iterable[Entry]:
    stacked = (*cell, "dense_h", "kernel") in layer.flax
    return (_stacked if stacked else _one_kernel_a_gate)(family, layer, suffix, cell)


def _stacked(family: _Family, layer: Layer, suffix: str, cell: Path) -> Iterable[Entry]:
    """The entries of a cell with stacked gates, as in torch."""
    ours = (f"bias_ih{suffix}", f"bias_hh{suffix}")
    input_bias, state_bias = ((*cell, name, "bias") for name in ("dense_i", "dense_h"))
    yield Entry(f"weight_ih{suffix}", ((*cell, "dense_i", "kernel"),), Permute((1, 0)))
    yield Entry(f"weight_hh{suffix}", ((*cell, "dense_h", "kernel"),), Permute((1, 0)))
    places = tuple(place for place in (input_bias, state_bias) if place in layer.flax)
    if ours[0] not in layer.torch:
        yield from (_zeros(layer, suffix, place) for place in places)
    elif len(places) == 2:
        yield Entry(ours[0], (input_bias,))
        yield Entry(ours[1], (state_bias,))
    elif family is _GRU and places:
        raise ValueError(
            "nnx.GRUCell has no bias on the state, and that of the n gate cannot move elsewhere; use "
            "torchjax_bridge.weights.layers.nnx.GRUCell"
        )
    else:
        yield Entry(ours, places or (state_bias,), Sum())


def _one_kernel_a_gate(family: _Family, layer: Layer, suffix: str, cell: Path) -> Iterable[Entry]:
    """The entries of a cell with one kernel a gate."""
    names = {name: _linen_name(layer, cell, name) for side in "ih" for name in family.kernels(side)}
    one = len(family.gates) == 1
    kernels = Permute((1, 0)) if one else then(Split(len(family.gates)), Each(Permute((1, 0))))
    for side in "ih":
        paths = tuple((*cell, names[name], "kernel") for name in family.kernels(side))
        yield Entry(f"weight_{side}h{suffix}", paths, kernels)
    biased = {_LSTM: _LSTM.kernels("h"), _GRU: ("ir", "iz", "in", "hn"), _RNN: ("i",)}[family]
    places = tuple((*cell, names[name], "bias") for name in biased)
    if f"bias_ih{suffix}" not in layer.torch:
        yield from (_zeros(layer, suffix, place) for place in places if place in layer.flax)
        return
    layout: Layout = {_LSTM: then(Sum(), Split(4)), _GRU: GateBiases(), _RNN: Sum()}[family]
    yield Entry((f"bias_ih{suffix}", f"bias_hh{suffix}"), places, layout)


def _linen_name(layer: Layer, cell: Path, name: str) -> str:
    """The name itself, or ``if_`` in nnx's LSTMCell, since ``if`` is a keyword of Python."""
    return f"{name}_" if (*cell, f"{name}_", "kernel") in layer.flax else name


def _zeros(layer: Layer, suffix: str, place: Path) -> Entry:
    dtype = layer.torch[f"weight_hh{suffix}"].dtype
    note = "the torch layer has no bias: Flax's is zero, and must stay so for the way back"
    return Entry((), (place,), Constant(0.0, layer.flax[place], dtype), note=note)


def _rules(family: _Family, kinds: tuple[type, type], cells: tuple[str, ...], settings: str) -> list[Rule]:
    layer, cell = kinds
    entries = _entries_of(family)
    return [
        Rule(
            layer,
            entries,
            flax_types=(*cells, "RNN", "Bidirectional"),
            required=frozenset({"weight_ih_l0", "weight_hh_l0"}),
            settings=f"{settings}; time_major=not batch_first in the RNN around it",
            twin=layer_twin,
        ),
        Rule(
            cell,
            entries,
            flax_types=cells,
            required=frozenset({"weight_ih", "weight_hh"}),
            settings=settings,
            twin=cell_twin,
        ),
    ]


RULES = (
    *_rules(
        _LSTM,
        (nn.LSTM, nn.LSTMCell),
        ("LSTMCell", "OptimizedLSTMCell"),
        "features=hidden_size; the carry is (c, h)",
    ),
    *_rules(
        _GRU,
        (nn.GRU, nn.GRUCell),
        ("GRUCell",),
        "features=hidden_size; with biases in nnx weights.layers.nnx.GRUCell",
    ),
    *_rules(
        _RNN,
        (nn.RNN, nn.RNNCell),
        ("SimpleCell",),
        "features=hidden_size; activation_fn=nn.relu for nonlinearity='relu'",
    ),
)
