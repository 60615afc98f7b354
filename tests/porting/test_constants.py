"""A tensor that no state_dict holds becomes code that makes it again."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchjax_bridge.porting._constants import constant_text
from torchjax_bridge.porting._placed import RefusedError

INF = torch.inf


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((2, 3), -INF),
        torch.full((4,), 2.5, dtype=torch.bfloat16),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.tensor([1.0, INF, -INF, torch.nan]),
        torch.tensor(torch.nan),
        torch.arange(100).reshape(10, 10),
        torch.arange(3, dtype=torch.int32),
        torch.ones(20, 20).tril(),
        torch.ones(1, 1, 20, 20, dtype=torch.bool).triu(),
        torch.tensor([[3, 1], [2, 7]], dtype=torch.uint8),
        torch.zeros(0),
    ],
    ids=repr,
)
def test_the_code_makes_the_tensor_again(tensor: torch.Tensor) -> None:
    made = np.asarray(eval(constant_text(tensor, "a constant"), {"jnp": jnp}))
    assert str(made.dtype) == str(tensor.dtype).replace("torch.", "").replace("64", "32")
    assert made.shape == tuple(tensor.shape)
    np.testing.assert_array_equal(made.astype(np.float64), tensor.double().numpy())


@pytest.mark.parametrize(
    "tensor", [torch.randn(100), torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")]
)
def test_other_tensors_are_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(RefusedError, match="the_table"):
        constant_text(tensor, "the_table")
