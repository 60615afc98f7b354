"""The ``weights`` suite: what it costs to convert a model's weights, against cloning them.

``_models`` builds the two models on both sides; every other file asks one question.
"""

from .._case import Findings
from .._setting import Setting
from ._conversion import conversion, sharing
from ._first import first_conversions
from ._models import MODELS, TRANSFORMER, nnx_template, torch_module
from ._planning import planning
from ._space import peak_memory
from ._syncing import small_leaves, syncing

__all__ = ["MODELS", "TRANSFORMER", "nnx_template", "run", "torch_module"]


def run(setting: Setting) -> Findings:
    """Every question of the suite."""
    found = setting.findings
    found += planning(setting)
    found += small_leaves(setting)
    found += syncing(TRANSFORMER, MODELS[TRANSFORMER](setting.quick), setting)
    for name, describe in MODELS.items():
        found += conversion(name, describe(setting.quick), setting)
        found += sharing(name, describe(setting.quick), setting)
        found += first_conversions(name, setting)
        found += peak_memory(name, describe(setting.quick), setting)
    return found
