"""Checkpoints on disk: read, written and converted one tensor at a time.

Owns the formats and every byte on disk: ``load_*`` and ``save_*`` go between a file and memory, `convert` from
file to file, `open_checkpoint` reads no values. Every intact file is read exactly. Refuses a damaged file with one
`CheckpointError`, and never runs code in a file. Gives its functions to users and to the command line.
"""

from ._atomic import atomic_file, check_target
from ._convert import Converted, Route, convert, find_route, framework_of
from ._leaf import Checkpoint, Leaf
from ._load_save import load_flax, load_state_dict, save_flax, save_state_dict
from ._open import open_checkpoint
from ._outline import TensorInfo, outline
from ._verify import Comparison, TensorDifference, compare_checkpoints

__all__ = [
    "Checkpoint",
    "Comparison",
    "Converted",
    "Leaf",
    "Route",
    "TensorDifference",
    "TensorInfo",
    "atomic_file",
    "check_target",
    "compare_checkpoints",
    "convert",
    "find_route",
    "framework_of",
    "load_flax",
    "load_state_dict",
    "open_checkpoint",
    "outline",
    "save_flax",
    "save_state_dict",
]
