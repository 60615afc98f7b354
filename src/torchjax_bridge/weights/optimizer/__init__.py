"""Optimizer state: the moments of a torch optimizer as an optax state, and back, laid out as the weights are.

Owns the table of torch's optimizers (`_classes`), the reading and filling of an optax state (`_optax_state`),
and the check that both sides train the same parameters (`_frozen`). Refuses an optimizer whose formulas differ,
with the reason. Needs optax. Gives `to_optax` and `to_optimizer_state` to users; no other package uses it.
"""

from ._convert import to_optax as to_optax
from ._convert import to_optimizer_state as to_optimizer_state
from ._frozen import FrozenWarning as FrozenWarning
