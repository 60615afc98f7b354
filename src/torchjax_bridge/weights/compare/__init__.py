"""Two models side by side: run on the same inputs, compared layer by layer, and the first difference explained.

Owns the two runs and what is concluded from them. Refuses models that no plan pairs. Gives `parity` to users
and to the command line.

In running order: `_parity` is the way in, and `_twins` reads and pairs the models. `_models` runs both:
`_inputs` gives them the same (with `_copies`), `_record` and `_record_flax` (with `_recorder`) record what
every layer took and gave, `_steps` aligns the calls and `_compare` measures how far they are apart.
`_compensation` finds the differences that are no mistakes. `_causes` explains the first of the others (with
`_between`, `_wrong_weights`, `_rerun`, `_masks`, `_probes`, `_formula_probes`, `_attention` and `_pooling` for
its hypotheses), and `_statistics` what a step of training changed. `_rounding` runs both models again in
float64 (`_float64`) where rounding may be all there is. `_result` is what comes out, made of `_rows`.
"""

from ._evidence import Cause
from ._parity import parity
from ._result import Parity, ParityRow

__all__ = ["Cause", "Parity", "ParityRow", "parity"]
