"""The ``exchange`` suite: what a tensor, and a tree of tensors, costs to cross.

``_routes`` holds every way across and checks each result; every other file asks one question.
"""

from torchjax_bridge import exchange

from .._case import Findings
from .._setting import Setting
from ._dispatch import dispatch, results
from ._expanded import expanded
from ._flat import flatness
from ._headline import headline
from ._order import no_host_wait
from ._routes import both_directions
from ._sweep import sweep
from ._trees import state_dict, tree

__all__ = ["run"]


def run(setting: Setting) -> Findings:
    """Every question of the suite; the promises first, while the process is young."""
    directions, missing = both_directions(setting)
    chosen = exchange.choice()
    found = Findings(facts=[f"The bridge took its {chosen.path} path: {chosen.reason}", *missing])
    for part in (headline, tree, state_dict, flatness):
        for direction in directions:
            found += part(direction, setting)
    found += expanded(directions[0], setting)
    found += dispatch(directions[0], setting)
    found += results(directions[1], setting)
    if setting.device == "cuda":
        for direction in directions:
            found += no_host_wait(direction, setting)
    for direction in directions:
        found += sweep(direction, setting)
    return found
