"""The ``sharding`` suite: tensors and checkpoints that no process holds whole.

Processes share a machine here, so a gather costs no network, and the gain over it is the least that there is.
"""

from .._case import Findings
from .._setting import Setting
from . import _files
from ._exchange import exchange

__all__ = ["run"]


def run(setting: Setting) -> Findings:
    """Exchange in a job of two processes, and conversions of sharded checkpoints, on the CPU."""
    if setting.device != "cpu":
        return Findings()
    found = exchange(setting)
    found += _files.run(setting)
    return found
