"""TODO weights.flatten."""

from ._questions import COMPUTED as COMPUTED
from ._questions import ask_about_maps as ask_about_maps
from ._questions import can_be_flattened as can_be_flattened
from ._questions import knows_one_order as knows_one_order
from ._questions import output_order as output_order
