"""The ports that a person has read. ``python -m tests.porting.golden_sources`` writes them anew.

Read what changed before you commit it.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.port.cifar import BUILDERS
from examples.cifar10.torch_nets import Net
from torchjax_bridge import port

__all__ = ["FOLDER", "GOLDEN", "source_of"]

FOLDER = Path(__file__).parent / "golden"
GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    **{name: BUILDERS[name] for name in ("densenet", "efficientnet", "resnet20", "shufflenetv2", "vit")},
}


def source_of(name: str) -> str:
    """The source of a port today, with no versions in its header."""
    torch.manual_seed(0)
    module = GOLDEN[name]().eval()
    return without_versions(port(module, torch.randn(2, 3, 32, 32), verify=False).source)


def without_versions(source: str) -> str:
    """A source whose header is the same for every version of torch, Flax and this library."""
    header, quotes, rest = source.removeprefix('"""').partition('"""')
    return '"""' + re.sub(r"\b\d+\.\d+\.\d+\w*", "X", header) + quotes + rest


if __name__ == "__main__":
    for name in GOLDEN:
        (FOLDER / f"{name}.py").write_text(source_of(name))
