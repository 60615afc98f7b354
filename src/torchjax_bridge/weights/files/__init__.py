"""Checkpoints: what lies on disk, read, written and converted without holding more than one tensor.

Owns the formats and every byte on disk: ``load_*`` and ``save_*`` go between a file and memory, `convert` from
file to file, `open_checkpoint` looks without reading a value. Every sound file is read exactly. Refuses every
other with one `CheckpointError`; nothing in a file is ever run. Gives its verbs to users and to the command
line.
"""

from ._convert import Converted, Route, convert, find_route, framework_of
from ._leaf import Checkpoint, Leaf
from ._load_save import load_flax, load_state_dict, save_flax, save_state_dict
from ._open import open_checkpoint
from ._outline import Line, outline
from ._verify import Comparison, Difference, compare_checkpoints

__all__ = [
    "Checkpoint",
    "Comparison",
    "Converted",
    "Difference",
    "Leaf",
    "Line",
    "Route",
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
