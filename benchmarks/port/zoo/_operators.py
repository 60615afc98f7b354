"""Lets torchvision be imported beside a torch that its compiled operators were not built for.

The wheels of the package index are built for CUDA, and their operators do not load where torch was built for the
CPU; then the import ends, because it describes two operators that nobody has declared. Classification and
segmentation need none of them, so they are declared here without an implementation. Delete this when torchvision
describes only what it could load (https://github.com/pytorch/vision, ``_meta_registrations.py``, 0.28).
"""

import importlib.util
from pathlib import Path

import torch

__all__ = ["declare_operators"]

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


def declare_operators() -> None:
    """Declare the two operators if torchvision is installed and cannot load its own; do nothing the second time."""
    found = importlib.util.find_spec("torchvision")
    if _DECLARED or found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(str(Path(found.origin).parent / "_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
