"""Recurrent layers and cells: gates, biases, layers, directions, and where the cells hang."""

from typing import Any

import flax.linen as ln
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from tests.weights.twins import (
    Flax,
    as_is,
    assert_returns,
    assert_twins,
    difference,
    draw,
    randomise,
    run,
    same_bits,
    template,
)
from torchjax_bridge import errors, to_flax, to_state_dict
from torchjax_bridge.weights import layers, plan

D, H = 3, 4
X = (2, 5, D)  # batch, time, features

TORCH: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
LINEN: dict[str, Any] = {
    "LSTM": ln.LSTMCell,
    "LSTM optimized": ln.OptimizedLSTMCell,
    "GRU": ln.GRUCell,
    "RNN": ln.SimpleCell,
}
NNX: dict[str, Any] = {
    "LSTM": nnx.LSTMCell,
    "LSTM optimized": nnx.OptimizedLSTMCell,
    "GRU": layers.nnx.GRUCell,
    "RNN": nnx.SimpleCell,
}
CELLS = [("linen", name) for name in LINEN] + [("nnx", name) for name in NNX]


class Compact(ln.Module):
    """Cells in the scope of the model, numbered by linen."""

    cell: Any
    layers: int = 1
    directions: int = 1

    @ln.compact
    def __call__(self, x):
        for _ in range(self.layers):
            if self.directions == 2:
                x = ln.Bidirectional(ln.RNN(self.cell(H)), ln.RNN(self.cell(H)))(x)
            else:
                x = ln.RNN(self.cell(H))(x)
        return x


class Setup(ln.Module):
    """Cells under names, in a list."""

    cell: Any
    layers: int = 1
    directions: int = 1

    def setup(self) -> None:
        def one() -> ln.Module:
            if self.directions == 2:
                return ln.Bidirectional(ln.RNN(self.cell(H)), ln.RNN(self.cell(H)))
            return ln.RNN(self.cell(H))

        self.rnn = [one() for _ in range(self.layers)]

    def __call__(self, x):
        for layer in self.rnn:
            x = layer(x)
        return x


class Listed(nnx.Module):
    """An nnx list of layers."""

    def __init__(self, rngs: nnx.Rngs, cell: Any, layers: int = 1, directions: int = 1) -> None:
        def one(features: int) -> nnx.Module:
            if directions == 2:
                both = [nnx.RNN(cell(features, H, rngs=rngs), rngs=rngs) for _ in range(2)]
                return nnx.Bidirectional(*both, rngs=rngs)
            return nnx.RNN(cell(features, H, rngs=rngs), rngs=rngs)

        self.rnn = nnx.List([one(D if layer == 0 else H * directions) for layer in range(layers)])

    def __call__(self, x):
        for layer in self.rnn:
            x = layer(x)
        return x


def held(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"rnn": module})


def sequence(module: nn.Module) -> Any:
    return lambda x: module(x)[0]


def twin(flavour: str, name: str, layers: int = 1, directions: int = 1) -> Flax:
    if flavour == "linen":
        return Compact(LINEN[name], layers, directions)
    return lambda rngs: Listed(rngs, NNX[name], layers, directions)


@pytest.mark.every(4)
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "unbiased"])
@pytest.mark.parametrize(("flavour", "name"), CELLS)
def test_one_layer_computes_the_same_in_every_cell(flavour: str, name: str, bias: bool) -> None:
    module = TORCH[name.split()[0]](D, H, bias=bias, batch_first=True)
    x = draw(*X)
    assert_twins(held(module), twin(flavour, name), x, within=3e-7, axes=as_is, call=sequence(module))


def test_a_relu_recurrence_is_an_activation_of_the_cell() -> None:
    module = nn.RNN(D, H, nonlinearity="relu", batch_first=True)
    flax = ln.RNN(ln.SimpleCell(H, activation_fn=ln.relu))
    # Outputs grow to 8: two units in their last place.
    assert_twins(module, flax, draw(*X), within=1e-6, axes=as_is, call=sequence(module))


@pytest.mark.every(2)
@pytest.mark.parametrize(("count", "directions"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("name", "flax"),
    [
        ("LSTM", lambda *shape: Compact(ln.OptimizedLSTMCell, *shape)),
        ("GRU", lambda *shape: Setup(ln.GRUCell, *shape)),
        ("LSTM", lambda *shape: lambda rngs: Listed(rngs, nnx.OptimizedLSTMCell, *shape)),
    ],
    ids=["numbered by linen", "named in setup", "in an nnx list"],
)
def test_layers_and_directions_find_their_cells(name: str, flax: Any, count: int, directions: int) -> None:
    module = TORCH[name](D, H, num_layers=count, bidirectional=directions == 2, batch_first=True)
    x = draw(*X)
    assert_twins(held(module), flax(count, directions), x, within=5e-7, axes=as_is, call=sequence(module))


def test_numbers_that_decide_are_noted_in_the_plan() -> None:
    module = held(nn.LSTM(D, H, num_layers=2, bidirectional=True, batch_first=True))
    empty = template(Compact(ln.LSTMCell, 2, 2), draw(*X).numpy())
    wanted = "the 4 cells are taken in the order of their numbers, forward and backward in turn"
    assert any(wanted in note for note in plan(module, empty).notes)
    named = template(Setup(ln.LSTMCell, 2, 2), draw(*X).numpy())
    assert not any("order of their numbers" in note for note in plan(module, named).notes)


class Ways(nnx.Module):
    """Two directions under names of one's own."""

    def __init__(self, rngs: nnx.Rngs, names: tuple[str, str]) -> None:
        for name in names:
            setattr(self, name, nnx.LSTMCell(D, H, rngs=rngs))


@pytest.mark.parametrize(
    "names", [("fwd", "bwd"), ("cell", "cell_reverse"), ("lstm_forward", "lstm_backward")]
)
def test_words_tell_the_direction(names: tuple[str, str]) -> None:
    module = randomise(nn.LSTM(D, H, bidirectional=True))
    filled = to_flax(module, template(lambda rngs: Ways(rngs, names)))
    assert (
        difference(getattr(filled, names[1]).ii.kernel[...].T, module.weight_ih_l0_reverse[:H].detach()) == 0
    )
    assert_returns(module, filled)


def test_cells_whose_names_tell_nothing_are_refused() -> None:
    module = nn.LSTM(D, H, bidirectional=True)
    wanted = r"do not say which layer and direction each is; call them 'rnn_fwd', 'rnn_bwd'"
    with pytest.raises(errors.PlanError, match=wanted):
        to_flax(module, template(lambda rngs: Ways(rngs, ("one", "two"))))


def test_another_number_of_cells_is_refused_with_both_numbers() -> None:
    module = held(nn.LSTM(D, H, num_layers=3))
    with pytest.raises(errors.PlanError, match=r"needs 3 cells \(3 layers, 1 directions\), and 2 are there"):
        to_flax(module, template(lambda rngs: Listed(rngs, nnx.LSTMCell, 2)))


# --- cells -------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize(("flavour", "name"), CELLS)
def test_a_cell_computes_the_same(flavour: str, name: str) -> None:
    module = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}[name.split()[0]](D, H)
    flax: Any = LINEN[name](H) if flavour == "linen" else lambda rngs: NNX[name](D, H, rngs=rngs)
    randomise(module)
    x, h, c = draw(2, D), draw(2, H, seed=2), draw(2, H, seed=3)
    carry = (c.numpy(), h.numpy()) if name.startswith("LSTM") else h.numpy()  # (c, h), and torch has (h, c)
    empty = template(flax, carry, x.numpy())
    filled = to_flax(module, empty)
    with torch.no_grad():
        want = module(x, (h, c))[0] if name.startswith("LSTM") else module(x, h)
    assert difference(run(flax, filled, carry, x.numpy())[1], want) <= 3e-7
    assert_returns(module, filled)


# --- what Flax has not -------------------------------------------------------------------------------


def test_nnx_s_own_gru_cell_cannot_hold_the_bias_inside_the_reset_and_ours_is_named() -> None:
    empty = template(lambda rngs: Listed(rngs, nnx.GRUCell))
    with pytest.raises(errors.PlanError, match=r"use torchjax_bridge\.weights\.layers\.nnx\.GRUCell"):
        to_flax(held(nn.GRU(D, H)), empty)
    module = nn.GRU(D, H, bias=False, batch_first=True)
    flax = lambda rngs: Listed(rngs, nnx.GRUCell)  # noqa: E731
    assert_twins(held(module), flax, draw(*X), within=3e-7, axes=as_is, call=sequence(module))


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_a_projection_of_the_state_is_refused(flavour: str) -> None:
    empty = template(twin(flavour, "LSTM"), draw(*X).numpy())
    with pytest.raises(
        errors.PlanError, match="proj_size projects the hidden state, which no Flax cell does"
    ):
        to_flax(held(nn.LSTM(D, H, proj_size=2)), empty)


@pytest.mark.parametrize(("flavour", "name"), [("linen", "GRU"), ("nnx", "LSTM"), ("nnx", "RNN")])
def test_a_bias_that_torch_has_not_must_stay_zero_for_the_way_back(flavour: str, name: str) -> None:
    module = held(randomise(TORCH[name](D, H, bias=False)))
    empty = template(twin(flavour, name), draw(*X).numpy())
    filled = to_flax(module, empty)
    assert any("Flax's is zero, and must stay so" in note for note in plan(module, empty).notes)
    if flavour == "linen":
        filled["params"]["GRUCell_0"]["in"]["bias"] = jnp.ones(H)
    else:
        cell = filled.rnn[0].cell
        (cell.hi if name == "LSTM" else cell.dense_i).bias[...] = jnp.ones(H)
    with pytest.raises(
        errors.PlanError, match=r"bias' cannot be converted to torch: torch has no place for it"
    ):
        to_state_dict(filled, module)


# --- two biases in one -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LSTM", "LSTM optimized", "RNN"])
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_summed_biases_are_noted_and_come_back_as_the_sum_and_zero_for_another_template(
    flavour: str, name: str
) -> None:
    kind = TORCH[name.split()[0]]
    module, other = held(randomise(kind(D, H))), held(randomise(kind(D, H), seed=1))
    empty = template(twin(flavour, name), draw(*X).numpy())
    assert any(
        "lossy" in note and "bias_ih_l0 + rnn.bias_hh_l0" in note for note in plan(module, empty).notes
    )
    filled = to_flax(module, empty)
    assert_returns(module, filled)
    back = to_state_dict(filled, other)
    total = module["rnn"].bias_ih_l0.detach() + module["rnn"].bias_hh_l0.detach()
    assert same_bits(back["rnn.bias_ih_l0"], total)
    assert not back["rnn.bias_hh_l0"].any()
    assert same_bits(back["rnn.weight_ih_l0"], module["rnn"].weight_ih_l0.detach())


def test_linen_s_gru_sums_the_biases_of_two_gates_and_keeps_both_of_the_third() -> None:
    module, other = held(randomise(nn.GRU(D, H))), held(randomise(nn.GRU(D, H), seed=1))
    empty = template(twin("linen", "GRU"), draw(*X).numpy())
    assert any("lossy" in note for note in plan(module, empty).notes)
    filled = to_flax(module, empty)
    assert_returns(module, filled)
    back = to_state_dict(filled, other)
    into, state = module["rnn"].bias_ih_l0.detach(), module["rnn"].bias_hh_l0.detach()
    assert same_bits(back["rnn.bias_ih_l0"], torch.cat([(into + state)[: 2 * H], into[2 * H :]]))
    assert same_bits(back["rnn.bias_hh_l0"], torch.cat([torch.zeros(2 * H), state[2 * H :]]))


def test_our_gru_cell_keeps_both_biases_and_loses_nothing() -> None:
    module, other = held(randomise(nn.GRU(D, H))), held(randomise(nn.GRU(D, H), seed=1))
    empty = template(twin("nnx", "GRU"))
    assert not plan(module, empty).notes
    assert_returns(module, to_flax(module, empty))
    back = to_state_dict(to_flax(module, empty), other)
    assert all(same_bits(back[key], value) for key, value in module.state_dict().items())


# --- in a scope with others --------------------------------------------------------------------------


class Tagger(ln.Module):
    """A cell that linen numbers, beside other layers it numbers."""

    @ln.compact
    def __call__(self, x):
        return ln.Dense(2)(ln.RNN(ln.LSTMCell(H))(ln.Dense(D)(x)))


def test_a_lone_numbered_cell_beside_other_layers_is_found() -> None:
    module = nn.ModuleDict(
        {"embed": nn.Linear(6, D), "rnn": nn.LSTM(D, H, batch_first=True), "head": nn.Linear(H, 2)}
    )

    def call(x):
        return module["head"](module["rnn"](module["embed"](x))[0])

    assert_twins(module, Tagger(), draw(2, 5, 6), within=5e-7, axes=as_is, call=call)


class Pair(ln.Module):
    """Two recurrent layers that linen numbers."""

    @ln.compact
    def __call__(self, x):
        return ln.RNN(ln.LSTMCell(D))(ln.RNN(ln.LSTMCell(D))(x))


def test_two_equal_layers_that_only_numbers_tell_apart_are_refused() -> None:
    module = nn.ModuleDict({"encoder": nn.LSTM(D, D), "decoder": nn.LSTM(D, D)})
    with pytest.raises(errors.PlanError, match=r"fit 'LSTMCell_0' \(LSTMCell\), .* equally well"):
        to_flax(module, template(Pair(), np.ones(X, np.float32)))


class Words(ln.Module):
    """Cells under the name of the layer and words, which no scope of a layer holds together."""

    suffixes: tuple[tuple[str, str], ...]

    @ln.compact
    def __call__(self, x):
        for names in self.suffixes:
            forward, backward = (ln.OptimizedLSTMCell(H, name=f"rnn{name}") for name in names)
            x = ln.Bidirectional(ln.RNN(forward), ln.RNN(backward))(x)
        return ln.Dense(2, name="rnn_head")(x)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "suffixes",
    [
        (("_fwd", "_bwd"),),
        (("_forward", "_reverse"),),
        (("_0_forward", "_0_backward"), ("_1_forward", "_1_backward")),
        (("_fwd_0", "_bwd_0"), ("_fwd_1", "_bwd_1")),
    ],
)
def test_cells_beside_each_other_are_one_layer_by_its_name_and_words(suffixes: Any) -> None:
    rnn = nn.LSTM(D, H, num_layers=len(suffixes), bidirectional=True, batch_first=True)
    module = nn.ModuleDict({"rnn": rnn, "rnn_head": nn.Linear(2 * H, 2)})
    flax = Words(suffixes)
    assert_twins(
        module,
        flax,
        draw(*X),
        within=5e-7,
        axes=as_is,
        call=lambda x: module["rnn_head"](module["rnn"](x)[0]),
    )


class Lettered(ln.Module):
    """Two cells under names that say neither a layer nor a direction, and a third thing beside them."""

    names: tuple[str, str]
    kind: Any
    ways: int

    @ln.compact
    def __call__(self, x):
        one, two = (ln.RNN(self.kind(H, name=name)) for name in self.names)
        x = ln.Bidirectional(one, two)(x) if self.ways == 2 else two(one(x))
        return ln.Dense(2, name="head")(x)


@pytest.mark.every(3)
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("names", [("gru_a", "gru_b"), ("left", "right")])
@pytest.mark.parametrize("kind", ["GRU", "LSTM optimized", "RNN"])
def test_cells_whose_names_say_nothing_are_one_fault_that_says_what_is_understood(kind, names, ways) -> None:
    rnn = TORCH[kind.partition(" ")[0]](D, H, num_layers=3 - ways, bidirectional=ways == 2)
    module = nn.ModuleDict({"gru": rnn, "head": nn.Linear(ways * H, 2)})
    (fault,) = plan(module, template(Lettered(names, LINEN[kind], ways), np.ones(X, np.float32))).faults
    assert fault.path == "gru"
    assert all(f"'{name}'" in fault.message for name in names)
    assert "do not say which layer and direction each is" in fault.message
    assert ("rnn_fwd" if ways == 2 else "rnn_0") in fault.message


def test_cells_of_another_name_than_the_layers_are_taken_by_their_own_words() -> None:
    module = nn.ModuleDict(
        {"gru": nn.LSTM(D, H, bidirectional=True, batch_first=True), "head": nn.Linear(2 * H, 2)}
    )
    flax = Lettered(("cell_fwd", "cell_bwd"), LINEN["LSTM"], 2)
    assert_twins(
        module, flax, draw(*X), within=5e-7, axes=as_is, call=lambda x: module["head"](module["gru"](x)[0])
    )
