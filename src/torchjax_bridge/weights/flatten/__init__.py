"""Who reads a flattened feature map, and who is viewed as one: torch and Flax flatten in different orders.

Owns the reading of a ``forward`` by abstract interpretation (`_interpreter`, over the values of `_abstract_value`
and the syntax of `_source`), what modules say that flatten (`_modules`), and the questions that remain
(`_questions`, in the words of `_faults`). Refuses a layer whose input order nothing tells. Runs no user code.
Gives its questions to the plan.
"""

from ._questions import COMPUTED as COMPUTED
from ._questions import ask_about_maps as ask_about_maps
from ._questions import can_be_flattened as can_be_flattened
from ._questions import knows_one_order as knows_one_order
from ._questions import output_order as output_order
