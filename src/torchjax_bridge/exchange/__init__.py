"""Data: tensors and pytrees of tensors, between torch and JAX, through DLPack.

Depends on torch, jax and numpy alone. Other packages import from here, not from the files below.
"""

from ._devices import jax_device, torch_device
from ._dlpack import Choice, choice, cuda_choice, numpy_view
from ._dtensors import array_of_shard, dtensor_class, dtensor_of_shard, local_tensor
from ._dtypes import jax_dtype, torch_dtype
from ._fork import at_fork, refuse_in_fork
from ._meshes import device_of_this_rank, gather_from_ranks, jax_mesh, torch_mesh, whole_mesh
from ._paths import Path, from_jax_keypath, join_path, split_path
from ._placements import jax_sharding, torch_placements
from ._pytree import flatten
from ._refusals import check_copy
from ._tensors import array_to_torch, tensor_to_jax, x64
from ._trees import to_jax, to_torch

__all__ = [
    "Choice",
    "Path",
    "array_of_shard",
    "array_to_torch",
    "at_fork",
    "check_copy",
    "choice",
    "cuda_choice",
    "device_of_this_rank",
    "dtensor_class",
    "dtensor_of_shard",
    "flatten",
    "from_jax_keypath",
    "gather_from_ranks",
    "jax_device",
    "jax_dtype",
    "jax_mesh",
    "jax_sharding",
    "join_path",
    "local_tensor",
    "numpy_view",
    "refuse_in_fork",
    "split_path",
    "tensor_to_jax",
    "to_jax",
    "to_torch",
    "torch_device",
    "torch_dtype",
    "torch_mesh",
    "torch_placements",
    "whole_mesh",
    "x64",
]
