"""What forward does beside its output: it stops gradients, changes buffers, reads lists of parameters."""

import ast

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchjax_bridge import port, to_flax, to_state_dict
from torchjax_bridge.errors import PortError
from torchjax_bridge.porting._format import formatted

from .steps import flax_step, furthest, torch_step


class Quantized(nn.Module):
    """A straight-through estimator, and a target that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.encoder(x)
        q = z + (torch.round(z) - z).detach()
        return self.head(q), self.head(z.detach()) + z.data


class Averaged(nn.Module):
    """A mean over steps, kept by the module itself."""

    average: torch.Tensor

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))
        self.always = always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        y = x - self.average
        if self.training or self.always:
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return y


class Assigned(Averaged):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - self.average


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))})
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in self.scales:
            x = self.fc(x * scale)
        return x + self.named["shift"]


class Alike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder_of_both = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        anchor = self.encoder_of_both(x)
        return F.cosine_similarity(anchor, self.encoder_of_both(2 * x))


@pytest.mark.parametrize("kind", [Quantized, Listed, Alike], ids=lambda kind: kind.__name__)
def test_gradients_are_those_of_torch(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, x = kind(), torch.randn(3, 4)
    ported = port(module, x, training="required")
    got, want = flax_step(ported, ported.model, module, x), torch_step(module, x)
    assert furthest(got.gradients, want.gradients)[0] <= 1e-4


class Decoder(nn.Module):
    """A map is made of what a Linear gives, which another one reads as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 4 * 2 * 3)
        self.mean = nn.Linear(24, 5)
        self.up = nn.ConvTranspose2d(4, 3, 3, 2)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.relu(self.wide(z))
        return self.up(hidden.view(-1, 4, 2, 3)), self.mean(hidden)


def test_a_map_that_is_made_of_the_output_of_a_linear_needs_no_answer() -> None:
    module = Decoder()
    ported = port(module, torch.randn(2, 4))
    back = to_state_dict(to_flax(module, ported.model, rules=ported.rules), module, rules=ported.rules)
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.fc(x).view(2, x.shape[0] // 2, 4)
        return (one * two).sum(1)


def test_a_module_for_even_batches_is_tried_with_another_even_batch() -> None:
    module = Pairs()
    ported = port(module, torch.randn(4, 4))
    assert not ported.notes
    x = torch.randn(6, 4)
    want = module(x).detach().numpy()
    assert np.abs(np.asarray(ported.model(jnp.asarray(x.numpy()))) - want).max() <= 1e-5


@pytest.mark.parametrize("kind", [Averaged, Assigned], ids=lambda kind: kind.__name__)
def test_a_buffer_that_forward_changes_in_training_leaves_a_port_that_evaluates(
    kind: type[nn.Module],
) -> None:
    ported = port(kind(), torch.randn(3, 4))
    assert any("'average'" in note for note in ported.notes)
    with pytest.raises(PortError, match="'average'"):
        port(kind(), torch.randn(3, 4), training="required")


def test_a_buffer_that_forward_changes_in_both_modes_is_refused() -> None:
    with pytest.raises(PortError, match="changes the buffer 'average'"):
        port(Averaged(always=True), torch.randn(3, 4))


class Replaced(Averaged):
    """A buffer whose data become others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.training or self.always:
            self.average.data = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return x - self.average


class Counted(Averaged):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.always:
            self.average.data += 1
        return self.fc(x)


@pytest.mark.parametrize("kind", [Replaced, Counted], ids=lambda kind: kind.__name__)
def test_data_that_a_buffer_is_given_are_a_change_of_it(kind: type[Averaged]) -> None:
    with pytest.raises(PortError, match=r"test_writes.py:\d+: .*\n  forward changes the buffer 'average'"):
        port(kind(always=True), torch.randn(3, 4))
    module = kind()
    [note] = port(module, torch.randn(3, 4)).notes
    assert note.startswith("evaluation only: forward changes the buffer 'average'")
    assert not module.average.any()


@pytest.mark.parametrize(
    "line",
    [
        "return f(aaaaaaaaaaaaaaaa) / (gggggggggggg(bbbbbbb, ccccccc) * gggggggggggg(ddddddd, eeeeeeee))",
        "y = xxxxxxxxxxxxxxxxx[gggggggggggg(bbbbbbbbbbbbb, ccccccccccccccc) * gggggggggggg(ddddddd, eeeeeeee)]",
        "return (gggggggggggg(bbbbbbbbbbbbb, ccccccccccccccc) + gggggggggggg(ddddddd, eeeeeeee)) * 2",
    ],
)
@pytest.mark.parametrize("limit", [20, 40, 60])
def test_a_line_that_is_split_means_the_same(line: str, limit: int) -> None:
    assert ast.dump(ast.parse("\n".join(formatted([line], limit)))) == ast.dump(ast.parse(line))
