"""What needs no second process: torch.distributed is loaded only when it is used, and one rank is a job too."""

import subprocess
import sys

import pytest
import torch

from torchjax_bridge import errors, jax_mesh, torch_mesh


def test_neither_the_package_nor_a_crossing_loads_dtensor() -> None:
    code = (
        "import sys, torch, jax, torchjax_bridge as bridge\n"
        "before = set(sys.modules)\n"
        "for name in bridge.__all__: getattr(bridge, name)\n"
        "bridge.to_torch(bridge.to_jax({'a': torch.ones(2), 'b': [torch.ones(3)]}))\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('torch.distributed')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("junk", [None, "cpu", torch.device("cpu"), 3])
def test_what_is_no_mesh_raises(junk) -> None:
    for function in (jax_mesh, torch_mesh):
        with pytest.raises(errors.DeviceError, match="is no mesh"):
            function(junk)
