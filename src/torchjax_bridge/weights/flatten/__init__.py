"""Flattened feature maps, whose order differs in torch and Flax: who reads them, and which outputs become maps.

Owns the flow of axes through a recording (`_axes`, `_functions`, `_recorded`, `_told`), what shapes show without
one (`_widths`), and the questions that remain (`_questions`, `_faults`). Refuses a layer with an unknown order of
inputs. Gives its answers and questions to the plan.
"""

from ._questions import COMPUTED as COMPUTED
from ._questions import ask_about_maps as ask_about_maps
from ._questions import can_be_flattened as can_be_flattened
from ._questions import knows_one_order as knows_one_order
from ._questions import output_order as output_order
from ._recorded import Recorded as Recorded
from ._recorded import record_orders as record_orders
from ._told import tell_orders as tell_orders
