"""Which torch layer is which Flax scope, and what moves between them.

Owns `Move` and `Match`. `_matcher` walks both trees together; `_siblings` pairs the children of two parents,
with `_search` as a last resort; `_alike` finds blocks that need no second comparison; `_bind` applies a rule
to one pair; `_tied_places` handles tensors with several names. Refuses what has two answers, with the line
that settles it. Moves no values. Gives `Matcher` to the plan and to the outline of files.
"""

from ._bind import RAW as RAW
from ._bind import Move as Move
from ._class_questions import merge_class_faults as merge_class_faults
from ._custom_layers import merge_by_class as merge_by_class
from ._full_paths import match_with_full_paths as match_with_full_paths
from ._kept_and_filled import fill_moves as fill_moves
from ._kept_and_filled import keep_in_torch as keep_in_torch
from ._kept_and_filled import take_out_filled as take_out_filled
from ._matcher import Matcher as Matcher
from ._rename_targets import rename_target_faults as rename_target_faults
from ._search import restrict_series as restrict_series
from ._tied_places import separate_leaf_notes as separate_leaf_notes
from ._tied_places import settle_ties as settle_ties
