"""Models to port, in sets: what each is built by, and what it is given.

Every model has random weights and none is downloaded. No zero and no tiny scale among them hides an error
(`perturb`), and BatchNorm's statistics fit the inputs (`calibrate`). torchvision and timm come with the extra
``zoo``, transformers with the group ``ecosystem``; a set is listed without importing its library, which only
building a model does.
"""

from collections.abc import Callable

from ._cifar import cifar, example
from ._entry import Entry
from ._perturb import calibrate, perturb
from ._timm import timm
from ._torchvision import classification, segmentation
from ._transformers import transformers

__all__ = ["NEEDS", "SETS", "Entry", "calibrate", "find", "perturb"]

SETS: dict[str, Callable[[], list[Entry]]] = {
    "example": example,
    "cifar": cifar,
    "torchvision": classification,
    "segmentation": segmentation,
    "timm": timm,
    "transformers": transformers,
}

# The library of a set, where it is not one that the environment of a developer has anyway.
NEEDS = {
    "torchvision": "torchvision",
    "segmentation": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
}


def find(set_name: str, name: str) -> Entry:
    """The entry of that name in that set.

    Raises:
        LookupError: There is none.
    """
    for entry in SETS[set_name]():
        if entry.name == name:
            return entry
    raise LookupError(f"{set_name} has no model {name!r}")
