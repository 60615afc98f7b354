"""Flattened feature maps: which layers read them, and which outputs become maps. torch and Flax differ in the order.

Owns the abstract interpretation of a ``forward`` (`_interpreter`, with `_abstract_value` and `_source`), what modules
such as ``nn.Flatten`` show (`_modules`), and the questions that remain (`_questions`, `_faults`). Refuses a layer whose
input order is not known. Runs no user code. Gives its questions to the plan.
"""

from ._questions import COMPUTED as COMPUTED
from ._questions import ask_about_maps as ask_about_maps
from ._questions import can_be_flattened as can_be_flattened
from ._questions import knows_one_order as knows_one_order
from ._questions import output_order as output_order
