import importlib.util

import pytest
import torch
from torch import nn

from benchmarks.port._forward import leaves
from benchmarks.port.zoo import NEEDS, SETS, Entry, find, perturb


class Hidden(nn.Module):
    """What a fresh model may hold: a head of zeros, a tiny scale, a token, statistics as they begin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)
        self.tied = self.head
        nn.init.zeros_(self.head.weight)
        nn.init.normal_(self.table.weight, std=0.02)


def test_nothing_of_a_perturbed_model_is_constant_or_tiny():
    module = perturb(Hidden(), 0)
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.std() > 0.01, name
            assert tensor.abs().max() > 0.05, name
            assert tensor.isfinite().all(), name
    assert (module.bn.running_var > 0.5).all()
    assert module.conv.weight.square().mean().item() == pytest.approx(2 / 27, rel=1e-4)


def test_the_seed_alone_decides_what_is_drawn():
    torch.manual_seed(0)
    first = Hidden().state_dict()
    states = []
    for seed in (3, 3, 4):
        module = Hidden()
        module.load_state_dict(first)
        states.append(perturb(module, seed).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in first)
    assert not torch.equal(states[0]["bn.running_mean"], states[2]["bn.running_mean"])


def test_a_parameter_with_two_names_is_changed_once():
    module = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
    module[1].bias = module[0].bias
    nn.init.ones_(module[0].bias)
    perturb(module, 0)
    assert (module[0].bias > 0.6).all()
    assert (module[0].bias < 1.4).all()


def test_statistics_are_near_those_of_the_inputs_and_not_the_same():
    entry = Entry(
        "a set", "a model", lambda: nn.BatchNorm1d(50), lambda batch: (7 * torch.randn(64, 50) + 90,)
    )
    module = entry.build()
    assert module.running_mean.mean() == pytest.approx(90, rel=0.1)
    assert module.running_var.sqrt().mean() == pytest.approx(7, rel=0.2)
    assert module.running_var.std() > 5
    assert module.momentum == 0.1
    assert not module.training


def test_the_sets_have_as_many_models_as_the_table_is_to_have():
    counts = {name: len({entry.name for entry in build()}) for name, build in SETS.items()}
    assert counts == {
        "example": 2,
        "cifar": 20,
        "torchvision": 40,
        "segmentation": 3,
        "timm": 60,
        "transformers": 12,
    }


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(LookupError, match="cifar has no model 'alexnet'"):
        find("cifar", "alexnet")


def _models():
    for name, build in SETS.items():
        missing = name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None
        marks = [pytest.mark.skipif(missing, reason=f"{NEEDS.get(name)} is not installed")]
        if name not in ("example", "cifar", "transformers"):
            marks.append(pytest.mark.slow)
        for entry in build():
            yield pytest.param(entry, id=f"{name}-{entry.name}", marks=marks)


@pytest.mark.every(3)
@pytest.mark.parametrize("entry", list(_models()))
@pytest.mark.filterwarnings("ignore")
def test_a_model_runs_at_two_batch_sizes_and_heeds_what_it_is_given(entry):
    module = entry.build()
    assert not module.training
    with torch.no_grad():
        outputs = [one for one in leaves(module(*entry.inputs(2))) if one.is_floating_point()]
        others = [one for one in leaves(module(*entry.inputs(3))) if one.is_floating_point()]
    assert all(one.isfinite().all() for one in outputs)
    assert max(one.abs().max() for one in outputs) < 1e8
    largest = outputs[0]
    assert (largest[0] - largest[1]).abs().max() > 1e-3 * largest.abs().max()
    assert others[0].shape[0] == 3
