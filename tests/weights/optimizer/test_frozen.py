"""What torch leaves where it is stays there in optax, or the handing over is refused or warned of."""

import warnings
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

from torchjax_bridge import as_jax_module, errors, to_flax, to_optax, to_optimizer_state
from torchjax_bridge.weights import FrozenWarning

LR = 1e-2
BEFORE, AFTER = 4, 5

KINDS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], optax.GradientTransformation]] = {
    "sgd": (lambda p: torch.optim.SGD(p, LR), optax.sgd(LR)),
    "sgd momentum decay": (
        lambda p: torch.optim.SGD(p, LR, momentum=0.9, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(LR, 0.9)),
    ),
    "adam": (lambda p: torch.optim.Adam(p, LR), optax.adam(LR)),
    "adamw": (lambda p: torch.optim.AdamW(p, LR, weight_decay=0.1), optax.adamw(LR, weight_decay=0.1)),
}


class Net(nn.Module):
    """A body that is frozen, under a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


class Twin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.body, self.head = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(jnp.tanh(self.body(x)))


class Linen(ln.Module):
    @ln.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return ln.Dense(2, name="head")(jnp.tanh(ln.Dense(5, name="body")(x)))


def _labels(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freeze" if "body" in jax.tree_util.keystr(path) else "train", tree
    )


def _partition(tx: Any) -> Any:
    """What the message of `to_optax` says, word for word."""
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, _labels)


def _masked(tx: Any) -> Any:
    return optax.masked(tx, lambda tree: jax.tree.map(lambda label: label == "train", _labels(tree)))


TRAINED = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("body")))
DATA = torch.randn(BEFORE + AFTER, 6, 3, generator=torch.Generator().manual_seed(0))


def _train(module: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
    for x in batches:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def _started(kind: str, of: Callable[[Net], Any] = nn.Module.parameters) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = Net()
    optimizer = KINDS[kind][0](of(module))
    _train(module, optimizer, DATA[:BEFORE])
    return module, optimizer


def _nnx(tx: Any, module: Net, optimizer: Any, wrt: Any) -> Callable[[], dict[str, Any]]:
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    handed = to_optax(optimizer, nnx.Optimizer(twin, tx, wrt=wrt), module=module, template=twin)

    def go() -> dict[str, Any]:
        for x in DATA[BEFORE:].numpy():
            grads = nnx.grad(lambda m, x=x: (m(x) ** 2).mean(), argnums=nnx.DiffState(0, wrt))(twin)
            handed.update(twin, grads)
        return {n: np.asarray(getattr(twin, n).kernel[...]).T for n in ("body", "head")}

    return go


def _bare(
    loss: Callable[..., Any], params: Any, tx: Any, state: Any, pick: Callable[[Any, str], Any]
) -> Callable[[], dict[str, Any]]:
    def go() -> dict[str, Any]:
        trained, held = params, state
        for x in DATA[BEFORE:].numpy():
            updates, held = tx.update(jax.grad(loss)(trained, x), held, trained)
            trained = optax.apply_updates(trained, updates)
        return {n: np.asarray(pick(trained, n)) for n in ("body", "head")}

    return go


def _linen(tx: Any, module: Net, optimizer: Any) -> Callable[[], dict[str, Any]]:
    params = to_flax(module, Linen().init(jax.random.key(0), jnp.zeros((1, 3))))["params"]
    state = to_optax(optimizer, tx.init(params), module=module, template={"params": params})
    return _bare(
        lambda p, x: (Linen().apply({"params": p}, x) ** 2).mean(),
        params,
        tx,
        state,
        lambda p, name: p[name]["kernel"].T,
    )


def _wrapped(tx: Any, module: Net, optimizer: Any) -> Callable[[], dict[str, Any]]:
    apply, variables = as_jax_module(module)
    params = jax.tree.map(jnp.copy, variables["params"])
    state = to_optax(optimizer, tx.init(params), module=module, template=variables)
    return _bare(
        lambda p, x: (apply({**variables, "params": p}, x) ** 2).mean(),
        params,
        tx,
        state,
        lambda p, name: p[f"{name}.weight"],
    )


WAYS: dict[str, Callable[[Any, Net, Any], Callable[[], dict[str, Any]]]] = {
    "nnx, partition": lambda tx, m, o: _nnx(_partition(tx), m, o, nnx.Param),
    "nnx, wrt and DiffState": lambda tx, m, o: _nnx(tx, m, o, TRAINED),
    "nnx, a mask that zeroes": lambda tx, m, o: _nnx(
        optax.chain(
            tx, optax.masked(optax.set_to_zero(), lambda t: jax.tree.map("freeze".__eq__, _labels(t)))
        ),
        m,
        o,
        nnx.Param,
    ),
    "linen, partition": lambda tx, m, o: _linen(_partition(tx), m, o),
    "as_jax_module, partition": lambda tx, m, o: _wrapped(_partition(tx), m, o),
}


@pytest.mark.every(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of", [nn.Module.parameters, lambda m: m.head.parameters()], ids=["all", "head"])
def test_what_is_advised_trains_on_as_torch_does(kind: str, way: str, of: Any) -> None:
    module, optimizer = _started(kind, of)
    body, head = module.body.weight.detach().clone(), module.head.weight.detach().clone()
    ours = WAYS[way](KINDS[kind][1], module, optimizer)()
    _train(module, optimizer, DATA[BEFORE:])
    assert np.array_equal(ours["body"], body.numpy())  # not a bit of it moved
    assert float((module.head.weight.detach() - head).abs().max()) > 1e-3
    np.testing.assert_allclose(ours["head"], module.head.weight.detach().numpy(), atol=2e-6)


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tx_of", [_masked, lambda tx: tx], ids=["masked", "everything"])
def test_an_nnx_optimizer_that_would_move_what_is_frozen_is_refused_with_what_to_write(
    kind: str, tx_of: Any
) -> None:
    for of in (nn.Module.parameters, lambda m: m.head.parameters()):
        module, optimizer = _started(kind, of)
        with pytest.raises(errors.OptimizerStateError, match=r"'body\.kernel' is trained by optax") as caught:
            _nnx(tx_of(KINDS[kind][1]), module, optimizer, nnx.Param)
        assert "optax.set_to_zero()" in str(caught.value)
        assert "head" not in str(caught.value).split("freeze in optax")[0].replace("0 for", "")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(optax.linear_schedule(0.0, LR, 10)),
        optax.MultiSteps(optax.sgd(LR), 3),
        optax.inject_hyperparams(optax.sgd)(LR),
        optax.chain(optax.sgd(LR), optax.contrib.reduce_on_plateau()),
        optax.apply_if_finite(optax.sgd(LR), 3),
        optax.multi_transform({"train": optax.sgd(LR), "freeze": optax.identity()}, _labels),
        optax.multi_transform({"train": optax.sgd(LR), "freeze": optax.sgd(LR / 10)}, _labels),
    ],
    ids=["warm-up", "multi", "injected", "plateau", "finite", "identity", "smaller rate"],
)
def test_whatever_the_transformation_holds_back_at_first_is_seen_to_move_a_frozen_leaf(tx: Any) -> None:
    module, optimizer = _started("sgd")
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    state = nnx.Optimizer(twin, tx, wrt=nnx.Param)
    with pytest.raises(errors.OptimizerStateError, match=r"frozen in torch \(requires_grad=False\)"):
        to_optax(optimizer, state, module=module, template=twin, step=BEFORE)


def _bare_parts(kind: str, tx: Any) -> tuple[Net, Any, dict[str, Any], Any]:
    module, optimizer = _started(kind)
    params = to_flax(module, Linen().init(jax.random.key(0), jnp.zeros((1, 3))))["params"]
    return module, optimizer, {"params": params}, tx.init(params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_state_that_does_not_show_it_is_warned_of_and_with_its_transformation_refused(
    kind: str,
) -> None:
    tx = _masked(KINDS[kind][1])
    module, optimizer, variables, state = _bare_parts(kind, tx)
    with pytest.warns(
        FrozenWarning, match=r"does not train 'params\.body\.kernel', 'params\.body\.bias', .*Pass tx="
    ):
        to_optax(optimizer, state, module=module, template=variables)
    with pytest.raises(errors.OptimizerStateError, match=r"'params\.body\.kernel' is trained by optax"):
        to_optax(optimizer, state, module=module, template=variables, tx=tx)
    with pytest.raises(errors.OptimizerStateError, match=r"'params\.body\.kernel' is trained by optax"):
        to_optimizer_state(state, optimizer, module=module, template=variables, tx=tx)


@pytest.mark.parametrize("kind", ["sgd momentum decay", "adam", "adamw"])
def test_a_bare_state_with_moments_of_what_is_frozen_is_refused_both_ways(kind: str) -> None:
    module, optimizer, variables, state = _bare_parts(kind, KINDS[kind][1])
    with pytest.raises(
        errors.OptimizerStateError, match=r"'params\.body\.kernel' is trained by optax and froz"
    ):
        to_optax(optimizer, state, module=module, template=variables)
    head = KINDS[kind][0](module.head.parameters())
    for other in (optimizer, head):  # its moments would be dropped on the way
        with pytest.raises(errors.OptimizerStateError, match=r"'params\.body\.kernel' is trained by optax"):
            to_optimizer_state(state, other, module=module, template=variables)


def test_a_bare_state_of_a_tree_without_what_is_frozen_is_taken() -> None:
    module, optimizer, variables, _ = _bare_parts("adam", optax.adam(LR))
    state = optax.adam(LR).init({"head": variables["params"]["head"]})
    handed = to_optax(optimizer, state, module=module, template=variables)
    assert int(handed[0].count) == BEFORE
    moment = optimizer.state[module.head.weight]["exp_avg"]
    assert np.array_equal(handed[0].mu["head"]["kernel"], moment.numpy().T)


@pytest.mark.parametrize("way", ["mask", "wrt"])
def test_the_way_back_leaves_the_frozen_without_an_entry(way: str) -> None:
    module, optimizer = _started("adam")
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    tx = _partition(optax.adam(LR)) if way == "mask" else optax.adam(LR)
    fresh = nnx.Optimizer(twin, tx, wrt=nnx.Param if way == "mask" else TRAINED)
    handed = to_optax(optimizer, fresh, module=module, template=twin)
    back = to_optimizer_state(handed, optimizer, module=module, template=twin)
    was = optimizer.state_dict()["state"]
    assert back["state"].keys() == was.keys() == {2, 3}
    assert all(
        torch.equal(back["state"][n][name], value)
        for n, entry in was.items()
        for name, value in entry.items()
    )
    torch.optim.Adam(module.parameters()).load_state_dict(back)


def test_what_optax_freezes_and_torch_trains_is_refused_both_ways_without_moments_too() -> None:
    module, optimizer = _started("sgd")
    module.body.requires_grad_(True)
    _train(module, optimizer, DATA[:1])
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    for tx, wrt in ((_partition(optax.sgd(LR)), nnx.Param), (optax.sgd(LR), TRAINED)):
        state = nnx.Optimizer(twin, tx, wrt=wrt)
        for call in (
            lambda state=state: to_optax(optimizer, state, module=module, template=twin),
            lambda state=state: to_optimizer_state(state, optimizer, module=module, template=twin),
        ):
            with pytest.raises(
                errors.OptimizerStateError, match=r"'body\.kernel' is trained by the torch opt"
            ):
                call()


# --- parameters that never get a gradient ---------------------------------------------------------------


class Unused(Net):
    """A body that is trainable and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.pad(x, (0, 2)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_never_had_a_gradient_is_decayed_by_optax_and_not_by_torch_and_so_refused(
    momentum: float,
) -> None:
    module = Unused()
    optimizer = torch.optim.SGD(module.parameters(), LR, momentum=momentum, weight_decay=0.1)
    before = module.body.weight.detach().clone()
    _train(module, optimizer, DATA[:2])
    assert torch.equal(module.body.weight, before)
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    sgd = optax.sgd(LR, momentum or None)
    tx = optax.chain(optax.add_decayed_weights(0.1), sgd)
    with pytest.raises(
        errors.OptimizerStateError, match=r"'body\.kernel' is moved by optax and was never given"
    ):
        to_optax(optimizer, nnx.Optimizer(twin, tx, wrt=nnx.Param), module=module, template=twin)
    for good in (
        _partition(tx),
        sgd,
        optax.chain(optax.add_decayed_weights(0.1, lambda t: jax.tree.map("train".__eq__, _labels(t))), sgd),
    ):
        handed = to_optax(optimizer, nnx.Optimizer(twin, good, wrt=nnx.Param), module=module, template=twin)
        assert int(handed.step[...]) == 0
    params = to_flax(module, Linen().init(jax.random.key(0), jnp.zeros((1, 3))))
    with pytest.warns(FrozenWarning, match="body"):
        to_optax(optimizer, tx.init(params["params"]), module=module, template=params)


def test_a_module_without_anything_to_train_says_nothing_about_its_parts() -> None:
    module, optimizer = _started("sgd momentum decay", lambda m: m.requires_grad_(True).parameters())
    module.requires_grad_(False)
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    state = nnx.Optimizer(twin, KINDS["sgd momentum decay"][1], wrt=nnx.Param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_optax(optimizer, state, module=module, template=twin)


def test_a_transformation_that_cannot_be_tried_is_judged_by_its_state() -> None:
    def needs(updates: Any, state: Any, params: Any = None, *, loss_scale: Any, **extra: Any) -> Any:
        del params, extra, loss_scale
        return updates, state

    module, optimizer = _started("adam")
    twin = to_flax(module, Twin(nnx.Rngs(0)))
    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), needs)
    frozen = nnx.Optimizer(twin, optax.chain(_partition(optax.adam(LR)), scaled), wrt=nnx.Param)
    to_optax(optimizer, frozen, module=module, template=twin)
    masked = nnx.Optimizer(twin, optax.chain(_masked(optax.adam(LR)), scaled), wrt=nnx.Param)
    with pytest.warns(FrozenWarning, match=r"'body\.kernel', 'body\.bias'"):
        to_optax(optimizer, masked, module=module, template=twin)
