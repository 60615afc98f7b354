"""The order of CUDA work: a link copies on a stream of its own, and events keep the order; the host never waits.

The copies start after what torch's current stream was given before, such as an optimizer's step. What it is
given later, such as the next step, starts after the copies. JAX's stream waits for the copies by DLPack's rules
(https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html). The exchange
keeps memory that one side frees from the other until it has been read.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["side_streams"]

_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def side_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Run the work of the block on a side stream of each CUDA device; on the CPU, as it is."""
    cuda = [device for device in devices if device.type == "cuda"]
    with ExitStack() as stack:
        for device in cuda:
            side = _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
            current = torch.cuda.current_stream(device)
            side.wait_stream(current)
            stack.enter_context(torch.cuda.stream(side))
            stack.callback(current.wait_stream, side)
        yield
