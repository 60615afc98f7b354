"""Two models side by side: run on the same inputs, compared layer by layer, and the first difference explained.

Owns the two runs and what is concluded from them. Refuses models that no plan pairs. Gives `parity` to users
and to the command line.

In running order: `_twins` reads and pairs the models, `_inputs` hands both the same (with `_copies`), `_record`
runs them and keeps what their layers were given and gave, `_steps` puts call beside call, `_made_up` says which
differences are no mistakes, `_causes` says why the first of the rest differs (with `_wrong_weights`, `_rerun`,
`_masks`, `_probes`, `_forms`, `_attention` and `_pooling` for its hypotheses, `_statistics` for a step of
training), `_float64` makes both once more where rounding may be all there is, `_parity` is the way in and `_result`
what comes out.
"""

from ._evidence import Cause
from ._parity import parity
from ._result import Parity, ParityRow

__all__ = ["Cause", "Parity", "ParityRow", "parity"]
