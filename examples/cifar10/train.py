"""Train the small network in torch and write its weights as safetensors.

SGD with momentum under a one-cycle learning rate; images are flipped and shifted at random. The seed
determines everything random. Reports the accuracy of the last epoch: no epoch is chosen by its result on the
test images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchjax_bridge.errors import CheckpointError

from . import checkpoint, data, terminal
from .torch_nets import Net


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``python -m examples.cifar10.train``; returns its exit code."""
    options = _parser().parse_args(argv)
    return terminal.exit_code(lambda: _run(options), data.DataError, CheckpointError)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.Parser(
        prog="python -m examples.cifar10.train",
        description="Train the small CIFAR-10 network in torch and write its weights as safetensors.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="the binary version of CIFAR-10 (a folder or its .tar.gz), or a folder with train.npz and "
        "test.npz",
    )
    source.add_argument(
        "--download",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fetch the official archive (162 MiB) into examples/cifar10/data, once",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("net.safetensors"), metavar="FILE", help="where the weights go"
    )
    parser.add_argument(
        "--epochs", type=terminal.at_least(1), default=80, metavar="N", help="passes over the images"
    )
    parser.add_argument(
        "--batch-size", type=terminal.at_least(1), default=64, metavar="N", help="images per step"
    )
    parser.add_argument(
        "--lr", type=terminal.at_least(0, float), default=0.02, metavar="X", help="the highest learning rate"
    )
    parser.add_argument(
        "--momentum", type=terminal.at_least(0, float), default=0.9, metavar="X", help="SGD's momentum"
    )
    parser.add_argument(
        "--weight-decay", type=terminal.at_least(0, float), default=3e-3, metavar="X", help="SGD's L2 penalty"
    )
    parser.add_argument(
        "--seed",
        type=terminal.at_least(0),
        default=0,
        metavar="N",
        help="the seed of everything random",
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    path = data.download() if "download" in options else options.data
    images, held_out = data.read(path, "train"), data.read(path, "test")
    checkpoint.require_folder(options.out)
    net = train(
        images,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )
    reached = accuracy(net, held_out)
    checkpoint.write(
        options.out,
        net.state_dict(),
        {"network": "Net", "test_accuracy": f"{reached:.4f}", "seed": str(options.seed)},
    )
    terminal.results_console().print(
        f"{reached:.2%} of {len(held_out):,} test images ({accuracy(net, images):.2%} of {len(images):,} "
        f"training images); weights in {options.out}",
        soft_wrap=True,
    )


def train(
    images: data.Images,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 3e-3,
    seed: int = 0,
) -> Net:
    """A `Net` trained on ``images``.

    Args:
        images: What to train on.
        epochs: Passes over the images.
        batch_size: Images per step; the last step of an epoch takes the rest.
        lr: The highest learning rate of the one-cycle schedule.
        momentum: SGD's momentum.
        weight_decay: SGD's L2 penalty.
        seed: The seed of the initial weights, the order and the augmentation.
    """
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    steps = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=epochs * steps, cycle_momentum=False
    )
    pixels = torch.from_numpy(images.normalised())
    labels = torch.from_numpy(images.labels).long()
    net.train()
    with terminal.progress() as bar:
        task = bar.add_task("training", total=epochs * steps)
        for epoch in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(images)).split(batch_size):
                loss = F.cross_entropy(net(_augmented(pixels[rows])), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
                bar.advance(task)
            bar.update(task, description=f"epoch {epoch + 1}/{epochs}, loss {total / len(images):.3f}")
    return net


def accuracy(net: torch.nn.Module, images: data.Images) -> float:
    """The fraction of ``images`` whose largest logit is their label's."""
    net.eval()
    pixels = torch.from_numpy(images.normalised()).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predictions = torch.cat([net(batch).argmax(1) for batch in pixels.split(500)])
    return (predictions == torch.from_numpy(images.labels)).float().mean().item()


def _augmented(pixels: Tensor, reach: int = 2) -> Tensor:
    """Images mirrored and shifted by up to ``reach`` pixels at random; ``(N, H, W, C)`` -> ``(N, C, H, W)``."""
    n, height, width, _ = pixels.shape
    padded = F.pad(pixels.permute(0, 3, 1, 2), (reach,) * 4, mode="reflect")
    rows = torch.randint(2 * reach + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * reach + 1, (n, 1)) + torch.arange(width)
    mirrored = torch.rand(n, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


if __name__ == "__main__":
    sys.exit(main())
