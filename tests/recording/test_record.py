"""What a recording holds of a run."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchjax_bridge.recording import Argument, Attribute, Operation, SizeOf, Value, record


class _Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.groups = 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        n, c, h, w = y.shape
        return y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, -1)


def test_sizes_and_attributes_are_known_where_they_are_used() -> None:
    top = record(_Shuffle(), (torch.ones(2, 3, 5, 5),)).top
    view = next(node for node in top.nodes if node.function == "torch.Tensor.view")
    value, n, groups, rest, *_ = view.args
    assert isinstance(value, Value)
    assert n.expression == SizeOf(value, 0)
    assert groups.expression == Attribute("", "groups")
    assert rest.expression == Operation("//", SizeOf(value, 1), Attribute("", "groups"))
    assert (n, groups, rest) == (2, 2, 2)


def test_the_module_and_its_inputs_are_what_they_were() -> None:
    module, x = _Shuffle().train(), torch.randn(2, 3, 5, 5)
    kept, state = x.clone(), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    record(module, (x,))
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert type(module.groups) is int
    assert module.training
    assert not module._forward_hooks
    assert not module.conv._forward_pre_hooks


def test_a_layer_is_one_call_and_another_module_a_frame() -> None:
    top = record(_Shuffle(), (torch.ones(2, 3, 5, 5),)).top
    conv, act = top.nodes[:2]
    assert (conv.path, conv.frame) == ("conv", None)
    assert act.frame is not None
    assert [node.function for node in act.frame.nodes] == ["torch.nn.functional.relu"]
    assert act.frame.nodes[0].inplace


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return self.relu(y) + y


def test_a_tensor_that_a_child_wrote_to_is_the_new_value() -> None:
    top = record(_InPlace(), (torch.ones(2),)).top
    add = top.nodes[-1]
    assert add.args[0] is add.args[1]
    assert add.args[0].origin is top.nodes[1]


class _View(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1).add_(1)
        return y


def test_a_write_through_a_view_is_a_new_value_of_the_whole() -> None:
    recording = record(_View(), (torch.ones(2, 3),))
    assert not recording.faults
    *_, added, whole = recording.top.nodes
    assert (added.function, whole.function) == ("torch.Tensor.add_", "torch.Tensor.reshape")
    assert whole.args[0] is added.result
    assert recording.top.result is whole.result


class _Diagonal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        torch.diagonal(y).add_(1)
        return y


def test_a_write_through_a_view_of_another_kind_is_a_fault() -> None:
    (fault,) = record(_Diagonal(), (torch.ones(2, 2),)).faults
    assert "through a view" in fault.reason
    assert fault.source.text == "torch.diagonal(y).add_(1)"


class _Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 3

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.limit:
            x = x + 1
        return x * 2 if bool((x > 0).all()) else x


def test_what_code_decides_is_known() -> None:
    by_size, by_value = record(_Decides(), (torch.ones(2, 4),)).decisions
    assert by_size.by_size
    assert by_size.outcome
    assert by_size.source.text == "if x.shape[1] > self.limit:"
    assert not by_value.by_size
    assert by_value.reason == "bool()"


class _Passes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.inner(x, x.shape[1])
        return y.reshape(size, -1)


class _Inner(nn.Module):
    def forward(self, x: Tensor, size: int) -> tuple[Tensor, int]:
        return F.relu(x).reshape(size, -1), x.shape[0]


def test_sizes_keep_an_origin_where_modules_pass_them() -> None:
    top = record(_Passes(), (torch.ones(2, 4),)).top
    inner, outer = top.nodes
    assert inner.frame is not None
    assert inner.frame.nodes[1].args[1].expression == Argument("size")
    assert outer.args[1].expression.value is inner.result[1]


def test_a_module_is_recorded_without_values_on_the_meta_device() -> None:
    with torch.device("meta"):
        module, x = _Shuffle(), torch.ones(2, 3, 5, 5)
    top = record(module, (x,)).top
    assert top.result.shape == (2, 100)
