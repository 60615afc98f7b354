"""MODELS CROSS: a torch module becomes Flax source, class for class, with its weights and a proof.

Owns the translation of a recording into source. Refuses what has no exact counterpart, all of it at once.
Gives `port`. Needs flax.
"""

from ._parts import Replacement
from ._port import port
from ._result import Port
from ._torch_part import TorchPart

__all__ = ["Port", "Replacement", "TorchPart", "port"]
