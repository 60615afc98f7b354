"""``python -m benchmarks.gpu.flagship FOLDER``: the flagship example, with both frameworks on the GPU.

Takes the example's own images where foolbox is installed, and else random ones, on which the logits are compared
and the loss must fall all the same. Without the package ``safetensors`` its checkpoint is read here.
"""

import importlib.util
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

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
    with TemporaryDirectory() as scratch:
        if importlib.util.find_spec("safetensors") is None:
            checkpoint = Path(scratch) / "net.pt"
            torch.save(read_float32(port.CHECKPOINT), checkpoint)
            arguments += ["--checkpoint", str(checkpoint)]
        status = port.main(arguments)
    source = folder / "flagship.py"
    if rehearsing() and source.exists():
        source.write_text(f"# {MARK}\n{source.read_text(encoding='utf-8')}", encoding="utf-8")
    return status


def read_float32(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, all of float32 (https://github.com/huggingface/safetensors#format)."""
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        begin, end = (data + offset for offset in entry["data_offsets"])
        assert entry["dtype"] == "F32", f"{name} is of {entry['dtype']}"
        state[name] = torch.from_numpy(np.frombuffer(content[begin:end], "<f4").copy()).view(entry["shape"])
    return state


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
