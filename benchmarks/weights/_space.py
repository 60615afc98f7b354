"""How much memory a conversion needs beside the model: the result, and little more."""

import gc
from pathlib import Path

from torchjax_bridge import to_flax

from .._case import Findings
from .._memory import give_back_memory
from .._record import Promise
from .._setting import Setting
from .._timing import Spread
from ._models import Description, nnx_template, torch_module

__all__ = ["peak_memory"]


def peak_memory(name: str, description: Description, setting: Setting) -> Findings:
    """The peak of resident memory over its start, divided by the size of the result plus one leaf."""
    if setting.device != "cpu" or setting.quick or not Path("/proc/self/clear_refs").exists():
        return Findings()
    module = torch_module(description)
    template = nnx_template(description)
    sizes = [tensor.nbytes for tensor in module.state_dict().values()]
    shares = []
    for _ in range(3):
        gc.collect()  # a Flax module is a cycle, and would be given back in the middle of the next conversion
        give_back_memory()  # what an earlier result left to be used again would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        before = _status("VmRSS")
        twin = to_flax(module, template)
        shares.append((_status("VmHWM") - before) / (sum(sizes) + max(sizes)))
        del twin
    text = f"peak extra memory of to_flax of a {name} model / (result + one leaf)"
    return Findings(promises=[Promise(text, "at most", 1.05, "x", Spread.of(shares))])


def _status(field: str) -> int:
    """A figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
