"""What a port refuses: all of it at once, each with its place, the reason, and a way out that works when typed."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from torchjax_bridge import parity, plan, port, to_flax
from torchjax_bridge.errors import ArgumentError, CheckpointError, PortError
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


@pytest.mark.every(3)
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


@pytest.mark.every(3)
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


class _Told(nn.Module):
    """One line makes numbers of a tensor; others compute with them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, first = x.mean().item(), float(x[0, 0])
        x = self.linear(x) * mean
        return x + 2 * first


def test_numbers_that_python_was_told_are_refused_once_where_it_asked() -> None:
    with pytest.raises(PortError) as refused:
        port(_Told(), torch.randn(2, 4))
    message = str(refused.value)
    assert "1 thing has no exact counterpart" in message
    assert "Tensor.item() and float() ask for values" in message
    assert "mean, first = x.mean().item()" in message


class _Beside(nn.Module):
    """Asks for values in one module; another one, that knows nothing of it, forgets a size."""

    def __init__(self) -> None:
        super().__init__()
        self.told, self.forgets = _Told(), _Forgets()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forgets(self.told(x))


class _Forgets(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * math.sqrt(x.shape[0])


def test_what_follows_from_no_value_is_refused_beside_it() -> None:
    with pytest.raises(PortError, match=r"2 things have(.|\n)*math\.sqrt\(n\)"):
        port(_Beside(), torch.randn(2, 4))


class _GivesArray(nn.Module):
    def forward(self, x: torch.Tensor) -> object:
        return x.detach().numpy()


class _GivesDevice(nn.Module):
    def forward(self, x: torch.Tensor) -> object:
        return x + 1, x.device


def test_a_result_that_jax_does_not_have_is_called_a_result() -> None:
    with pytest.raises(
        PortError, match=r"1 thing has(.|\n)*return x\.detach(.|\n)*numpy\(\) asks for values"
    ):
        port(_GivesArray(), torch.randn(2, 4))
    with pytest.raises(PortError, match="a result of type device has no counterpart"):
        port(_GivesDevice(), torch.randn(2, 4))
    line = inspect.getsourcelines(_GivesArray)[1] + 2
    with pytest.raises(PortError, match=r"return x\.detach(.|\n)*forward returns an array of NumPy"):
        port(_GivesArray(), torch.randn(2, 4), assume=[f"test_refusals.py:{line}"])


def test_a_port_of_a_module_on_meta_has_no_weights_to_save(tmp_path: Path) -> None:
    with torch.device("meta"):
        module, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    ported = port(module, x)
    with pytest.raises(CheckpointError, match="has no weights, since the module is on the meta device"):
        ported.save(tmp_path / "net.py", weights=tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    ported.save(tmp_path / "net.py")
    assert str(ported).startswith(f"Sequential: {len((tmp_path / 'net.py').read_text().splitlines())} lines")


def test_arrays_that_are_no_tensors_are_refused_in_the_same_words_everywhere() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    model = port(module, x).model
    words = "the inputs hold an ndarray, and the torch model takes tensors"
    for call in (
        lambda array: port(module, array),
        lambda array: plan(module, model, inputs=array),
        lambda array: to_flax(module, model, inputs=(array,)),
        lambda array: parity(module, model, array),
    ):
        with pytest.raises(ArgumentError, match=words):
            call(x.numpy())


class _TwoReaders(nn.Module):
    """One Linear reads a flattened map, and features that are none."""

    def __init__(self, map_first: bool) -> None:
        super().__init__()
        self.conv, self.up, self.dense = nn.Conv2d(3, 4, 3), nn.Linear(5, 16), nn.Linear(16, 2)
        self.map_first = map_first

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.map_first:
            first = self.dense(self.conv(x).flatten(1))
            return first + self.dense(self.up(y))
        return self.dense(self.up(y)) + self.dense(self.conv(x).flatten(1))


def test_a_layer_that_reads_a_map_and_other_features_is_refused_or_given_the_map_as_in_torch() -> None:
    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    for verify in (True, False):
        with pytest.raises(
            PortError, match="'dense' is given a flattened map in one call, and other features"
        ):
            port(_TwoReaders(True), *inputs, verify=verify)
    assert port(_TwoReaders(True), *inputs, keep=["dense"]).proof is not None
    assert "jnp.transpose(" in port(_TwoReaders(False), *inputs).source
