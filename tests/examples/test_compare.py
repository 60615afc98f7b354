"""Two results: their numbers, and that a disagreement is named."""

import numpy as np
import pytest
import torch

from examples.cifar10.compare import ForwardResult, count_agreeing, disagreements, max_difference, run_timed

LABELS = np.array([0, 1, 2], np.uint8)


def result(**at: float) -> ForwardResult:
    logits = np.eye(3, 10, dtype=np.float32) * 5
    for place, value in at.items():
        logits[int(place[1]), int(place[2])] = value
    return ForwardResult(logits, 1.0)


def test_accuracy_and_loss_are_those_of_torch() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 10)).astype(np.float32) * 30
    labels = generator.integers(0, 10, 50).astype(np.uint8)
    seen = ForwardResult(logits, 0.0)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert seen.loss(labels) == pytest.approx(loss.item(), rel=1e-5)
    assert seen.accuracy(labels) == (logits.argmax(1) == labels).mean()


def test_what_agrees_has_no_faults() -> None:
    assert disagreements("twin", result(), result(_00=5.00005), LABELS) == []
    assert max_difference(result(), result(_00=5.5)) == 0.5
    assert count_agreeing(result(), result(_15=9)) == 2


@pytest.mark.parametrize(
    ("other", "faults"),
    [
        (result(_00=5.5), ["twin: max |difference of logits| is 0.5, more than 0.0001"]),
        (result(_00=np.nan), ["twin: max |difference of logits| is nan, more than 0.0001"]),
        (
            result(_15=9),
            [
                "twin: max |difference of logits| is 9, more than 0.0001",
                "twin: 1 of 3 predictions differ",
                "twin: accuracy is 66.67%, not 100.00%",
            ],
        ),
    ],
)
def test_every_disagreement_is_named(other: ForwardResult, faults: list[str]) -> None:
    assert disagreements("twin", result(), other, LABELS) == faults


def test_a_timed_run_joins_the_batches() -> None:
    seen = run_timed(lambda batch: batch * 2, [np.ones((2, 10), np.float32), np.zeros((1, 10), np.float32)])
    assert seen.logits.tolist() == [[2.0] * 10] * 2 + [[0.0] * 10]
    assert seen.seconds > 0
