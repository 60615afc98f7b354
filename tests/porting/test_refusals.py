"""What a port refuses: all of it at once, each with its place, the reason, and a way out that works when typed."""

import inspect
import re

import pytest
import torch
from torch import nn

from torchjax_bridge import port
from torchjax_bridge.errors import ArgumentError, PortError
from torchjax_bridge.porting.operations._table import TABLE

from . import planted
from .planted import EXPECTED, faulty


def _message() -> str:
    with pytest.raises(PortError) as caught:
        port(faulty(), torch.randn(2, 4, 6, 6))
    return str(caught.value)


@pytest.fixture(scope="module")
def message() -> str:
    return _message()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_refusal_names_the_module_the_line_and_the_reason(message: str, name: str) -> None:
    text, reason = EXPECTED[name]
    items = [item for item in message.split("\n- ")[1:] if re.search(rf"'{name}[.']", item.partition(":")[0])]
    assert any(text in item and reason in item for item in items), "\n".join(items) or message
    assert name == "parametrized" or any(re.search(r", planted\.py:\d+: ", item) for item in items)


def test_the_ways_out_of_a_refusal_work_as_they_are_written(message: str) -> None:
    keep = [name for found in re.findall(r"keep=(\[.*?\])", message) for name in eval(found)]
    ops = eval(re.search(r"ops=(\{.*?\"\})", message)[1])
    assume = eval(re.search(r"assume=(\[.*?\])", message)[1])
    others = [name for name in keep if name not in ("spectrum", "by_value")]
    assert len(others) == len(keep) - 2
    ported = port(faulty(), torch.randn(2, 4, 6, 6), ops=ops, keep=others, assume=assume)
    assert assume[0] in ported.source
    assert all(check.difference <= 1e-5 for check in ported.proof.checks)
    assert "import torch" not in ported.source


def test_a_line_of_several_modules_is_reported_once() -> None:
    model = nn.Sequential(planted.Part(planted.spectrum), planted.Part(planted.spectrum))
    with pytest.raises(PortError, match=r"1 thing has(.|\n)*'0' and '1'(.|\n)*keep=\['0', '1'\]"):
        port(model, torch.randn(2, 4, 6, 6))


def test_a_line_of_the_model_itself_is_refused_with_the_way_to_a_module() -> None:
    with pytest.raises(PortError, match=r"in the model itself, planted\.py(.|\n)*a module of its own"):
        port(planted.Part(planted.spectrum), torch.randn(2, 4, 6, 6))


def test_an_own_translation_is_text_or_a_function_of_texts() -> None:
    for own in (
        "jax.scipy.special.polygamma({0}, {1})",
        lambda n, x: f"jax.scipy.special.polygamma({n}, {x})",
    ):
        ported = port(planted.Part(planted.spectrum), torch.randn(2, 4, 6, 6), ops={torch.polygamma: own})
        assert "jax.scipy.special.polygamma(" in ported.source


def test_a_wrong_translation_of_the_users_is_not_returned() -> None:
    with pytest.raises(PortError, match="differs from torch"):
        port(
            planted.Part(planted.spectrum),
            torch.randn(2, 4, 6, 6),
            ops={torch.polygamma: "2 * jax.scipy.special.polygamma({0}, {1})"},
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["part"]}, "no module of the model; it has '0'"),
        ({"keep": "0"}, r"takes a list of paths, such as \['0'\]"),
        ({"modules": {nn.LSTM: planted.FlaxSpectrum}}, "no module of the model is of that class"),
        ({"modules": {planted.Part: nn.Linear}}, "takes a subclass of nnx.Module"),
        ({"modules": {planted.Part: "planted:Nothing"}}, "cannot import Nothing"),
        ({"modules": {planted.Part: lambda layer: 3}}, "gives 3 for Part"),
        ({"ops": {torch.polygamma: 3}}, "takes torch functions"),
    ],
    ids=["path", "text", "unused class", "torch class", "no such name", "number", "no translation"],
)
def test_a_way_out_that_is_typed_wrongly_is_refused_by_name(options: dict, words: str) -> None:
    model = nn.Sequential(planted.Part(planted.spectrum))
    model.append(nn.Identity())
    model.append(planted.Part(planted.spectrum))
    model.head = nn.Identity()
    with pytest.raises(ArgumentError, match=words):
        port(model, torch.randn(2, 4, 6, 6), **options)


def test_a_translation_that_fails_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(at: object, node: object, input: object) -> None:
        raise ValueError("max() arg is an empty sequence")

    monkeypatch.setitem(TABLE, "expm1", (fails, inspect.signature(fails)))
    net = nn.Sequential(planted.Part(lambda part, x: torch.expm1(x)), nn.ReLU())
    with pytest.raises(
        PortError, match=r"test_refusals\.py:\d+(.|\n)*expm1 fails(.|\n)*report it(.|\n)*keep=\['0'\]"
    ):
        port(net, torch.randn(2, 4, 6, 6))


class _Layers(nn.Module):
    """Layers without a Flax twin, of which some are code of the model's class."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.back = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.blocks = nn.ModuleList([nn.LSTM(4, 6, proj_size=4, batch_first=True)])
        self.reader = nn.MultiheadAttention(4, 2, kdim=4, vdim=5, batch_first=True)

    def forward(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        x = self.back(*self.pool(x)).mean(1)
        x, _ = self.blocks[0](x)
        return self.reader(x, x, values)[0]


class _Mapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: torch.tanh(row) * row)(x)


class _Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(torch.tanh(self.energy(x)).sum(), x, create_graph=True)[0]


class _Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.part(x))


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (_Layers(), (torch.randn(2, 3, 4, 4), torch.randn(2, 4, 5))),
        (_Around(_Mapped()), (torch.randn(3, 4),)),
        (_Around(_Slope()), (torch.randn(3, 4),)),
    ],
    ids=["layers", "vmap", "gradient"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_a_refusal_tells_to_keep_makes_the_port_hold(
    module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    with pytest.raises((PortError, ArgumentError)) as refused:
        port(module.eval(), *inputs)
    told = [path for paths in re.findall(r"keep=(\[.*?\])", str(refused.value)) for path in eval(paths)]
    assert "fails on these inputs" not in str(refused.value)
    assert port(module, *inputs, keep=told).proof is not None
