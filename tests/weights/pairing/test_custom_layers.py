"""Layers of one's own: the rule that a plan prints fits by their shapes, works as it stands, and is one a class."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from torchjax_bridge import errors, plan, to_flax, to_state_dict, weights

RNGS = nnx.Rngs(0)


class InputMajor(nn.Module):
    """As GPT-2's Conv1D."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class OutputMajor(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(out, width)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.W.T + self.b


class Masked(OutputMajor):
    """With a buffer that Flax does not have."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.register_buffer("seen", torch.ones(3, 3))


class Filters(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.filters, self.shift = nn.Parameter(torch.randn(out, width, 3, 2)), nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv2d(x.permute(0, 3, 1, 2), self.filters, self.shift)
        return y.permute(0, 2, 3, 1)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(10, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vectors[x.long()]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (4,), eps=1e-6) * self.g


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))


def _lines(report: str) -> list[list[Any]]:
    """What is proposed, evaluated as it stands: ``from torchjax_bridge.weights import *`` and the classes."""
    names = {**vars(weights), **globals()}
    return [eval(found, names) for found in re.findall(r"rules=(\[(?:[^\[\]]|\[[^\]]*\])*\])", report)]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[int, ...]]] = {
    "input-major": (lambda: InputMajor(4, 6), lambda: nnx.Linear(4, 6, rngs=RNGS), (3, 4)),
    "other names": (lambda: OutputMajor(4, 6), lambda: nnx.Linear(4, 6, rngs=RNGS), (3, 4)),
    "heads": (lambda: OutputMajor(4, 6), lambda: nnx.LinearGeneral(4, (3, 2), rngs=RNGS), (3, 4)),
    "input-major heads": (lambda: InputMajor(4, 6), lambda: nnx.LinearGeneral(4, (3, 2), rngs=RNGS), (3, 4)),
    "a buffer": (lambda: Masked(4, 6), lambda: nnx.Linear(4, 6, rngs=RNGS), (3, 4)),
    "convolution": (
        lambda: Filters(4, 6), lambda: nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=RNGS), (2, 5, 5, 4),
    ),
    "embedding": (lambda: Table(), lambda: nnx.Embed(10, 4, rngs=RNGS), ()),
    "norm": (lambda: Gain(), lambda: nnx.RMSNorm(4, rngs=RNGS), (2, 3, 4)),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CASES)
def test_the_one_rule_that_fits_works_as_it_is_printed(name: str) -> None:
    make, twin, shape = CASES[name]
    module = nn.ModuleDict({"a": make()})
    template = nnx.Dict(a=twin())
    report = str(plan(module, template).report)
    assert report.count("\n") == 0
    (rules,) = _lines(report)
    filled = to_flax(module, template, rules=rules)
    x = torch.randn(shape) if shape else torch.arange(10)
    with jax.default_matmul_precision("highest"):
        got = np.array(filled.a(jnp.asarray(x.numpy())))
    want = module["a"](x).detach().numpy()
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
    back = to_state_dict(filled, module, rules=rules)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("kind", [InputMajor, OutputMajor])
def test_a_square_matrix_is_asked_about_with_both_rules(kind: Any) -> None:
    module, template = nn.ModuleDict({"a": kind(4, 4)}), nnx.Dict(a=nnx.Linear(4, 4, rngs=RNGS))
    report = str(plan(module, template).report)
    plain, turned = _lines(report)
    name = "weight" if kind is InputMajor else "W"
    assert f"for x @ {name}, or rules" in report
    assert f"for x @ {name}.T" in report
    rules = plain if kind is InputMajor else turned
    filled, x = to_flax(module, template, rules=rules), torch.randn(3, 4)
    np.testing.assert_allclose(filled.a(x.numpy()), module["a"](x).detach(), atol=1e-5)


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_one_message_speaks_of_all_layers_of_a_class(flavour: str, renamed: bool) -> None:
    sizes = [(4, 4), (4, 6), (6, 4)] * 4
    module = nn.ModuleList([InputMajor(*size) for size in sizes])
    if flavour == "nnx":
        template: Any = nnx.List([nnx.Linear(*size, rngs=RNGS) for size in sizes])
    else:
        stem = "Dense_" if renamed else ""
        kernels = {
            f"{stem}{i}": {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for i, s in enumerate(sizes)
        }
        template = {"params": kernels}
    report = str(plan(module, template).report)
    assert report.count("\n") == 0
    assert "and 8 more (InputMajor): a class of your own" in report
    (rules,) = _lines(report)  # those that are not square say it for the class
    assert plan(module, template, rules=rules).ok


def test_norms_of_ones_own_in_blocks_are_one_pattern() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = Norm(), nn.Linear(4, 4)

    module = nn.ModuleDict({"blocks": nn.ModuleList([Block() for _ in range(3)]), "last": Norm()})
    blocks = nnx.List(
        [nnx.Dict(norm=nnx.RMSNorm(4, rngs=RNGS), fc=nnx.Linear(4, 4, rngs=RNGS)) for _ in range(3)]
    )
    template = nnx.Dict(blocks=blocks, last=nnx.RMSNorm(4, rngs=RNGS))
    report = str(plan(module, template).report)
    assert 'rules=[LayerType("blocks.*.norm", nn.RMSNorm), LayerType("last", nn.RMSNorm)]' in report
    for rules in _lines(report):
        assert plan(module, template, rules=rules).ok
    module["blocks"][1].norm = nn.Identity()  # type: ignore[union-attr]
    module["blocks"][1].register_parameter("bias", nn.Parameter(torch.zeros(2)))  # type: ignore[union-attr]
    assert 'LayerType("blocks.*.norm"' not in str(plan(module, template).report)


def test_shapes_that_no_one_list_of_entries_fits_ask_for_a_function() -> None:
    module = nn.ModuleDict({"a": InputMajor(4, 6), "b": InputMajor(4, 6)})
    template = nnx.Dict(a=nnx.Linear(4, 6, rngs=RNGS), b=nnx.LinearGeneral(4, (2, 3), rngs=RNGS))
    report = str(plan(module, template).report)
    assert "no one list of entries fits all their shapes" in report
    assert not re.search(r"Entry\(\"", report)


def test_tensors_of_one_shape_are_not_told_apart_by_it() -> None:
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.beta = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    module, template = nn.ModuleDict({"a": Affine()}), nnx.Dict(a=nnx.LayerNorm(4, rngs=RNGS))
    report = str(plan(module, template).report)
    for order in (
        '[Entry("alpha", "scale"), Entry("beta", "bias")]',
        '[Entry("alpha", "bias"), Entry("beta", "scale")]',
    ):
        assert order in report
    with pytest.raises(errors.PlanError, match="leave open where its tensors go"):
        to_flax(module, template)


def test_linens_own_scope_is_read_likewise() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.DenseGeneral((2, 3), name="a")(x)

    module, net, x = nn.ModuleDict({"a": OutputMajor(4, 6)}), Net(), torch.randn(5, 4)
    variables = net.init(jax.random.key(0), x.numpy())
    (rules,) = _lines(str(plan(module, variables).report))
    got = net.apply(to_flax(module, variables, rules=rules), x.numpy())
    np.testing.assert_allclose(np.array(got).reshape(5, 6), module["a"](x).detach(), atol=1e-5)
