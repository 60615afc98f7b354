"""Optimizer state crosses: training handed over in mid-run goes on along the same trajectory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as ln
from flax import nnx
from torch import nn

from tests.marking import slow_but
from torchjax_bridge import (
    as_jax_module,
    errors,
    to_flax,
    to_jax,
    to_optax,
    to_optimizer_state,
    to_state_dict,
)
from torchjax_bridge.weights import FrozenWarning

STEPS = 25
LR = 1e-2

KINDS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], optax.GradientTransformation]] = {
    "sgd": (lambda p: torch.optim.SGD(p, LR), optax.sgd(LR)),
    "sgd momentum": (lambda p: torch.optim.SGD(p, LR, momentum=0.9), optax.sgd(LR, 0.9)),
    "sgd nesterov": (
        lambda p: torch.optim.SGD(p, LR, momentum=0.9, nesterov=True),
        optax.sgd(LR, 0.9, nesterov=True),
    ),
    "sgd weight decay": (
        lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=1e-2),
        optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(LR, 0.9)),
    ),
    "adam": (lambda p: torch.optim.Adam(p, LR), optax.adam(LR)),
    "adam L2": (
        lambda p: torch.optim.Adam(p, LR, weight_decay=1e-2),
        optax.chain(optax.add_decayed_weights(1e-2), optax.adam(LR)),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, LR, weight_decay=1e-2), optax.adamw(LR, weight_decay=1e-2)),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, LR), optax.rmsprop(LR, 0.99, 1e-8, eps_in_sqrt=False)),
    "rmsprop momentum": (
        lambda p: torch.optim.RMSprop(p, LR, momentum=0.9),
        optax.rmsprop(LR, 0.99, 1e-8, eps_in_sqrt=False, momentum=0.9),
    ),
    "rmsprop centered": (
        lambda p: torch.optim.RMSprop(p, LR, centered=True),
        optax.rmsprop(LR, 0.99, 1e-8, eps_in_sqrt=False, centered=True),
    ),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, LR),
        optax.adagrad(LR, initial_accumulator_value=0.0, eps=1e-10),
    ),
    "adamw in a chain": (
        lambda p: torch.optim.AdamW(p, LR),
        optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(LR, weight_decay=1e-2)),
    ),
    "adam with a schedule": (
        lambda p: torch.optim.Adam(p, LR),
        optax.adam(optax.constant_schedule(LR)),
    ),
    "adamw injected": (
        lambda p: torch.optim.AdamW(p, LR),
        optax.inject_hyperparams(optax.adamw)(LR, weight_decay=1e-2),
    ),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


class Twin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 3, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs)
        self.fc = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(jnp.tanh(self.conv(x)).mean((1, 2)))


class Linen(ln.Module):
    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(ln.Conv(3, (3, 3), padding=((1, 1), (1, 1)), name="conv")(x)).mean((1, 2))
        return ln.Dense(4, name="fc")(x)


@pytest.fixture(scope="module")
def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [
        (draw.standard_normal((6, 2, 4, 4), np.float32), draw.standard_normal((6, 4), np.float32))
        for _ in range(2 * STEPS)
    ]


def _train_torch(module: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        ((module(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean().backward()
        optimizer.step()


def _train_nnx(model: Twin, optimizer: nnx.Optimizer, batches: list[Any]) -> None:
    @nnx.jit
    def step(model: Twin, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        grads = nnx.grad(lambda m: ((m(x) - y) ** 2).mean())(model)
        optimizer.update(model, grads)

    for x, y in batches:
        step(model, optimizer, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(y))


def _difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", slow_but(["sgd momentum", "adam L2", "adamw", "rmsprop"], KINDS))
def test_training_goes_from_torch_to_optax_and_back_on_one_trajectory(kind: str, batches: list[Any]) -> None:
    make, tx = KINDS[kind]
    torch.manual_seed(0)
    module = Net()
    start = Net()
    start.load_state_dict(module.state_dict())
    whole = Net()
    whole.load_state_dict(module.state_dict())
    _train_torch(whole, make(whole.parameters()), batches)

    optimizer = make(module.parameters())
    _train_torch(module, optimizer, batches[:15])
    counted = any("step" in entry for entry in optimizer.state_dict()["state"].values())
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    fresh = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    handed = to_optax(optimizer, fresh, module=module, template=twin, step=None if counted else 15)
    assert int(handed.step[...]) == 15
    assert int(fresh.step[...]) == 0  # what was given is untouched
    _train_nnx(twin, handed, batches[15:35])

    module.load_state_dict(to_state_dict(twin, module))
    optimizer = make(module.parameters())
    state = to_optimizer_state(handed, optimizer, module=module, template=twin)
    optimizer.load_state_dict(state)
    _train_torch(module, optimizer, batches[35:])

    assert _difference(whole, start) > 1e-2  # it did train
    assert _difference(whole, module) < 5e-6


@pytest.mark.parametrize("kind", ["adam", "sgd momentum"])
def test_without_its_state_an_optimizer_leaves_the_trajectory(kind: str, batches: list[Any]) -> None:
    make, _ = KINDS[kind]
    torch.manual_seed(0)
    whole, module = Net(), Net()
    module.load_state_dict(whole.state_dict())
    _train_torch(whole, make(whole.parameters()), batches)
    _train_torch(module, make(module.parameters()), batches[:15])
    _train_torch(module, make(module.parameters()), batches[15:])
    assert _difference(whole, module) > 1e-4  # so the bound of the test above means something


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_goes_to_optax_and_back_is_the_same(kind: str, batches: list[Any]) -> None:
    make, tx = KINDS[kind]
    module = Net()
    optimizer = make(module.parameters())
    _train_torch(module, optimizer, batches[:5])
    variables = Linen().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    params = to_flax(module, variables)
    state = tx.init(params["params"])
    filled = to_optax(optimizer, state, module=module, template=params, step=None)
    assert jax.tree.structure(filled) == jax.tree.structure(state)
    uncounted = kind.startswith(("rmsprop", "adagrad"))
    if uncounted:
        with pytest.raises(errors.OptimizerStateError, match="Pass step="):
            to_optimizer_state(filled, optimizer, module=module, template=params)
    taken = 5 if uncounted else None
    back = to_optimizer_state(filled, optimizer, module=module, template=params, step=taken)
    original = optimizer.state_dict()
    assert back["param_groups"] == original["param_groups"]
    exact = kind != "rmsprop momentum"  # its trace is scaled by the learning rate
    for index, entry in original["state"].items():
        for name, value in entry.items():
            if value is None:
                continue
            got = back["state"][index][name]
            if exact:
                assert torch.equal(got, value), (index, name)
            else:
                torch.testing.assert_close(got, value, rtol=3e-7, atol=0)
    make(Net().parameters()).load_state_dict(back)


# --- refusals ----------------------------------------------------------------------------------------


def _parts() -> tuple[Net, Twin, nnx.Optimizer]:
    module = Net()
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    return module, twin, nnx.Optimizer(twin, optax.adam(LR), wrt=nnx.Param)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.SGD(p, LR, momentum=0.9, dampening=0.5), "dampening=0.5"),
        (lambda p: torch.optim.Adam(p, LR, amsgrad=True), "amsgrad=True"),
        (lambda p: torch.optim.NAdam(p, LR), "momentum_decay"),
        (lambda p: torch.optim.Adam(p, LR, maximize=True), "maximize=True"),
        (lambda p: torch.optim.Adagrad(p, LR, lr_decay=0.1), "lr_decay=0.1"),
        (lambda p: torch.optim.ASGD(p, LR), "an ASGD cannot be handed over"),
    ],
)
def test_variants_with_other_formulas_are_refused_with_the_reason(make: Any, words: str) -> None:
    module, twin, state = _parts()
    with pytest.raises(errors.OptimizerStateError, match=words):
        to_optax(make(module.parameters()), state, module=module, template=twin)
    with pytest.raises(errors.OptimizerStateError, match=words):
        to_optimizer_state(state, make(module.parameters()), module=module, template=twin)


def test_groups_with_different_hyperparameters_are_refused() -> None:
    module, twin, state = _parts()
    groups = [{"params": module.conv.parameters()}, {"params": module.fc.parameters(), "lr": 1.0}]
    with pytest.raises(errors.OptimizerStateError, match="param_groups differ"):
        to_optax(torch.optim.Adam(groups, LR), state, module=module, template=twin)


def _spared(module: nn.Module, decay: float = 0.5) -> torch.optim.AdamW:
    """Weights decay and biases do not, as language models are trained."""
    wide = [p for p in module.parameters() if p.ndim > 1]
    flat = [p for p in module.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": wide, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}], LR
    )


def test_groups_that_are_spared_the_decay_are_one_masked_optimizer_both_ways(batches: list[Any]) -> None:
    tx = optax.adamw(LR, weight_decay=0.5, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p))
    whole, module, back = Net(), Net(), Net()
    whole.load_state_dict(module.state_dict())
    _train_torch(whole, _spared(whole), batches)

    optimizer = _spared(module)
    _train_torch(module, optimizer, batches[:15])
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    handed = to_optax(optimizer, nnx.Optimizer(twin, tx, wrt=nnx.Param), module=module, template=twin)
    _train_nnx(twin, handed, batches[15:35])
    back.load_state_dict(to_state_dict(twin, back))
    last = _spared(back)
    last.load_state_dict(to_optimizer_state(handed, last, module=back, template=twin))
    assert [group["weight_decay"] for group in last.param_groups] == [0.5, 0.0]
    _train_torch(back, last, batches[35:])
    assert _difference(back, whole) < 5e-6


def test_groups_with_two_decays_are_refused() -> None:
    module, twin, fresh = _parts()
    optimizer = _spared(module)
    optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(errors.OptimizerStateError, match="more than whether weight_decay is 0"):
        to_optax(optimizer, fresh, module=module, template=twin)


def test_the_wrong_chain_is_refused_with_the_right_one() -> None:
    module, twin, state = _parts()
    with pytest.raises(errors.OptimizerStateError) as caught:
        to_optax(torch.optim.SGD(module.parameters(), LR, momentum=0.9), state, module=module, template=twin)
    assert "0 TraceState where one is needed; build it with optax.sgd" in str(caught.value)
    assert "ScaleByAdamState that torch.optim.SGD has no moments for" in str(caught.value)


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (optax.lion(LR), "ScaleByLionState"),
        (optax.amsgrad(LR), "ScaleByAmsgradState"),
        (optax.chain(optax.sgd(LR), optax.ema(0.9)), "EmaState"),
    ],
)
def test_an_accumulator_that_torch_has_no_moments_for_is_refused_by_name(tx: Any, name: str) -> None:
    module, twin, _ = _parts()
    state = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    sgd = torch.optim.SGD(module.parameters(), LR)
    words = f"a {name} that torch.optim.SGD has no moments"
    with pytest.raises(errors.OptimizerStateError, match=words):
        to_optax(sgd, state, module=module, template=twin)
    with pytest.raises(errors.OptimizerStateError, match=words):
        to_optimizer_state(state, sgd, module=module, template=twin)


@pytest.mark.slow
def test_wrappers_that_accumulate_nothing_of_their_own_are_looked_through(batches: list[Any]) -> None:
    module = Net()
    adam = torch.optim.Adam(module.parameters(), LR)
    _train_torch(module, adam, batches[:3])
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    for tx in (
        optax.MultiSteps(optax.adam(LR), 2),
        optax.apply_if_finite(optax.adam(LR), 3),
        optax.chain(optax.adam(LR), optax.contrib.reduce_on_plateau()),
    ):
        state = nnx.Optimizer(twin, tx, wrt=nnx.Param)
        handed = to_optax(adam, state, module=module, template=twin)
        back = to_optimizer_state(handed, adam, module=module, template=twin)["state"]
        assert all(torch.equal(back[place]["exp_avg"], entry["exp_avg"]) for place, entry in _entries(adam))


def _entries(optimizer: torch.optim.Optimizer) -> Any:
    return optimizer.state_dict()["state"].items()


def test_squares_of_complex_gradients_are_refused_and_their_sums_are_not() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    module = Wave()
    twin = nnx.State({"phase": nnx.Param(jnp.zeros(3, jnp.complex64))})
    pure = jax.tree.map(lambda leaf: leaf, twin)
    adam = torch.optim.Adam(module.parameters(), LR)
    with pytest.raises(errors.OptimizerStateError, match="complex parameters"):
        to_optax(adam, optax.adam(LR).init(pure), module=module, template=twin)
    sgd = torch.optim.SGD(module.parameters(), LR, momentum=0.9)
    module.phase.abs().square().sum().backward()
    sgd.step()
    handed = to_optax(sgd, optax.sgd(LR, 0.9).init(pure), module=module, template=twin)
    (trace,) = jax.tree.leaves(handed)
    assert np.array_equal(np.asarray(trace), sgd.state[module.phase]["momentum_buffer"].numpy())


class Tied(nn.Module):
    """An embedding and a head of one weight, of which the head is registered first or last."""

    def __init__(self, *, head_first: bool) -> None:
        super().__init__()
        head, embed = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
        for name, layer in (("head", head), ("embed", embed))[:: 1 if head_first else -1]:
            self.add_module(name, layer)
        head.weight = embed.weight


class NnxTied(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, tie: bool) -> None:
        self.embed = nnx.Embed(9, 4, rngs=rngs)
        if not tie:
            self.head = nnx.Linear(4, 9, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_parameter_has_one_state_under_whatever_name(head_first: bool) -> None:
    module = Tied(head_first=head_first)
    adam = torch.optim.Adam(module.parameters(), LR)
    module.head(module.embed(torch.arange(5))).square().sum().backward()
    adam.step()
    twin = to_flax(module, NnxTied(nnx.Rngs(0), tie=True))
    handed = to_optax(adam, nnx.Optimizer(twin, optax.adam(LR), wrt=nnx.Param), module=module, template=twin)
    moment = adam.state[module.embed.weight]["exp_avg"]
    assert np.array_equal(handed.opt_state[0].mu["embed"]["embedding"][...], moment.numpy())
    back = to_optimizer_state(handed, adam, module=module, template=twin)
    assert torch.equal(back["state"][0]["exp_avg"], moment)


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tie_that_flax_does_not_keep_is_refused_with_the_leaves(head_first: bool) -> None:
    module = Tied(head_first=head_first)
    twin = to_flax(module, NnxTied(nnx.Rngs(0), tie=False))
    state = nnx.Optimizer(twin, optax.adam(LR), wrt=nnx.Param)
    adam = torch.optim.Adam(module.parameters(), LR)
    with pytest.raises(errors.OptimizerStateError, match=r"one tied parameter .*embed\.embedding"):
        to_optax(adam, state, module=module, template=twin)
    with pytest.raises(errors.OptimizerStateError, match=r"one tied parameter .*head\.kernel"):
        to_optimizer_state(state, adam, module=module, template=twin)


@pytest.mark.parametrize("step", [-1, 2.5, "3", True])
def test_what_is_no_number_of_steps_is_refused(step: Any) -> None:
    module, twin, state = _parts()
    adam = torch.optim.Adam(module.parameters(), LR)
    with pytest.raises(errors.OptimizerStateError, match="how many steps"):
        to_optax(adam, state, module=module, template=twin, step=step)
    with pytest.raises(errors.OptimizerStateError, match="how many steps"):
        to_optimizer_state(state, adam, module=module, template=twin, step=step)


def test_a_momentum_times_a_rate_of_zero_is_refused() -> None:
    module, twin, _ = _parts()
    state = nnx.Optimizer(twin, optax.rmsprop(LR, momentum=0.9), wrt=nnx.Param)
    still = torch.optim.RMSprop(module.parameters(), 0.0, momentum=0.9)
    with pytest.raises(errors.OptimizerStateError, match="lr=0"):
        to_optimizer_state(state, still, module=module, template=twin, step=1)


def test_different_numbers_of_steps_are_refused_by_name(batches: list[Any]) -> None:
    module, twin, state = _parts()
    optimizer = torch.optim.Adam(module.parameters(), LR)
    _train_torch(module, optimizer, batches[:2])
    module.conv.requires_grad_(False)
    _train_torch(module, optimizer, batches[:1])
    with pytest.raises(errors.OptimizerStateError, match=r"2 for conv\.bias, conv\.weight; 3 for fc"):
        to_optax(optimizer, state, module=module, template=twin)


def test_a_parameter_that_only_one_side_trains_is_refused() -> None:
    module, twin, state = _parts()
    with pytest.raises(errors.OptimizerStateError, match=r"'conv\.kernel' is trained by optax and not"):
        to_optax(torch.optim.Adam(module.fc.parameters(), LR), state, module=module, template=twin)


def test_summed_biases_are_refused_with_a_way_on_and_no_second_fault() -> None:
    module = nn.LSTM(3, 4, batch_first=True)
    variables = ln.RNN(ln.OptimizedLSTMCell(4)).init(jax.random.key(0), jnp.zeros((1, 2, 3)))
    state = optax.adam(LR).init(variables["params"])
    optimizer = torch.optim.Adam(module.parameters(), LR)
    with pytest.raises(errors.OptimizerStateError) as caught:
        to_optax(optimizer, state, module=module, template=variables)
    (said,) = str(caught.value).splitlines()[1:]
    assert "bias_ih_l0 + bias_hh_l0" in said
    assert "go on with a fresh optimizer state" in said


def test_a_part_of_a_partition_takes_the_state_of_the_parameters_it_trains(batches: list[Any]) -> None:
    module = Net()
    optimizer = torch.optim.Adam(module.fc.parameters(), LR)
    _train_torch(module, optimizer, batches[:3])
    tx = optax.partition(
        {"train": optax.adam(LR), "freeze": optax.set_to_zero()},
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "train" if "fc" in jax.tree_util.keystr(path) else "freeze", tree
        ),
    )
    variables = to_flax(module, Linen().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2))))
    filled = to_optax(optimizer, tx.init(variables["params"]), module=module, template=variables)
    adam = filled.inner_states["train"].inner_state[0]
    moment = optimizer.state[module.fc.weight]["exp_avg"]
    np.testing.assert_array_equal(np.asarray(adam.mu["fc"]["kernel"]), moment.numpy().T)
    assert int(adam.count) == 3


def test_a_mask_of_jax_tree_map_over_nnx_variables_is_a_mask(batches: list[Any]) -> None:
    module = Net()
    optimizer = torch.optim.Adam([module.conv.weight, module.fc.weight], LR)
    _train_torch(module, optimizer, batches[:3])
    tx = optax.chain(
        optax.masked(optax.adam(LR), lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
        optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 1, tree)),
    )
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    handed = to_optax(optimizer, nnx.Optimizer(twin, tx, wrt=nnx.Param), module=module, template=twin)
    mu = handed.opt_state[0].inner_state[0].mu
    moment = optimizer.state[module.fc.weight]["exp_avg"]
    np.testing.assert_array_equal(np.asarray(mu["fc"]["kernel"][...]), moment.numpy().T)
    back = to_optimizer_state(handed, optimizer, module=module, template=twin)
    assert torch.equal(back["state"][1]["exp_avg"], moment)


def test_a_schedule_needs_to_know_how_many_steps_sgd_has_taken() -> None:
    module, twin, _ = _parts()
    optimizer = torch.optim.SGD(module.parameters(), LR)
    tx = optax.sgd(optax.linear_schedule(LR, 0.0, 100))
    state = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    with pytest.raises(errors.OptimizerStateError, match="pass step="):
        to_optax(optimizer, state, module=module, template=twin)
    handed = to_optax(optimizer, state, module=module, template=twin, step=40)
    assert int(jax.tree.leaves(nnx.as_pure(handed.opt_state))[0]) == 40


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class UnusedTwin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc, self.head = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)


@pytest.mark.slow
def test_a_parameter_that_is_never_given_a_gradient_stays_where_it_is_on_both_sides() -> None:
    torch.manual_seed(0)
    module = Unused()
    adam, x = torch.optim.Adam(module.parameters(), LR), torch.randn(4, 3)

    def step() -> None:
        adam.zero_grad()
        module(x).square().sum().backward()
        adam.step()

    step()
    twin = to_flax(module, UnusedTwin(nnx.Rngs(0)))
    state = nnx.Optimizer(twin, optax.adam(LR), wrt=nnx.Param)
    with pytest.warns(FrozenWarning, match=r"never gave a gradient to 'head\.bias', 'head\.kernel'"):
        handed = to_optax(adam, state, module=module, template=twin)
    assert int(handed.step[...]) == 1
    for _ in range(5):
        step()
        handed.update(twin, nnx.grad(lambda model: (model.fc(to_jax(x)) ** 2).sum())(twin))
    back = to_state_dict(twin, module)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_is_left_out_of_both_has_no_moment_on_the_way_back() -> None:
    module, twin = Unused(), UnusedTwin(nnx.Rngs(0))
    adam = torch.optim.Adam(module.fc.parameters(), LR)
    module(torch.ones(2, 3)).sum().backward()
    adam.step()
    trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("head")))
    state = nnx.Optimizer(twin, optax.adam(optax.constant_schedule(LR)), wrt=trained)
    handed = to_optax(adam, state, module=module, template=twin)
    assert int(handed.step[...]) == 1
    assert to_optimizer_state(handed, adam, module=module, template=twin)["state"].keys() == {0, 1}


def test_parameters_that_began_at_different_steps_are_refused() -> None:
    module, twin = Unused(), UnusedTwin(nnx.Rngs(0))
    adam = torch.optim.Adam(module.parameters(), LR)
    for run in (module.fc, lambda x: module.head(module.fc(x))):
        run(torch.ones(2, 3)).sum().backward()
        adam.step()
        adam.zero_grad()
    state = nnx.Optimizer(twin, optax.adam(LR), wrt=nnx.Param)
    with pytest.raises(errors.OptimizerStateError, match=r"1 for head\.bias.*2 for fc\.bias"):
        to_optax(adam, state, module=module, template=twin)


def test_injected_hyperparameters_that_differ_are_refused_with_both_values() -> None:
    module, twin, _ = _parts()
    tx = optax.inject_hyperparams(optax.adamw)(LR, weight_decay=1e-4)
    state = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    optimizer = torch.optim.AdamW(module.parameters(), LR, weight_decay=1e-2)
    with pytest.raises(
        errors.OptimizerStateError, match=r"weight_decay is 0\.0001 in optax and 0\.01 in torch"
    ):
        to_optax(optimizer, state, module=module, template=twin)


def test_an_optimizer_of_another_module_is_refused() -> None:
    module, twin, state = _parts()
    with pytest.raises(errors.OptimizerStateError, match="none of the module's"):
        to_optax(torch.optim.Adam(Net().parameters(), LR), state, module=module, template=twin)


# --- the variables of as_jax_module ----------------------------------------------------------------------


@pytest.mark.slow
def test_training_goes_on_over_the_variables_of_as_jax_module_and_comes_back() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    adam, x = torch.optim.Adam(module.parameters(), lr=0.01), torch.randn(8, 3)

    def torch_step() -> None:
        adam.zero_grad()
        module(x).square().mean().backward()
        adam.step()

    for _ in range(3):
        torch_step()
    apply, variables = as_jax_module(module)
    params = jax.tree.map(jnp.copy, variables["params"])
    tx = optax.adam(0.01)
    state = to_optax(adam, tx.init(params), module=module, template=variables)
    back = to_optimizer_state(state, adam, module=module, template=variables)
    for place, entry in adam.state_dict()["state"].items():
        assert all(torch.equal(back["state"][place][name], value) for name, value in entry.items())

    def loss(params: Any) -> jax.Array:
        return (apply({**variables, "params": params}, jnp.asarray(x.numpy())) ** 2).mean()

    for _ in range(5):
        torch_step()
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(params[name], parameter.detach(), atol=2e-6)


def test_variables_of_another_module_are_no_template_of_its_optimizer() -> None:
    module, other = nn.Linear(3, 4), nn.Linear(3, 5)
    adam, (_, variables) = torch.optim.Adam(module.parameters()), as_jax_module(other)
    state = optax.adam(0.01).init(variables["params"])
    with pytest.raises(errors.PlanError, match="cannot match the optimizer's parameters"):
        to_optimizer_state(state, adam, module=module, template=variables)
