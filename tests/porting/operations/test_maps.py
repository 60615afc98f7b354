"""Convolutions, pools, interpolations and normalizations give what torch gives wherever the axes stand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .driver import Case, check, check_all, reasons, tensor

MAPS = tensor(2, 4, 7, 6)
LINE = tensor(2, 4, 9)
VOLUME = tensor(2, 2, 5, 4, 6)
FLOATS = 1e-5


def _maps(n: int) -> tuple[torch.Tensor]:
    return (tensor(n, 4, 7, 6),)


def _conv(name: str, **settings: Any) -> Case:
    rank, groups = int(name[-2]), settings.get("groups", 1)
    x = {1: LINE, 2: MAPS, 3: VOLUME}[rank]
    channels = x.shape[1]
    weight = (
        tensor(channels, 6 // groups, *(3, 2, 2)[:rank])
        if "transpose" in name
        else tensor(6, channels // groups, *(3, 2, 2)[:rank])
    )
    call = getattr(F, name)
    return Case(
        f"{name} {settings}",
        lambda x, w, b: call(x, w, b, **settings),
        (x, weight, tensor(6)),
        tolerance=FLOATS,
    )


def _sized(batch: int) -> tuple[torch.Tensor]:
    """Maps of another size for another batch."""
    return (tensor(batch, 3, 5 + batch, 6 + 2 * batch),)


CASES = [
    *(_conv(f"conv{rank}d", **settings) for rank in (1, 2, 3) for settings in ({}, {"stride": 2, "padding": 1})),
    *(_conv("conv2d", **settings) for settings in ({"groups": 2, "dilation": 2}, {"padding": "same"}, {"padding": (2, 0), "stride": (1, 2)}, {"padding": "valid"})),
    *(_conv(f"conv_transpose{rank}d", **settings) for rank in (1, 2, 3) for settings in ({}, {"stride": 2, "padding": 1, "output_padding": 1})),
    *(_conv("conv_transpose2d", **settings) for settings in ({"groups": 2, "stride": (2, 1)}, {"dilation": 2, "padding": (1, 0)})),
    Case("F.unfold", lambda x: F.unfold(x, 3, padding=1) , _maps),
    Case("F.unfold with settings", lambda x: F.unfold(x, (2, 3), dilation=(1, 2), padding=(0, 1), stride=(2, 1)), _maps),
    *(
        Case(f"max_pool2d {settings}", lambda x, settings=settings: F.max_pool2d(x, **settings), _maps)
        for settings in (
            {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True},
            {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True},
            {"kernel_size": 2, "dilation": 2, "stride": 1}, {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True, "dilation": (2, 1)},
        )
    ),
    Case("max_pool1d and 3d", lambda x, y: (F.max_pool1d(x, 3, 2), F.max_pool3d(y, 2, ceil_mode=True), torch.max_pool1d(x, 2)), (LINE, VOLUME)),
    *(
        Case(f"avg_pool2d {settings}", lambda x, settings=settings: F.avg_pool2d(x, **settings), _maps, tolerance=FLOATS)
        for settings in (
            {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 2, "ceil_mode": True},
            {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
            {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True},
            {"kernel_size": 3, "stride": 3, "padding": 1, "ceil_mode": True, "count_include_pad": False},
            {"kernel_size": 2, "divisor_override": 3},
        )
    ),
    *(
        Case(f"lp_pool2d {settings}", lambda x, settings=settings: F.lp_pool2d(x.abs(), **settings), _maps, tolerance=FLOATS)
        for settings in ({"norm_type": 2, "kernel_size": 2}, {"norm_type": 3.0, "kernel_size": (3, 2), "stride": 2}, {"norm_type": 2.0, "kernel_size": 3, "stride": 2, "ceil_mode": True})
    ),
    Case("lp_pool1d and 3d", lambda x, y: (F.lp_pool1d(x, 2, 3, 2), F.lp_pool3d(y, 2, 2)), (LINE, VOLUME), tolerance=FLOATS),
    Case("avg_pool1d and 3d", lambda x, y: (F.avg_pool1d(x, 3, 2, 1), F.avg_pool3d(y, 2)), (LINE, VOLUME), tolerance=FLOATS),
    *(
        Case(f"adaptive_{kind}_pool2d {size}", lambda x, kind=kind, size=size: getattr(F, f"adaptive_{kind}_pool2d")(x, size), _maps, tolerance=FLOATS)
        for kind in ("avg", "max") for size in (1, (7, 3), 4, (None, 2), (3, 6), 9)
    ),
    Case("adaptive pools of a line", lambda x: (F.adaptive_avg_pool1d(x, 4), F.adaptive_max_pool1d(x, 3), F.adaptive_avg_pool1d(x, 1)), (LINE,), tolerance=FLOATS),
    Case("adaptive pools of a volume", lambda x: (F.adaptive_avg_pool3d(x, (2, 3, 1)), F.adaptive_max_pool3d(x, 2)), (VOLUME,), tolerance=FLOATS),
    Case("lp_pool and global means", lambda x: x.mean((2, 3)) + F.adaptive_max_pool2d(x, 1).flatten(1), _maps, tolerance=FLOATS),
    *(
        Case(f"interpolate {settings}", lambda x, settings=settings: F.interpolate(x, **settings), _maps, tolerance=FLOATS)
        for settings in (
            {"scale_factor": 2}, {"scale_factor": 2.0, "mode": "bilinear"}, {"size": (5, 9)}, {"size": (10, 13), "mode": "bilinear", "align_corners": True},
            {"size": (3, 4), "mode": "bilinear"}, {"size": (4, 11), "mode": "nearest-exact"}, {"size": (14, 3), "mode": "area"},
            {"size": (9, 8), "mode": "bicubic"}, {"size": (4, 5), "mode": "bicubic"}, {"size": (4, 3), "mode": "bilinear", "antialias": True},
            {"size": (4, 3), "mode": "bicubic", "antialias": True}, {"size": (9, 8), "mode": "bicubic", "antialias": True}, {"size": 4},
        )
    ),
    Case("interpolate by a half", lambda x: F.interpolate(x, scale_factor=0.5) + F.interpolate(x, scale_factor=(0.5, 0.5), mode="bilinear"), lambda n: (tensor(n, 2, 6, 4),), tolerance=FLOATS),
    Case("interpolate to the size of another", lambda x, y: F.interpolate(x, size=y.shape[2:], mode="bilinear"), lambda n: (tensor(2, 2, 3, 4), tensor(n, 2, 5 + n, 7)), tolerance=FLOATS),
    Case("interpolate a line and a volume", lambda x, y: (F.interpolate(x, 5, mode="linear"), F.interpolate(x, 12, mode="linear", align_corners=True), F.interpolate(y, (3, 8, 6), mode="trilinear")), (LINE, VOLUME), tolerance=FLOATS),
    *(
        Case(f"interpolate {settings}", lambda x, settings=settings: F.interpolate(x, **settings), _maps, tolerance=FLOATS)
        for settings in (
            {"scale_factor": 1.3, "mode": "bilinear"}, {"scale_factor": 0.45}, {"scale_factor": 1.3, "mode": "bicubic"},
            {"scale_factor": 0.6, "mode": "nearest-exact"}, {"size": (9, 11), "mode": "bicubic", "align_corners": True},
            {"scale_factor": 1.3, "mode": "bilinear", "recompute_scale_factor": True},
        )
    ),
    *(
        Case(f"grid_sample {mode} {padding} {corners}", lambda x, g, mode=mode, padding=padding, corners=corners: F.grid_sample(x, g, mode, padding, corners), lambda n: (tensor(n, 3, 5, 7), tensor(n, 4, 6, 2) * 0.9), tolerance=1e-5)
        for mode, padding, corners in (("bilinear", "zeros", False), ("bilinear", "border", True), ("nearest", "reflection", False), ("bilinear", "reflection", True))
    ),
    Case("grid_sampler", lambda x, g: torch.grid_sampler(x, g, 0, 1, False), (tensor(2, 3, 5, 7), tensor(2, 4, 6, 2)), tolerance=1e-5),
    *(Case(f"affine_grid {corners}", lambda t, corners=corners: F.affine_grid(t, (len(t), 3, 4, 5), corners), (tensor(2, 2, 3),), tolerance=FLOATS) for corners in (True, False)),
    Case("affine_grid_generator", lambda t: torch.affine_grid_generator(t, (2, 3, 1, 5), False), (tensor(2, 2, 3),), tolerance=FLOATS),
    Case("fold", lambda x: F.fold(x, (6, 7), (3, 2), padding=1, stride=(2, 1)), lambda n: (tensor(n, 12, 24),), tolerance=FLOATS),
    Case("fold of unfold", lambda x: F.fold(F.unfold(x, 3, 2, 1, 2), x.shape[2:], 3, 2, 1, 2), _maps, tolerance=FLOATS),
    Case("avg_pool over everything", lambda x: F.avg_pool2d(x, x.size()[2:]) + F.avg_pool2d(x, (x.size(2), 1)).mean((2, 3), keepdim=True), _sized, tolerance=FLOATS),
    *(Case(f"pools that hang over, {pad}", lambda x, pad=pad: (F.max_pool2d(x, 3, 2, pad, ceil_mode=True), F.avg_pool2d(x, 3, 2, pad, ceil_mode=True), F.avg_pool2d(x, 3, 2, pad, True, False)), _sized, tolerance=FLOATS) for pad in (0, 1)),
    Case("instance_norm with statistics", lambda x, m, v, w: F.instance_norm(x, m, v, w, m, use_input_stats=False), (MAPS, tensor(4), tensor(4).abs() + 0.5, tensor(4) * 2), tolerance=FLOATS),
    *(Case(f"embedding_bag {mode}", lambda i, w, mode=mode: F.embedding_bag(i, w, mode=mode), (tensor(3, 5, dtype=torch.int64, low=0, high=6), tensor(6, 4)), fixed=True, tolerance=FLOATS) for mode in ("sum", "mean", "max")),
    *(Case(f"embedding_bag with padding {mode}", lambda i, w, mode=mode: F.embedding_bag(i, w, mode=mode, padding_idx=-4), (torch.tensor([[2, 2, 2, 2, 2], [2, 0, 5, 2, 1], [0, 1, 3, 4, 5]]), tensor(6, 4)), fixed=True, tolerance=FLOATS) for mode in ("sum", "mean", "max")),
    Case("embedding_bag with weights", lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s), (tensor(3, 5, dtype=torch.int64, low=0, high=6), tensor(6, 4), tensor(3, 5)), fixed=True, tolerance=FLOATS),
    Case("nn.Upsample", nn.Upsample(scale_factor=2, mode="bilinear"), _maps, tolerance=FLOATS),
    Case("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b) + torch.layer_norm(x, [6], w, b, 1e-3), (MAPS, tensor(6), tensor(6) * 2), tolerance=FLOATS),
    Case("layer_norm of several axes", lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b) + F.layer_norm(x, (7, 6)), (MAPS, tensor(4, 7, 6), tensor(4, 7, 6) + 1), tolerance=FLOATS),
    Case("layer_norm of channels", lambda x, w: F.layer_norm(x.permute(0, 2, 3, 1), (4,), w).permute(0, 3, 1, 2), (MAPS, tensor(4)), tolerance=FLOATS),
    Case("rms_norm", lambda x, w: F.rms_norm(x, (6,), w) + F.rms_norm(x, (7, 6), eps=1e-3), (MAPS, tensor(6)), tolerance=FLOATS),
    Case("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b) + torch.group_norm(x, 4, w, b, 1e-3), (MAPS, tensor(4), tensor(4) + 1), tolerance=FLOATS),
    Case("group_norm of features", lambda x, w: F.group_norm(x, 2, w), (tensor(3, 6), tensor(6)), tolerance=FLOATS),
    Case("batch_norm", lambda x, m, v, w: F.batch_norm(x, m, v, w, m, eps=1e-3) + torch.batch_norm(x, w, m, m, v, False, 0.1, 1e-5, True), (MAPS, tensor(4), tensor(4).abs() + 0.5, tensor(4) * 2), tolerance=FLOATS),
    Case("batch_norm of its own statistics", lambda x, w, b: F.batch_norm(x, None, None, w, b, True) + F.batch_norm(x, None, None, training=True, eps=0.5), (MAPS, tensor(4), tensor(4) + 1), tolerance=FLOATS),
    Case("batch_norm of a weight", lambda x: F.batch_norm(x.reshape(1, 3, -1), None, None, training=True).view_as(x), (tensor(3, 4, 2, 2),), tolerance=FLOATS),
    Case("batch_norm of features", lambda x, m, v: F.batch_norm(x, m, v), (tensor(3, 4), tensor(4), tensor(4).abs() + 0.5), tolerance=FLOATS),
    Case("instance_norm", lambda x, w: F.instance_norm(x) + F.instance_norm(x, weight=w, bias=w), (MAPS, tensor(4)), tolerance=FLOATS),
    Case("local_response_norm", lambda x: F.local_response_norm(x, 3) + F.local_response_norm(x, 2, 0.1, 0.5, 2.0) + nn.LocalResponseNorm(4)(x), _maps, tolerance=FLOATS),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_function_of_maps() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_function_of_maps_in_more_orders(case: Case) -> None:
    check(case, turns=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1] + 1, "the positions of the largest elements"),
        (lambda x: F.max_pool2d(x[0], 2), "x[None]"),
        (lambda x: F.conv2d(x[0], x[:, :, :3, :3]), "x[None]"),
        (lambda x: F.fractional_max_pool2d(x, 2, output_size=3), "pools at random"),
        (lambda x: F.fold(x[0].flatten(1)[:, :20], (6, 5), (2, 2)), "x[None]"),
        (
            lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), "bicubic", align_corners=False),
            "'bilinear' and 'nearest'",
        ),
        (lambda x: F.interpolate(x, scale_factor=1.3, mode="bilinear", antialias=True), "size= in the place"),
        (
            lambda x: F.interpolate(x, 9, mode="bilinear", align_corners=True, antialias=True),
            "align_corners=False",
        ),
        (
            lambda x: F.batch_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], training=True),
            "pass training=self.training",
        ),
        (lambda x: F.lp_pool2d(x, 3, 2), ""),
    ],
)
def test_what_has_no_translation_is_refused_with_a_way_out(call: Callable[..., Any], words: str) -> None:
    assert words in reasons(call, MAPS)
