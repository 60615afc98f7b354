"""The main job: a trained network goes from torch to Flax, trains on in JAX, and comes back.

Every claim is checked, and the exit code says whether all held: the twins compute the same logits,
the round trip is exact to the bit, fine-tuning lowers the loss, and torch computes what the fine-tuned
network computes.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import torch
from rich.console import Console
from torch import Tensor, nn

from torchjax_bridge import plan, to_jax, to_state_dict
from torchjax_bridge.errors import BridgeError

from . import checkpoint, data, tables, terminal
from .compare import Outcome, disagreements, observe
from .crossing import nnx_forward, to_linen, to_nnx
from .finetune import finetune
from .networks import recognise

CHECKPOINT = Path(__file__).parent / "checkpoints" / "net.safetensors"
_BATCH = 500  # images a forward pass, so that memory stays small


class CheckError(Exception):
    """Some checks failed; the message lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m examples.cifar10.port``; returns its exit code."""
    options = _parser().parse_args(argv)
    return terminal.exit_code(lambda: _run(options), data.DataError, BridgeError, CheckError)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Parser(
        prog="python -m examples.cifar10.port",
        description="Port a CIFAR-10 network that was trained in torch to Flax (nnx and linen), prove that "
        "it computes the same, fine-tune it in JAX, and bring it back to torch.",
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
        "--seed", type=terminal.at_least(0), default=0, metavar="N", help="of the fine-tuning's batches (0)"
    )
    parser.add_argument("--plan", action="store_true", help="also print where each weight goes")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the fine-tuned weights as safetensors"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.save:
        checkpoint.require_folder(options.save)
    if options.download:
        images = data.read(data.download())
    else:
        images = data.read(options.data) if options.data else data.packaged()
    state = checkpoint.read(options.checkpoint)
    console = terminal.results()
    # Both frameworks on the CPU and in full float32, so that logits and times compare like with like.
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        tuned = port(
            state, images, steps=options.steps, seed=options.seed, show_plan=options.plan, console=console
        )
    if options.save:
        checkpoint.write(options.save, tuned)
        console.print(f"wrote {options.save}", soft_wrap=True)


def port(
    state: Mapping[str, Tensor],
    images: data.Images,
    *,
    steps: int,
    seed: int = 0,
    show_plan: bool = False,
    console: Console,
) -> Mapping[str, Tensor]:
    """The whole way: across, compared, trained on, and back.

    Args:
        state: The trained weights, by their torch names.
        images: What the networks are compared and fine-tuned on.
        steps: Steps of fine-tuning.
        seed: Of the fine-tuning's batches.
        show_plan: Also print where each weight goes.
        console: Where the results go.

    Returns:
        The fine-tuned weights, by their torch names.

    Raises:
        BridgeError: ``state`` is no network that this example knows; the message lists every fault.
        CheckError: Some check failed; the message lists every one that did.
    """
    network = recognise(state)
    net = network.load(state)
    # One memory for both: torch wants the channels first, which is a strided view of the same pixels.
    batches = torch.from_numpy(images.normalised()).split(_BATCH)
    torch_batches = [batch.permute(0, 3, 1, 2) for batch in batches]
    jax_batches = [to_jax(batch) for batch in batches]

    console.print(f"[bold]{network.name}[/], from torch to Flax, on {images.source}", soft_wrap=True)
    twins = [to_nnx(net, network), to_linen(net, network)]
    reference, *outcomes = _observe(
        "comparing",
        [
            (partial(_forward, net), torch_batches),
            *((twin.forward, jax_batches) for twin in twins),
        ],
    )
    console.print(tables.across(images, net, reference, twins, outcomes))
    if show_plan:
        console.print(str(plan(net, twins[0].model, rules=network.rules)), soft_wrap=True, markup=False)
    faults = []
    for twin, outcome in zip(twins, outcomes, strict=True):
        faults += disagreements(twin.kind, reference, outcome, images.labels)
        if not twin.round_trip:
            faults.append(f"{twin.kind}: torch -> Flax -> torch is not bitwise equal")
    _require(faults)

    console.print(
        f"{steps} steps of fine-tuning in JAX, on these very images, and back to torch", soft_wrap=True
    )
    model = twins[0].model
    losses = finetune(model, images, steps=steps, seed=seed)
    weights = to_state_dict(model, net, rules=network.rules)
    tuned, back = _observe(
        "comparing",
        [
            (nnx_forward(model), jax_batches),
            (partial(_forward, network.load(weights)), torch_batches),
        ],
    )
    console.print(tables.and_back(images, losses, outcomes[0], tuned, back))
    faults = disagreements("back in torch", tuned, back, images.labels)
    before, after = (outcome.loss(images.labels) for outcome in (outcomes[0], tuned))
    if not after < before:
        faults.append(f"fine-tuning: the loss did not fall, it went from {before:.4f} to {after:.4f}")
    _require(faults)
    console.print("Every check held.")
    return weights


@torch.no_grad()
def _forward(net: nn.Module, pixels: Tensor) -> Tensor:
    return net(pixels)


def _observe(title: str, runs: Sequence[tuple[Callable[[Any], Any], Sequence[Any]]]) -> list[Outcome]:
    """The outcome of each forward pass on its batches, under one progress bar."""
    with terminal.progress(transient=True) as bar:
        return [observe(forward, batches) for forward, batches in bar.track(runs, description=title)]


def _require(faults: Sequence[str]) -> None:
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise CheckError(f"{len(faults)} of the checks failed:{lines}")


if __name__ == "__main__":
    sys.exit(main())
