"""Reductions, and functions along an axis, give what torch gives wherever the axes stand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from .driver import Case, check, check_all, reasons, tensor

X = tensor(3, 4, 5)
INTS = tensor(3, 4, 5, dtype=torch.int64)
BYTES = tensor(3, 4, 5, dtype=torch.uint8, high=255)
SMALL = tensor(3, 4, 5, dtype=torch.int8)
BOOLS = tensor(3, 4, 5, dtype=torch.bool)
HALF = tensor(3, 4, 5, dtype=torch.bfloat16)
TIES = torch.tensor([[1.0, 2.0, 2.0, 1.0], [3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])


def _batch(n: int) -> tuple[torch.Tensor]:
    return (tensor(n, 3, 4, 5),)


CASES = [
    Case(
        "counts in bins", lambda x: (torch.histc(x, 5, -1, 1), torch.histc(x, bins=3, min=0, max=0.5)), (X,)
    ),
    Case("sum", lambda x: x.sum() + x.sum(0).mean() + torch.sum(x, dim=[0, -1], keepdim=True), (X,)),
    Case(
        "sum by NumPy's names",
        lambda x: torch.sum(x, axis=1, keepdims=True) + x.mean(axis=(0, 2), keepdims=True),
        (X,),
    ),
    Case("sum of no axes", lambda x: x.sum(dim=()), (X,)),
    Case("sum of bool", lambda x: x.sum(1), (BOOLS,)),
    Case("sum of small integers", lambda x, y: x.sum(0) + y.sum(0), (SMALL, BYTES)),
    Case("prod of small integers", lambda x: x.prod(0), (SMALL,)),
    Case(
        "sum into another dtype",
        lambda x, y: x.sum(0, dtype=torch.float32) + y.sum(0, dtype=torch.float32),
        (INTS, HALF),
    ),
    Case("mean", lambda x: x.mean((2, 3)), _batch),
    Case("mean of integers", lambda x: x.mean(1, dtype=torch.float32), (INTS,)),
    Case("mean of bfloat16", lambda x: x.mean(-1, True), (HALF,)),
    Case("prod", lambda x: x.prod(1) + torch.prod(x, -2, keepdim=False), (X,)),
    Case("nansum and nanmean", lambda x: x.log().nansum(0) + x.log().nanmean(0), (X,)),
    Case("any and all", lambda x: x.any(1) & x.all(dim=1) | x.any(), (BOOLS,)),
    Case("any of bytes", lambda x: x.any(0), (BYTES,)),
    Case("amax and amin", lambda x: x.amax((0, 2)) - x.amin((0, 2)) + x.amax(), (X,)),
    Case("logsumexp", lambda x: x.logsumexp(1) + torch.special.logsumexp(x, (1,)), (X,)),
    Case("count_nonzero", lambda x: torch.count_nonzero(x, 1) + torch.count_nonzero(x), (INTS,)),
    Case("argmax", lambda x: (x.argmax(), x.argmax(1), x.argmin(-1, keepdim=True), x.argmin()), (X,)),
    Case("argmax of all, keeping axes", lambda x: x.argmax(keepdim=True), (X,)),
    Case(
        "argmax takes the first of equals",
        lambda x: (x.argmax(1), x.argmin(1), x.max(1)[1], x.min(1).indices),
        (TIES,),
    ),
    Case(
        "max",
        lambda x: (x.max(), x.max(1)[0], x.max(dim=-1, keepdim=True).values, x.min(0).values, x.min()),
        (X,),
    ),
    Case("max of integers", lambda x: (x.max(1).values, x.min()), (INTS,)),
    Case("max of two", lambda x, y: torch.max(x, y) - torch.min(x, other=y), (X, tensor(4, 1))),
    Case("aminmax", lambda x: (*torch.aminmax(x), *x.aminmax(dim=1, keepdim=True)), (X,)),
    Case("median", lambda x: (x.median(), x.median(1)[0], x.median(-1, True).values), (X,)),
    Case("the place of the median", lambda x: x.median(1)[1], (X,)),
    Case("kthvalue", lambda x: (x.kthvalue(2, 1)[0], x.kthvalue(3, keepdim=True).values), (X,)),
    Case(
        "quantile",
        lambda x: (x.quantile(0.3, 1), x.quantile(0.5), torch.quantile(x, 0.7, dim=-1, keepdim=True)),
        (X,),
    ),
    Case(
        "quantiles",
        lambda x, q: torch.quantile(x, q, dim=1, interpolation="nearest"),
        (X, torch.tensor([0.2, 0.9])),
    ),
    Case("nanquantile", lambda x: x.log().nanquantile(0.4, 1), (X.abs() + 0.1,)),
    Case("var", lambda x: x.var() + x.var(1).sum() + torch.var(x, (0, 2), correction=0, keepdim=True), (X,)),
    Case(
        "std",
        lambda x: x.std(unbiased=False) + x.std(1, False) + torch.std(x, 1, unbiased=True) + x.std(False),
        (X,),
    ),
    Case("var_mean", lambda x: (*torch.var_mean(x, 1), *torch.std_mean(x, (1, 2), keepdim=True)), (X,)),
    Case(
        "norm",
        lambda x: (torch.norm(x), x.norm(dim=1), torch.norm(x, 1, 2), x.norm(2, (0, 1), True), x.norm(3, 1)),
        (X,),
    ),
    Case(
        "norms of other orders",
        lambda x: (x.norm(torch.inf), x.norm(0, 1), x.norm(-torch.inf, (0, 1)), x.norm(1)),
        (X,),
    ),
    Case("norm, the Frobenius", lambda x: x.norm(p="fro", dim=(0, 1)), (X,)),
    Case(
        "linalg norms",
        lambda x: (
            torch.linalg.norm(x),
            torch.linalg.vector_norm(x, 3.5, dim=(0, 2)),
            torch.linalg.matrix_norm(x),
        ),
        (X,),
    ),
    Case("linalg.norm of an axis", lambda x: torch.linalg.norm(x, 1, 2) + torch.linalg.norm(x, dim=-1), (X,)),
    Case("dist", lambda x, y: torch.dist(x, y) + torch.dist(x, y, 1), (X, tensor(4, 5))),
    Case("cdist", torch.cdist, (X, tensor(3, 2, 5)), tolerance=1e-5),
    Case("cdist of order 1", lambda x, y: torch.cdist(x, y, p=1.0), (X, tensor(3, 2, 5))),
    Case(
        "pairwise_distance",
        lambda x, y: F.pairwise_distance(x, y, keepdim=True),
        (tensor(3, 4), tensor(3, 4) * 2),
    ),
    Case(
        "cosine_similarity",
        lambda x, y: F.cosine_similarity(x, y) + F.cosine_similarity(x, y[:1], dim=-2, eps=1e-4),
        (X, X + 1),
    ),
    Case(
        "F.normalize",
        lambda x: F.normalize(x) + F.normalize(x, p=1, dim=-1) + F.normalize(x, 2.0, 0, 1e-3),
        (X,),
    ),
    Case("F.normalize over axes", lambda x: F.normalize(x, dim=(1, 2)), (X,)),
    Case(
        "softmax",
        lambda x: (x.softmax(1), torch.softmax(x, -1), F.softmax(x, dim=0), torch.special.softmax(x, 1)),
        (X,),
    ),
    Case(
        "softmax into another dtype",
        lambda x: (
            x.softmax(1, torch.float32),
            torch.softmax(x, 1, torch.float32),
            F.softmax(x, -1, dtype=torch.float32),
        ),
        (HALF,),
    ),
    Case(
        "log_softmax and softmin",
        lambda x: (x.log_softmax(1), F.log_softmax(x, 2), F.softmin(x, 1), torch.special.log_softmax(x, 0)),
        (X,),
    ),
    Case("glu", lambda x: (F.glu(x, 1), F.glu(x.transpose(1, 2))), (X,)),
    Case("cumsum", lambda x, y: (x.cumsum(1), x.cumprod(-1), y.cumsum(0)), (X, BOOLS)),
    Case("cumsum of small integers", lambda x, y: (x.cumsum(1), y.cumprod(0)), (BYTES, SMALL)),
    Case("cumsum in place", lambda x: x.clone().cumsum_(1), (X,)),
    Case("logcumsumexp", lambda x: x.logcumsumexp(1), (X,)),
    Case("cummax", lambda x: x.cummax(1)[0] - x.cummin(-1).values, (X,)),
    Case("sort", lambda x: (*x.sort(1), *torch.sort(x, descending=True), x.msort(), x.argsort(0)), (X,)),
    Case(
        "sort of equals",
        lambda x: (*torch.sort(x, stable=True), *torch.sort(x, stable=True, descending=True)),
        (TIES,),
    ),
    Case("argsort", lambda x: torch.argsort(x, dim=1, descending=True), (X,)),
    Case("topk", lambda x: (*x.topk(2), *x.topk(2, 1), *torch.topk(x, 2, dim=0, largest=False)), (X,)),
    Case("diff", lambda x: (x.diff(), torch.diff(x, 2, 1), x.diff(dim=0, append=x[:1], prepend=x[:2])), (X,)),
    Case(
        "isin",
        lambda x: (
            torch.isin(x.round(), torch.tensor([0.0, 1.0])),
            torch.isin(x.round(), torch.tensor([1.0]), invert=True) + torch.isin(x.round(), 1),
        ),
        (X,),
    ),
    Case(
        "bucketize",
        lambda x, b: (
            torch.bucketize(x, b),
            torch.bucketize(x, b, right=True),
            torch.searchsorted(b, x, side="right"),
        ),
        (INTS, torch.tensor([-2, 0, 1, 3])),
    ),
]


def test_a_reduction() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_reduction_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.every(2)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_softmax_without_an_axis_takes_the_axis_that_torch_takes(rank: int) -> None:
    check(Case("implicit", lambda x: F.softmax(x) + F.log_softmax(x), (tensor(*(2, 3, 4, 5)[:rank]),)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: x.norm(p="nuc", dim=(0, 1)), "only vector norms"),
        (lambda x: torch.linalg.matrix_norm(x, 2), "use torch.linalg.vector_norm"),
        (lambda x: x.cummax(0)[1] + 1, "only its values"),
        (lambda x: x.nanmedian(), "the lower of two middle values"),
        (lambda x: torch.histc(x), "give it min= and max="),
        (lambda x: torch.histogram(x, 3)[0], "outside of the model"),
        (lambda x: x.mode(), "outside of the model"),
    ],
)
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., object], words: str) -> None:
    assert words in reasons(call, X)
