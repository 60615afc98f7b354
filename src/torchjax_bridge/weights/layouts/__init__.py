"""How torch tensors lie in Flax arrays: a class for each kind of change, each with its exact inverse.

Owns `Layout` and its subclasses: for the axes of one tensor (`_axes`), between one tensor and several
(`_parts`), and combinations of other layouts (`_combined`). Refuses shapes that do not fit. Knows no layers,
and copies nothing that a view can show. Gives layouts to the rules, and through their moves to the plan and
all that runs one.
"""

from ._axes import Flip as Flip
from ._axes import Permute as Permute
from ._axes import Reshape as Reshape
from ._combined import Each as Each
from ._combined import Inverse as Inverse
from ._combined import Parallel as Parallel
from ._combined import Stack as Stack
from ._combined import Then as Then
from ._combined import then as then
from ._layout import Identity as Identity
from ._layout import Layout as Layout
from ._layout import as_bytes as as_bytes
from ._layout import same_bits as same_bits
from ._parts import Constant as Constant
from ._parts import Rows as Rows
from ._parts import Split as Split
from ._parts import Sum as Sum
