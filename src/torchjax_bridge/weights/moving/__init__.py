"""TODO weights.moving."""

from ._fresh import fresh as fresh
from ._numpy_leaf import crossing as crossing
