"""The command of the example: a trained network goes from torch to Flax, is fine-tuned in JAX, and comes back.

`port` writes its Flax source from torch alone; two twins written by hand stand beside it. Checks that all compute
the same logits, that the round trip is exact to the bit, that fine-tuning lowers the loss, and that torch computes
the same as the fine-tuned network. The exit code says whether all checks held.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from rich.console import Console
from torch import Tensor, nn

from torchjax_bridge import jax_device, plan, to_jax, to_state_dict
from torchjax_bridge.errors import BridgeError

from . import checkpoint, data, tables, terminal
from .compare import ForwardResult, disagreements, run_timed
from .conversion import nnx_forward, to_linen, to_nnx, to_port
from .finetune import finetune
from .networks import recognise

CHECKPOINT = Path(__file__).parent / "checkpoints" / "net.safetensors"
_SHARED = Path(os.environ.get("TORCHJAX_BRIDGE_SHARED", Path(__file__).parents[3] / "shared")) / "data"
_BATCH = 500  # images per forward pass, to limit memory


class CheckError(Exception):
    """Some checks failed; the message lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m examples.cifar10.port``; returns its exit code."""
    options = _parser().parse_args(argv)
    return terminal.exit_code(lambda: _run(options), data.DataError, BridgeError, CheckError)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Parser(
        prog="python -m examples.cifar10.port",
        description="Port a CIFAR-10 network that was trained in torch to Flax, from torch alone and to twins "
        "written by hand (nnx and linen), prove that it computes the same, "
        "fine-tune it in JAX, and bring it back to torch.",
        epilog="Without options: the small network that this example trained, on the 20 real test images "
        "that the package foolbox ships; no network connection is needed. "
        "Exit codes: 0 every check held, 1 a check failed or an input is bad, 2 wrong usage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=CHECKPOINT,
        metavar="FILE",
        help="weights of Net or of a CIFAR ResNet-20, as .safetensors or as torch's .pt, .pth, .th "
        "(read with weights_only=True)",
    )
    parser.add_argument(
        "--others",
        action="store_true",
        help="the ResNet-20 that others trained, and 200 real images, from ../shared/data beside the project; "
        "skipped where there is none",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="test images: the binary version of CIFAR-10 (its folder, .tar.gz or a .bin), or an .npz with "
        "images (N, 32, 32, 3) uint8 and labels (N,)",
    )
    source.add_argument(
        "--download",
        action="store_true",
        help="test images: fetch the official archive (162 MiB) into examples/cifar10/data, once",
    )
    parser.add_argument(
        "--steps", type=terminal.at_least(1), default=100, metavar="N", help="steps of fine-tuning (100)"
    )
    parser.add_argument(
        "--seed",
        type=terminal.at_least(0),
        default=0,
        metavar="N",
        help="the seed of the batches (0)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where both frameworks compute (cpu)"
    )
    parser.add_argument("--plan", action="store_true", help="also print where each weight goes")
    parser.add_argument("--source", type=Path, metavar="FILE", help="write the Flax source of the port")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the fine-tuned weights as safetensors"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    for file in filter(None, (options.save, options.source)):
        checkpoint.require_folder(file)
    if options.others:
        options.checkpoint = _SHARED / "checkpoints" / "resnet20-12fca82f.th"
        if not options.checkpoint.is_file():
            terminal.results_console().print(f"ResNet-20 is skipped: there is no {options.checkpoint}")
            return
        images = data.read(_SHARED / "cifar10" / "test.npz")
        images = replace(images, pixels=images.pixels[:200], labels=images.labels[:200])
    elif options.download:
        images = data.read(data.download())
    else:
        images = data.read(options.data) if options.data else data.packaged()
    state = checkpoint.read(options.checkpoint)
    console = terminal.results_console()
    # Both frameworks on one device and in full float32, so logits and times are comparable.
    with (
        _without_tf32(),
        jax.default_device(jax_device(options.device)),
        jax.default_matmul_precision("highest"),
    ):
        tuned = port(
            state,
            images,
            steps=options.steps,
            seed=options.seed,
            device=options.device,
            show_plan=options.plan,
            source=options.source,
            console=console,
        )
    if options.save:
        checkpoint.write(options.save, tuned)
        console.print(f"wrote {options.save}", soft_wrap=True)


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def port(
    state: Mapping[str, Tensor],
    images: data.Images,
    *,
    steps: int,
    seed: int = 0,
    device: str = "cpu",
    show_plan: bool = False,
    source: Path | None = None,
    console: Console,
) -> Mapping[str, Tensor]:
    """Convert the network, compare, fine-tune, and convert it back.

    Args:
        state: The trained weights, by their torch names.
        images: The images for the comparison and the fine-tuning.
        steps: Steps of fine-tuning.
        seed: The seed of the fine-tuning's batches.
        device: Where torch computes; JAX's default device should be the same.
        show_plan: Also print where each weight goes.
        source: Where the Flax source of the port goes.
        console: Where to print the results.

    Returns:
        The fine-tuned weights, by their torch names.

    Raises:
        BridgeError: ``state`` does not fit a network of this example; the message lists every fault.
        CheckError: Checks failed; the message lists them.
    """
    network = recognise(state)
    net = network.load(state).to(device)
    # Both share one memory: torch's channels-first batches are strided views of the same pixels.
    batches = torch.from_numpy(images.normalised()).to(device).split(_BATCH)
    torch_batches = [batch.permute(0, 3, 1, 2) for batch in batches]
    jax_batches = [to_jax(batch) for batch in batches]

    console.print(f"[bold]{network.name}[/], from torch to Flax, on {images.source}", soft_wrap=True)
    ported = to_port(net, torch_batches[0][:2])
    twins = [ported, to_nnx(net, network), to_linen(net, network)]
    console.print(f"the port is {ported.port}", soft_wrap=True, markup=False, highlight=False)
    if source is not None and ported.port is not None:
        ported.port.save(source)
    reference, *results = _run_all(
        "comparing",
        [
            (partial(_forward, net), torch_batches),
            *((twin.forward, jax_batches) for twin in twins),
        ],
    )
    console.print(tables.comparison_table(images, net, reference, twins, results))
    if show_plan:
        console.print(str(plan(net, ported.model, rules=ported.rules)), soft_wrap=True, markup=False)
    faults = []
    for twin, result in zip(twins, results, strict=True):
        faults += disagreements(twin.kind, reference, result, images.labels)
        if not twin.round_trip:
            faults.append(f"{twin.kind}: torch -> Flax -> torch is not bitwise equal")
    _require(faults)

    console.print(
        f"{steps} steps of fine-tuning in JAX, on these very images, and back to torch", soft_wrap=True
    )
    model = ported.model
    losses = finetune(model, images, steps=steps, seed=seed)
    weights = to_state_dict(model, net, rules=ported.rules)
    tuned, back = _run_all(
        "comparing",
        [
            (nnx_forward(model), jax_batches),
            (partial(_forward, network.load(weights).to(device)), torch_batches),
        ],
    )
    console.print(tables.finetuning_table(images, losses, results[0], tuned, back))
    faults = disagreements("back in torch", tuned, back, images.labels)
    before, after = (result.loss(images.labels) for result in (results[0], tuned))
    if not after < before:
        faults.append(f"fine-tuning: the loss did not fall, it went from {before:.4f} to {after:.4f}")
    _require(faults)
    console.print("Every check held.")
    return weights


@torch.no_grad()
def _forward(net: nn.Module, pixels: Tensor) -> Tensor:
    return net(pixels).cpu()


def _run_all(title: str, runs: Sequence[tuple[Callable[[Any], Any], Sequence[Any]]]) -> list[ForwardResult]:
    """The result of each forward pass on its batches, under one progress bar."""
    with terminal.progress(transient=True) as bar:
        return [run_timed(forward, batches) for forward, batches in bar.track(runs, description=title)]


def _require(faults: Sequence[str]) -> None:
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise CheckError(f"{len(faults)} of the checks failed:{lines}")


if __name__ == "__main__":
    sys.exit(main())
