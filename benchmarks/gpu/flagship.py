"""``python -m benchmarks.gpu.flagship FOLDER``: the flagship example, with both frameworks on the GPU.

Takes the example's own images where foolbox is installed, and else random ones, on which the logits are compared
and the loss must fall all the same.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

from examples.cifar10 import port

from .._rehearsal import MARK, rehearsing

__all__ = ["main"]


def main(folder: Path) -> int:
    """Run the example on the GPU, and give its exit status."""
    arguments = ["--device", "cuda", "--source", str(folder / "flagship.py")]
    if importlib.util.find_spec("foolbox") is None:
        images = folder / "random-images.npz"
        generator = np.random.default_rng(0)
        np.savez(
            images,
            images=generator.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8),
            labels=generator.integers(0, 10, 200),
            mark=MARK if rehearsing() else "random",
        )
        arguments += ["--data", str(images)]
        print("foolbox is not installed, so the images are random")
    status = port.main(arguments)
    source = folder / "flagship.py"
    if rehearsing() and source.exists():
        source.write_text(f"# {MARK}\n{source.read_text(encoding='utf-8')}", encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
