"""``torchjax-bridge doctor``: shows what is installed, and tries an exchange."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import typer

from torchjax_bridge.errors import BridgeError

from ._options import Debug
from ._terminal import align_columns, print_line

HELP = """Show what is installed, which devices there are, and whether tensors cross correctly.

\b
Example:
  torchjax-bridge doctor

Exit codes: 0 all is well; 1 something is broken; 2 usage."""

_PACKAGES = (
    "torchjax-bridge",
    "torch",
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "optax",
    "orbax-checkpoint",
    "typer",
    "rich",
)


def doctor(debug: Debug = False) -> None:
    """Print the versions and devices, try an exchange, print the faults."""
    del debug  # errors are the result here, and always shown
    import jax

    from torchjax_bridge.exchange import choice, cuda_choice

    rows = [["python", platform.python_version()]]
    rows += [[name, _version(name)] for name in _PACKAGES]
    devices, fault = _jax_devices()
    rows += [["torch devices", _torch_devices()], ["jax devices", devices or "none"]]
    if devices:
        how = choice()
        rows += [["exchange path", f"{how.path}: {how.reason}"]]
        if on_gpu := cuda_choice():
            rows += [["exchange path on the GPU", f"{on_gpu.path}: {on_gpu.reason}"]]
    rows += [["x64 in JAX", "on" if jax.config.read("jax_enable_x64") else "off: 64-bit floats do not cross"]]
    for line in align_columns(rows):
        print_line(line)
    faults = list(_exchange_faults()) if devices else [f"JAX has no device: {fault}"]
    print_line()
    if not faults:
        print_line("all is well: tensors cross both ways, share memory and keep their bits")
        return
    for fault in faults:
        print_line(f"broken: {fault}")
    raise typer.Exit(1)


def _version(name: str) -> str:
    if name == "torch":
        import torch

        return torch.__version__  # with its build (+cpu), which the metadata may lack
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch_devices() -> str:
    import torch

    names = ["cpu", *(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))]
    return ", ".join(names)


def _jax_devices() -> tuple[str, str]:
    """Their names, or the reason why there are none."""
    import jax

    try:
        return ", ".join(str(device) for device in jax.devices()), ""
    except (RuntimeError, AssertionError) as err:
        # JAX asserts if JAX_PLATFORMS names a platform that is not installed.
        asked = os.environ.get("JAX_PLATFORMS")
        return "", str(err) or f"JAX_PLATFORMS is {asked!r}, and JAX does not find it"


def _exchange_faults() -> Iterator[str]:
    """Every fault of an exchange of small tensors, on the CPU and on a GPU that both frameworks see."""
    import torch

    from torchjax_bridge.exchange import cuda_choice

    yield from _faults_on("cpu")
    if cuda_choice() is not None:
        yield from _faults_on("cuda")
    elif torch.cuda.is_available():
        yield "torch sees a GPU and JAX does not: install jax[cuda12] or jax[cuda13] to share memory on it"


def _faults_on(device: str) -> Iterator[str]:
    import jax.numpy as jnp
    import torch

    from torchjax_bridge.exchange import to_jax, to_torch

    bits = torch.tensor([0x7FC00001, -(2**31), 1, 0x3F800000] * 16, dtype=torch.int32, device=device)
    bits = bits.view(torch.float32)
    try:
        array = to_jax(bits)
        back = to_torch(array)
        if not torch.equal(back.view(torch.int32), bits.view(torch.int32)):
            yield f"values change on the way to JAX and back ({device})"
        if array.unsafe_buffer_pointer() != bits.data_ptr() or back.data_ptr() != bits.data_ptr():
            yield f"an aligned tensor is copied where its memory could be shared ({device})"
        product = to_jax(torch.ones(3, 4, device=device)) @ to_jax(torch.ones(4, device=device))
        if float(jnp.sum(product)) != 12.0:
            yield f"JAX computes wrongly with a shared tensor ({device})"
        if bits.data_ptr() % 64:
            yield f"torch allocates on {bits.data_ptr() % 64}-byte boundaries, which JAX cannot share ({device})"
    except (BridgeError, RuntimeError) as err:
        yield f"a tensor does not cross ({device}): {err}"
