"""Which of two paths is taken, the fast or the public one: a trial of the fast one on real tensors decides.

Owns the choice, its reason and the trial. ``_dlpack`` uses it on the CPU, ``_dlpack_cuda`` on a GPU.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchjax_bridge.errors import ExchangeError

from ._devices import jax_device
from ._fork import refuse_in_fork

__all__ = ["PATH_VARIABLE", "Choice", "Export", "Import", "choose", "wanted_path"]

# The environment variable that forces a path.
PATH_VARIABLE = "TORCHJAX_BRIDGE_DLPACK"

Import = Callable[[torch.Tensor], jax.Array]
Export = Callable[[jax.Array], torch.Tensor]

# Raised when a function is missing, takes other arguments or fails, and by `_try_functions` for a wrong result.
_TRIAL_ERRORS = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, BufferError)


@dataclass(frozen=True)
class Choice:
    """Which path was chosen, and why."""

    path: str
    """``"fast"`` or ``"public"``."""
    reason: str
    """One sentence for a person, as ``torchjax-bridge doctor`` prints it."""


def wanted_path() -> str:
    """What the environment variable asks for: ``"fast"``, ``"public"`` or nothing."""
    return os.environ.get(PATH_VARIABLE, "")


def choose(
    wanted: str,
    fast: Callable[[], tuple[Import, Export]],
    public: tuple[Import, Export],
    device: torch.device,
) -> tuple[Choice, tuple[Import, Export]]:
    """The fast pair of functions if it is not unwanted and passes its trial on the device; else the public pair.

    Args:
        wanted: ``"fast"``, ``"public"`` or ``""``.
        fast: Makes the fast pair. It may raise.
        public: The public pair.
        device: Where the tensors of the trial live.

    Raises:
        ExchangeError: ``wanted`` is another word, or ``"fast"`` and the trial fails.
    """
    if wanted not in ("", "fast", "public"):
        raise ExchangeError(
            f"{PATH_VARIABLE}={wanted!r} is neither 'fast' nor 'public'. Unset it, or set one of these."
        )
    if wanted == "public":
        return Choice("public", f"{PATH_VARIABLE}=public asks for it."), public
    try:
        refuse_in_fork("try the private capsule functions")  # the trial needs JAX's threads
        pair = fast()
        # In its own thread, where no jit trace, fake mode or default device of the caller is active.
        with ThreadPoolExecutor(1, "torchjax-bridge-trial") as pool:
            pool.submit(_try_functions, *pair, device).result()
    except _TRIAL_ERRORS as err:
        reason = f"the private capsule functions do not work here: {type(err).__name__}: {err}"
        if wanted == "fast":
            raise ExchangeError(
                f"{PATH_VARIABLE}=fast, but {reason}. Unset it to use the public path."
            ) from err
        return Choice("public", reason), public
    return Choice("fast", "the private capsule functions passed their trial."), pair


# Dtypes that only JAX has. JAX exports no capsule for some of them; torch refuses the capsules of the others.
_NOT_IN_TORCH = (
    "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"
)  # fmt: skip


def _exports(to_torch: Callable[[Any], Any], dtype: Any, device: jax.Device) -> bool:
    try:
        to_torch(jax.device_put(np.zeros(4, dtype), device))
    except (RuntimeError, BufferError):
        return False
    return True


def _try_functions(from_torch: Callable[[Any], Any], to_torch: Callable[[Any], Any], device: Any) -> None:
    """Raise unless both functions share memory, keep values and strides, and raise where they must."""
    there = jax_device(device)
    tensor = torch.arange(12, dtype=torch.float32, device=device).view(3, 4).t()
    array = from_torch(tensor)
    if not isinstance(array, jax.Array) or array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise RuntimeError("an imported tensor does not share memory")
    if array.shape != (4, 3) or array.dtype != np.float32 or float(np.asarray(array)[3, 1]) != 7.0:
        raise RuntimeError("an imported tensor has other values")
    exported = to_torch(jax.device_put(np.arange(6, dtype=np.int32).reshape(2, 3), there))
    if exported.dtype != torch.int32 or exported.tolist() != [[0, 1, 2], [3, 4, 5]]:
        raise RuntimeError("an exported array has other values")
    for name in _NOT_IN_TORCH:
        dtype = getattr(jnp, name, None)  # older releases have fewer of them
        if dtype is not None and _exports(to_torch, dtype, there):
            raise RuntimeError(f"an array of {name}, which torch lacks, is exported")
    exported = to_torch(array)
    if exported.data_ptr() != tensor.data_ptr() or not torch.equal(exported, tensor):
        raise RuntimeError("an exported array does not share memory")
