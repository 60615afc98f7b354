"""Fourier transforms and complex numbers are those of torch, in every layout."""

import pytest
import torch

from .driver import Case, check, check_all, tensor

X = tensor(3, 4, 6)
MAPS = tensor(2, 3, 4, 6)
PAIRS = tensor(2, 3, 5, 2)

CASES = [
    *(
        Case(f"fft {name}", getattr(torch.fft, name), (X,))
        for name in ("fft", "ifft", "rfft", "fft2", "ifft2", "rfft2", "fftn", "ifftn", "rfftn", "ihfft")
    ),
    Case(
        "there and back",
        lambda x: torch.fft.irfft(torch.fft.rfft(x), 6) + torch.fft.hfft(torch.fft.fft(x), 6),
        (X,),
    ),
    Case("fft of one axis", lambda x: torch.fft.fft(x, 5, dim=1, norm="ortho"), (X,)),
    Case(
        "fft of images",
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * 2, s=x.shape[-2:], norm="ortho"),
        lambda n: (tensor(n, 3, 4, 6),),
    ),
    Case(
        "fft of axes",
        lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=(1, 2)), s=(4, 6), dim=(1, 2)),
        (tensor(2, 4, 6, 3),),
    ),
    Case("fft of a place", lambda x: torch.fft.rfftn(x, s=(3, 4)), (MAPS,)),
    Case("fftshift", lambda x: torch.fft.fftshift(x, dim=(1, 2)) + torch.fft.ifftshift(x), (X,)),
    Case("fftfreq", lambda x: x + torch.fft.fftfreq(6, 0.5) + torch.fft.rfftfreq(10), (X,)),
    Case("view_as_complex", lambda x: torch.view_as_complex(x) * 2j, (PAIRS,)),
    Case(
        "rotation",
        lambda x: torch.view_as_real(
            torch.view_as_complex(x) * torch.polar(torch.ones(5), torch.arange(5.0))
        ),
        (PAIRS,),
    ),
    Case("complex", lambda x, y: torch.complex(x, y).conj() + torch.complex(y, x).abs(), (X, X * 2)),
    Case(
        "parts",
        lambda x, y: (
            torch.complex(x, y).real,
            torch.complex(x, y).imag,
            x.conj(),
            torch.complex(x, y).angle(),
        ),
        (X, X * 2),
    ),
    Case("conj_physical", lambda x, y: torch.conj_physical(torch.complex(x, y)), (X, X * 2)),
]


def test_a_transform() -> None:
    check_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_transform_in_more_orders(case: Case) -> None:
    check(case, turns=4)
