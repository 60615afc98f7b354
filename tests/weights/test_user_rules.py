"""What the caller says about layers: refused at once where it is nothing, asked for where classes do not tell."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

from torchjax_bridge import audit, errors, plan, to_flax, to_state_dict
from torchjax_bridge.weights import Entry, Flatten, LayerType, PairingWarning, Permute, Rename, Rule, layers

# --- what is no rule -----------------------------------------------------------------------------------

DENSE = [Entry("weight", "kernel", Permute((1, 0))), Entry("bias", "bias")]

Make = Callable[[], Any]
NO_RULES: list[tuple[Make, str]] = [
    (lambda: Rename("a", 3), "two dotted names"),
    (lambda: Rename(nn.Linear, "a"), "two dotted names"),
    (lambda: LayerType(3, nn.Linear), "LayerType"),
    (lambda: LayerType("fc", nnx.Linear), "a torch class"),
    (lambda: Flatten(3, (2, 2)), "Flatten"),
    (lambda: Flatten("fc", (2, 2), output="yes"), "output=True or False"),
    (lambda: Rule("Linear", DENSE), "a torch class such as nn.Linear"),
    (lambda: Rule((nn.Linear, "Conv2d"), DENSE), "a torch class such as nn.Linear"),
    (lambda: Rule(nnx.Linear, DENSE), "a torch class such as nn.Linear"),
    (lambda: Rule(nn.Linear, None), "a list of Entry"),
    (lambda: Rule(nn.Linear, DENSE[0]), "a list of Entry"),
    (lambda: Rule(nn.Linear, [("weight", "kernel")]), "a list of Entry"),
    (lambda: Rule(nn.Linear, DENSE, flax_types="Linear"), "a tuple of names"),
    (lambda: Entry("weight", 3), "for flax"),
    (lambda: Entry(3, "kernel"), "for torch"),
    (lambda: Entry("weight", "kernel", (1, 0)), "a Layout"),
]


@pytest.mark.parametrize(("make", "words"), NO_RULES, ids=[str(place) for place in range(len(NO_RULES))])
def test_a_rule_of_the_wrong_parts_is_refused_where_it_is_written(make: Make, words: str) -> None:
    with pytest.raises(errors.PlanError, match=words):
        make()


@pytest.mark.parametrize("rules", [None, 5, "fc1", nn.Linear, {"a": "b"}, [Rename]])
def test_rules_that_are_no_rules_are_refused(rules: Any) -> None:
    with pytest.raises(errors.PlanError, match="is no rule: pass a list"):
        plan(nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rules=rules)


def test_a_function_of_a_rule_that_gives_nothing_is_named() -> None:
    with pytest.raises(errors.PlanError, match=r"function of Rule\(Linear"):
        to_flax(
            nn.Linear(2, 3), nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rules=[Rule(nn.Linear, lambda layer: None)]
        )


# --- a forward of its own ------------------------------------------------------------------------------


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, 2 * self.weight, self.bias)


class Standardised(nn.Conv1d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Zeroed(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def linear() -> nnx.Linear:
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def conv() -> nnx.Conv:
    return nnx.Conv(2, 3, (3,), padding="VALID", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("module", "twin"), [(Doubling(2, 3), linear), (Standardised(2, 3, 3), conv)])
def test_a_subclass_with_a_forward_of_its_own_is_warned_of(
    module: nn.Module, twin: Callable[[], nnx.Module]
) -> None:
    with pytest.warns(PairingWarning, match=f"a forward of {type(module).__name__}'s own"):
        filled = to_flax(module, twin())
    with pytest.warns(PairingWarning, match="its own|'s own"):
        back = to_state_dict(filled, module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_a_layer_type_says_that_a_subclass_computes_the_same() -> None:
    assert not plan(Doubling(2, 3), linear(), rules=[LayerType("", nn.Linear)]).assumed


def test_a_rule_for_the_subclass_says_where_its_tensors_go() -> None:
    assert not plan(Doubling(2, 3), linear(), rules=[Rule(Doubling, DENSE)]).assumed
    assert plan(Doubling(2, 3), linear(), rules=[Rule(nn.Linear, DENSE)]).assumed


def test_a_subclass_that_only_starts_otherwise_makes_no_noise() -> None:
    assert not plan(Zeroed(2, 3), linear()).assumed


def test_a_forward_that_was_replaced_on_the_instance_is_warned_of() -> None:
    module = nn.Linear(2, 3)
    module.forward = lambda x: 2 * functional.linear(x, module.weight, module.bias)  # type: ignore[method-assign]
    with pytest.warns(PairingWarning, match="a forward of Linear's own"):
        to_flax(module, linear())


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_of_a_layer_are_warned_of(register: str) -> None:
    module = nn.Linear(2, 3)
    handle = getattr(module, register)(lambda *given: None)
    with pytest.warns(PairingWarning, match="hooks, which do not cross"):
        to_flax(module, linear())
    assert not plan(module, linear(), rules=[LayerType("", nn.Linear)]).assumed
    handle.remove()
    assert not plan(module, linear()).assumed


def test_torchs_own_hooks_and_parametrizations_are_for_the_rules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hooked = weight_norm(nn.Linear(2, 3))
    for module in (hooked, parametrizations.weight_norm(nn.Linear(2, 3))):
        assert not plan(module, linear()).assumed


# --- parameters and buffers ------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Buffer(torch.randn(3))
        self.scale = nn.Parameter(torch.randn(2))


class NnxTable(nnx.Module):
    def __init__(self, positions: type[nnx.Variable], scale: type[nnx.Variable]) -> None:
        self.positions, self.scale = positions(jnp.zeros(3)), scale(jnp.zeros(2))


def test_a_buffer_that_becomes_a_parameter_is_noted_and_so_is_the_reverse() -> None:
    made = plan(Table(), NnxTable(nnx.Param, nnx.Variable))
    assert made.ok
    assert any("positions: a buffer in torch and a parameter in Flax" in note for note in made.notes)
    assert any("scale: a parameter in torch and in 'Variable' in Flax" in note for note in made.notes)
    assert not plan(Table(), NnxTable(nnx.Variable, nnx.Param)).notes
    assert not plan(Table().state_dict(), NnxTable(nnx.Param, nnx.Param)).notes


# --- a __call__ of its own -------------------------------------------------------------------------------


class NnxDoubling(nnx.Linear):
    def __call__(self, x: Any, out_sharding: Any = None) -> Any:
        return 2 * super().__call__(x)


class NnxRenamed(nnx.Linear):
    pass


class NnxCell(nnx.OptimizedLSTMCell):
    def __call__(self, carry: Any, x: Any) -> Any:
        return super().__call__(carry, 2 * x)


class LinenDoubling(linen.Dense):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return 2 * super().__call__(x)


class LinenRenamed(linen.Dense):
    pass


class OneLayer(linen.Module):
    layer: type[linen.Dense]
    named: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return self.layer(3, name="fc" if self.named else None)(x)


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)


X = jnp.zeros((1, 2))


def test_a_call_of_its_own_in_flax_is_warned_of_until_a_layer_type_settles_it() -> None:
    twin, module = NnxDoubling(2, 3, rngs=nnx.Rngs(0)), nn.Linear(2, 3)
    with pytest.warns(PairingWarning, match="a __call__ of NnxDoubling's own.*to act like that of Linear"):
        filled = to_flax(module, twin)
    with pytest.warns(PairingWarning, match="NnxDoubling's own"):
        to_state_dict(filled, module)
    with pytest.warns(PairingWarning, match="NnxDoubling's own"):
        to_flax(module.state_dict(), twin)
    assert not plan(module, twin, rules=[LayerType("", nn.Linear)]).assumed
    assert not plan(module, twin, rules=[Rule(nn.Linear, DENSE)]).assumed
    assert not plan(module, NnxRenamed(2, 3, rngs=nnx.Rngs(0))).assumed


def test_a_cell_with_a_call_of_its_own_is_warned_of_inside_its_rnn() -> None:
    twin = nnx.RNN(NnxCell(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    assert any("NnxCell's own" in text for text in plan(nn.LSTM(2, 3), twin).assumed)


def test_the_layers_of_this_library_are_taken_at_their_word() -> None:
    assert not plan(nn.BatchNorm1d(3), layers.nnx.BatchNorm(3, rngs=nnx.Rngs(0))).assumed
    variables = layers.linen.BatchNorm(use_running_average=True).init(jax.random.key(0), X)
    assert not plan(nn.BatchNorm1d(2), variables).assumed


@pytest.mark.parametrize("layer", [LinenDoubling, LinenRenamed])
def test_an_automatic_name_of_linen_that_is_no_class_of_flax_s_is_warned_of(layer: type[linen.Dense]) -> None:
    variables = OneLayer(layer).init(jax.random.key(0), X)
    (assumed,) = plan(OneLinear(), variables).assumed
    assert f"named for a class that is not Flax's ({layer.__name__})" in assumed
    assert not plan(OneLinear(), variables, rules=[LayerType("fc", nn.Linear)]).assumed


@pytest.mark.parametrize("lift", [linen.jit, linen.remat])
def test_a_layer_of_flax_s_that_was_lifted_is_still_one(lift: Any) -> None:
    assert not plan(OneLinear(), OneLayer(lift(linen.Dense)).init(jax.random.key(0), X)).assumed


def test_the_audit_sees_a_call_of_its_own_that_linen_s_variables_do_not_show() -> None:
    module, twin = OneLinear(), OneLayer(LinenDoubling, named=True)
    assert not plan(module, twin.init(jax.random.key(0), X)).assumed
    with pytest.warns(PairingWarning, match="LinenDoubling's own.*to act like that of Dense"):
        found = audit(module, twin, X)
    assert "assumed: 'fc' (Linear): its twin has a __call__ of LinenDoubling's own" in str(found)
    assert not audit(module, twin, X, rules=[LayerType("fc", nn.Linear)]).assumed
    assert not audit(module, OneLayer(LinenRenamed, named=True), X).assumed


class NnxOwn(nnx.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        self.kernel, self.bias = nnx.Param(jnp.zeros((inputs, outputs))), nnx.Param(jnp.zeros(outputs))


def test_a_square_kernel_of_a_class_that_is_not_flax_s_is_warned_of() -> None:
    module, twin = nn.Linear(3, 3), NnxOwn(3, 3)
    with pytest.warns(PairingWarning, match=r"'kernel' of a class of your own \(NnxOwn\) is square"):
        to_flax(module, twin)
    assert not plan(module, twin, rules=[LayerType("", nn.Linear)]).assumed
    assert not plan(module, twin, rules=[Rule(nn.Linear, DENSE)]).assumed
    assert not plan(nn.Linear(2, 3), NnxOwn(2, 3)).assumed  # the shape tells
    assert not plan(module, NnxRenamed(3, 3, rngs=nnx.Rngs(0))).assumed
