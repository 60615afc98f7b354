"""Flattened feature maps, whose order differs in torch and Flax: who reads them, and which outputs become maps.

Owns the abstract interpretation of a ``forward`` (`_interpreter`, `_abstract_value`, `_source`), what modules
such as ``nn.Flatten`` show (`_modules`), and the questions that remain (`_questions`, `_faults`). Refuses a layer
with an unknown order of inputs. Runs no user code. Gives its questions to the plan.
"""

from ._questions import COMPUTED as COMPUTED
from ._questions import ask_about_maps as ask_about_maps
from ._questions import can_be_flattened as can_be_flattened
from ._questions import knows_one_order as knows_one_order
from ._questions import output_order as output_order
