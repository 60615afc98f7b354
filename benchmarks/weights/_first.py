"""What the first conversion of a process costs, against the first clone: without warm memory and without threads.

Beside both stand bare transpositions by ``device_put`` on new threads. Each is measured in a process of its own,
which builds the model and then does nothing else before it. Run as a program, this file is that process: it takes
the name of a model and ``clone``, ``device_put`` or ``to_flax``, and prints seconds.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import torch

from torchjax_bridge import to_flax

from .._case import Findings
from .._record import Promise
from .._setting import Setting
from .._timing import Spread
from ._models import MODELS, TRANSFORMER, nnx_template, torch_module
from ._syncing import put

__all__ = ["first_conversions"]

_ROUNDS = 7


def first_conversions(name: str, setting: Setting) -> Findings:
    """The first `to_flax` of a process against the first clone and transposition, of processes that take turns."""
    if setting.device != "cpu" or setting.quick:
        return Findings()
    calls = ("clone", "device_put", "to_flax")
    rounds = [[_in_a_process(name, what) for what in calls] for _ in range(_ROUNDS)]
    text = f"the first to_flax of a process, of a {name} model / its first"
    limit = 1.4 if name == TRANSFORMER else None
    clones = Spread.of([ours / clone for clone, _, ours in rounds])
    puts = Spread.of([ours / put for _, put, ours in rounds])
    return Findings(
        promises=[
            Promise(f"{text} clone", "reported" if limit is None else "at most", limit, "x", clones),
            Promise(f"{text} device_put of every tensor, on new threads", "reported", None, "x", puts),
        ]
    )


def _in_a_process(name: str, what: str) -> float:
    command = [sys.executable, "-m", __name__, name, what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure(name: str, what: str) -> float:
    description = MODELS[name](False)
    module, template = torch_module(description), nnx_template(description)
    jax.devices()  # the start of the backend is no part of a conversion
    start = time.perf_counter()
    if what == "clone":
        result: object = {key: value.clone() for key, value in module.state_dict().items()}
    elif what == "device_put":
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            result = list(pool.map(put, module.state_dict().values()))
    else:
        result = to_flax(module, template)
    seconds = time.perf_counter() - start
    del result
    return seconds


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(f"{_measure(*sys.argv[1:])}\n")
