"""Two outcomes: their numbers, and that a disagreement is named."""

import numpy as np
import pytest
import torch

from examples.cifar10.compare import Outcome, agreeing, difference, disagreements, observe

LABELS = np.array([0, 1, 2], np.uint8)


def outcome(**at: float) -> Outcome:
    logits = np.eye(3, 10, dtype=np.float32) * 5
    for place, value in at.items():
        logits[int(place[1]), int(place[2])] = value
    return Outcome(logits, 1.0)


def test_accuracy_and_loss_are_those_of_torch() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 10)).astype(np.float32) * 30
    labels = generator.integers(0, 10, 50).astype(np.uint8)
    seen = Outcome(logits, 0.0)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels).long())
    assert seen.loss(labels) == pytest.approx(loss.item(), rel=1e-5)
    assert seen.accuracy(labels) == (logits.argmax(1) == labels).mean()


def test_what_agrees_has_no_faults() -> None:
    assert disagreements("twin", outcome(), outcome(_00=5.00005), LABELS) == []
    assert difference(outcome(), outcome(_00=5.5)) == 0.5
    assert agreeing(outcome(), outcome(_15=9)) == 2


@pytest.mark.parametrize(
    ("other", "faults"),
    [
        (outcome(_00=5.5), ["twin: max |difference of logits| is 0.5, more than 0.0001"]),
        (outcome(_00=np.nan), ["twin: max |difference of logits| is nan, more than 0.0001"]),
        (
            outcome(_15=9),
            [
                "twin: max |difference of logits| is 9, more than 0.0001",
                "twin: 1 of 3 predictions differ",
                "twin: accuracy is 66.67%, not 100.00%",
            ],
        ),
    ],
)
def test_every_disagreement_is_named(other: Outcome, faults: list[str]) -> None:
    assert disagreements("twin", outcome(), other, LABELS) == faults


def test_observing_joins_the_batches_and_takes_a_time() -> None:
    seen = observe(lambda batch: batch * 2, [np.ones((2, 10), np.float32), np.zeros((1, 10), np.float32)])
    assert seen.logits.tolist() == [[2.0] * 10] * 2 + [[0.0] * 10]
    assert seen.seconds > 0
