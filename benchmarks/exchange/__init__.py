"""The ``exchange`` suite: the cost of converting a tensor and a tree of tensors.

``_routes`` holds every conversion and checks each result; every other file asks one question.
"""

from torchjax_bridge import exchange

from .._case import Findings
from .._setting import Setting
from ._dispatch import dispatch, results
from ._expanded import expanded
from ._flat import flatness
from ._headline import headline
from ._host_wait import no_host_wait
from ._routes import both_directions
from ._sweep import sweep
from ._trees import state_dict, tree

__all__ = ["run"]


def run(setting: Setting) -> Findings:
    """Every question of the suite; those with promises first, while the process is fresh."""
    directions, missing = both_directions(setting)
    chosen = exchange.choice()
    found = setting.findings
    found.facts += [f"The bridge took its {chosen.path} path: {chosen.reason}", *missing]
    if on_gpu := exchange.cuda_choice():
        found.facts.append(f"On the GPU it took its {on_gpu.path} path: {on_gpu.reason}")
    for ask_question in (headline, tree, state_dict, flatness):
        for direction in directions:
            found += ask_question(direction, setting)
    found += expanded(directions[0], setting)
    found += dispatch(directions[0], setting)
    found += results(directions[1], setting)
    if setting.device == "cuda":
        for direction in directions:
            found += no_host_wait(direction, setting)
    for direction in directions:
        found += sweep(direction, setting)
    return found
