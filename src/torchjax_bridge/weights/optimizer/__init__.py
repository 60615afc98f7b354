"""TODO weights.optimizer."""

from ._convert import to_optax as to_optax
from ._convert import to_optimizer_state as to_optimizer_state
from ._frozen import FrozenWarning as FrozenWarning
