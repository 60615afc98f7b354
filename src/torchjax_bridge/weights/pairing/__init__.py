"""Which torch layer is which Flax scope, and what moves between them.

Owns a `Move` and a `Match`: `_matcher` walks both trees together, `_siblings` pairs the children of two parents,
`_search` finds what alone fits, `_alike` says which blocks need no second comparison, `_bind` applies a rule to
one pair, `_tied_places` settles tensors with several names. Refuses what has two answers, with the line that
settles it. Moves no values. Gives `Matcher` to the plan and to the outline of files.
"""

from ._bind import RAW as RAW
from ._bind import Move as Move
from ._class_doubts import ask_once as ask_once
from ._excused import filled as filled
from ._excused import keep_in_torch as keep_in_torch
from ._excused import take_filled as take_filled
from ._matcher import Matcher as Matcher
from ._own_layers import gathered as gathered
from ._real_paths import matched_by_real_paths as matched_by_real_paths
from ._rule_names import names_that_are_not_there as names_that_are_not_there
from ._search import within_their_series as within_their_series
from ._tied_places import separate_leaves as separate_leaves
from ._tied_places import settle_ties as settle_ties
