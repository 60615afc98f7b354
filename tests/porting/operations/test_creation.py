"""Functions that make tensors, and losses, give what torch gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .driver import Case, check, check_all, reasons, tensor

X = tensor(2, 3, 4)
SCORES = tensor(4, 5, 3)
LABELS = torch.tensor([[0, 1, -100], [2, 4, 3], [1, 1, 0], [-100, 2, 2]])
CLOSE = 1e-5


def _batch(n: int) -> tuple[torch.Tensor]:
    return (tensor(n, 3, 4),)


CASES = [
    Case("zeros and ones", lambda x: x + torch.zeros(x.shape[0], 3, 4) + torch.ones((x.shape[0], 3, 1)) + torch.zeros(size=(1, 4), dtype=torch.int64), _batch),
    Case("empty that is filled", lambda x: torch.empty(x.shape).fill_(2.0) + torch.empty_like(x).zero_() + x.new_empty(3, 4).fill_(1), _batch),
    Case("full", lambda x: (torch.full((2, 3), 7), torch.full((2,), 0.5), torch.full(size=(x.shape[0], 1), fill_value=True), torch.full((2,), x[0, 0, 0])), _batch),
    Case("new_*", lambda x: (x.new_zeros(2, 3), x.new_ones((2,), dtype=torch.int32), x.new_full((2, 3), 3), x.new_tensor([1, 2]), x.new_full((x.size(0),), 2)), _batch),
    Case("*_like", lambda x: (torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool), torch.full_like(x, 3), torch.full_like(x, fill_value=2.5)), (X,)),
    Case("full_like of integers", lambda x: torch.full_like(x, 3) + torch.ones_like(x), (X.long(),)),
    Case("arange", lambda x: (torch.arange(x.shape[1]), torch.arange(1, 7, 2), torch.arange(0, 1, 0.25), torch.arange(start=3, end=x.size(0) + 3), torch.arange(3, dtype=torch.float32)), _batch),
    Case("linspace and logspace", lambda x: (torch.linspace(-1, 1, x.shape[0]), torch.linspace(0, 5, steps=6), torch.logspace(0, 2, 5), torch.logspace(0, 2, 5, base=2.0)), _batch, tolerance=CLOSE),
    Case("eye", lambda x: (torch.eye(3), torch.eye(2, x.shape[0]), torch.eye(n=2, dtype=torch.bool)), _batch),
    Case("triangles", lambda x: (torch.tril(torch.ones(4, 4)), torch.triu_indices(3, 3, 1), torch.tril_indices(row=3, col=4)), _batch),
    Case("tensor", lambda x: (torch.tensor(2.5), torch.tensor([1, 2]), torch.tensor([[True, False]]), torch.as_tensor([1.5], dtype=torch.float32), torch.tensor([x.shape[0], 2]), torch.scalar_tensor(3.0)), _batch),
    Case("tensor of numpy", lambda x: x + torch.tensor(np.arange(4, dtype=np.float32)) + torch.as_tensor(np.float32(2)), _batch),
    Case("as_tensor of a tensor", lambda x: torch.as_tensor(x) + torch.as_tensor(x, dtype=torch.int32), (X,)),
    *(Case(f"mse_loss {kind}", lambda x, y, kind=kind: F.mse_loss(x, y, reduction=kind) + F.l1_loss(x, y, reduction=kind), (X, X * 2)) for kind in ("mean", "sum", "none")),
    *(Case(f"huber_loss {kind}", lambda x, y, kind=kind: F.smooth_l1_loss(x, y, reduction=kind, beta=0.5) + F.huber_loss(x, y, reduction=kind, delta=0.7), (X, X * 2)) for kind in ("mean", "none")),
    *(Case(f"cross_entropy {kind}", lambda x, y, kind=kind: F.cross_entropy(x, y, reduction=kind) + F.nll_loss(x, y, reduction=kind), (SCORES, LABELS), tolerance=CLOSE) for kind in ("mean", "sum", "none")),
    Case("cross_entropy of vectors", lambda x, y: F.cross_entropy(x, y, ignore_index=3) + F.cross_entropy(x[0], y[0]), (SCORES[:, :, 0], torch.tensor([0, 3, 1, 4])), tolerance=CLOSE),
    Case("cross_entropy of probabilities", lambda x, y: F.cross_entropy(x, y.softmax(1)) + F.cross_entropy(x, y.softmax(1), reduction="none").sum(), (SCORES, SCORES + 1), tolerance=CLOSE),
    Case("binary_cross_entropy", lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()) + F.binary_cross_entropy_with_logits(x, y.sigmoid(), reduction="none"), (X, X * 2), tolerance=CLOSE),
    *(Case(f"kl_div {kind}", lambda x, y, kind=kind: F.kl_div(x.log_softmax(1), y.softmax(1), reduction=kind) + F.kl_div(x, y, reduction=kind, log_target=True), (X, X * 2), tolerance=CLOSE) for kind in ("sum", "batchmean", "none")),
    *(Case(f"cross_entropy with settings, {kind}", lambda x, y, w, kind=kind: F.cross_entropy(x, y, weight=w, reduction=kind) + F.nll_loss(x, y.clamp(min=0), w, ignore_index=2, reduction=kind) + F.cross_entropy(x, y.clamp(min=0), w, label_smoothing=0.1, ignore_index=1, reduction=kind) + F.cross_entropy(x, y, label_smoothing=0.3, reduction=kind) + F.cross_entropy(x, x.softmax(1), w, label_smoothing=0.2, reduction=kind), (SCORES, LABELS, SCORES[0, :, 0].sigmoid()), tolerance=CLOSE) for kind in ("mean", "sum", "none")),
    Case("binary_cross_entropy with weights", lambda x, y, w: F.binary_cross_entropy_with_logits(x, y.sigmoid(), w, pos_weight=w * 2) + F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), w), (X, X * 2, X[0, 0].sigmoid()), tolerance=CLOSE),
    *(Case(f"margins {kind}", lambda x, y, z, kind=kind: F.triplet_margin_loss(x, y, z, reduction=kind) + F.triplet_margin_loss(x, y, z, swap=True, p=1, reduction=kind) + F.margin_ranking_loss(x[:, :, 0], y[:, :, 0], z[:, :, 0].sign(), 0.3, reduction=kind), (X, X * 2, X.flip(0)), tolerance=CLOSE) for kind in ("mean", "none")),
    Case("cosine_embedding_loss", lambda x, y: F.cosine_embedding_loss(x[0], y[0], x[0, :, 0].sign(), 0.1), (X, X.flip(1)), tolerance=CLOSE),
    *(Case(f"hinge_embedding_loss {kind}", lambda x, y, kind=kind: F.hinge_embedding_loss(x, y.sign(), reduction=kind) + F.hinge_embedding_loss(x, y.sign(), 0.3, reduction=kind), (X, X.flip(1)), tolerance=CLOSE) for kind in ("mean", "sum", "none")),
    *(Case(f"poisson_nll_loss {kind}", lambda x, y, kind=kind: F.poisson_nll_loss(x, y.abs(), reduction=kind) + F.poisson_nll_loss(x.abs(), y.abs(), log_input=False, full=True, reduction=kind), (X, X.flip(1) * 3), tolerance=CLOSE) for kind in ("mean", "sum", "none")),
    *(Case(f"gaussian_nll_loss {kind}", lambda x, y, v, kind=kind: F.gaussian_nll_loss(x, y, v, reduction=kind) + F.gaussian_nll_loss(x, y, v[..., :1], full=True, eps=0.5, reduction=kind) + F.gaussian_nll_loss(x, y, 2.0, reduction=kind), (X, X.flip(1), X.abs() + 0.1), tolerance=CLOSE) for kind in ("mean", "none")),
    Case("soft_margin_loss", lambda x, y: F.soft_margin_loss(x, y.sign()), (X, X + 0.1), tolerance=CLOSE),
]  # fmt: skip


def test_what_makes_a_tensor() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_what_makes_a_tensor_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: torch.multinomial(x.abs()[0, 0], 2), "which draws random numbers"),
        (lambda x: F.mse_loss(x, x, size_average=True), "use reduction="),
        (lambda x: F.dropout(x, 0.5, training=True), "pass training=self.training"),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average")
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., Any], words: str) -> None:
    assert words in reasons(call, X)
