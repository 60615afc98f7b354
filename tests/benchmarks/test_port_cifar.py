import pytest
import torch

from benchmarks.port.cifar import BUILDERS


def test_there_are_twenty_architectures():
    assert len(BUILDERS) == 20


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("train", [False, True])
def test_an_architecture_gives_ten_logits_for_each_image(name: str, train: bool):
    torch.manual_seed(0)
    model = BUILDERS[name]().train(train)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])
