"""Training in torch: seed, augmentation and the written file; and the committed checkpoint."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from examples.cifar10 import checkpoint, data, train
from examples.cifar10.torch_nets import Net

COMMITTED = Path(train.__file__).parent / "checkpoints" / "net.safetensors"


def test_training_twice_from_one_seed_gives_the_same_bits_and_from_another_not() -> None:
    images = data.packaged()
    one, same, other = (
        train.train(images, epochs=2, batch_size=8, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_training_lowers_the_loss() -> None:
    images = data.packaged()
    pixels = torch.from_numpy(images.normalised()).permute(0, 3, 1, 2)
    labels = torch.from_numpy(images.labels).long()

    def loss(net: Net) -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(net(pixels), labels).item()

    torch.manual_seed(0)
    before = loss(Net())
    assert loss(train.train(images, epochs=30, batch_size=10, seed=0)) < 0.8 * before


def test_an_augmented_image_is_the_image_mirrored_or_not_and_moved_by_up_to_two_pixels() -> None:
    torch.manual_seed(0)
    pixels = torch.from_numpy(data.packaged().normalised())
    augmented = train._augmented(pixels)
    assert augmented.shape == (20, 3, 32, 32)
    moves = set()
    for image, result in zip(pixels.permute(0, 3, 1, 2), augmented, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="reflect")
        found = []
        for down, right in itertools.product(range(5), range(5)):
            window = padded[:, down : down + 32, right : right + 32]
            found += [(down, right, False)] * torch.equal(result, window)
            found += [(down, right, True)] * torch.equal(result, window.flip(2))
        assert len(found) == 1
        moves.add(found[0])
    assert {mirrored for _, _, mirrored in moves} == {False, True}
    assert len({(down, right) for down, right, _ in moves}) > 5


def test_the_command_writes_weights_and_says_how_good_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = data.packaged()
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images.pixels, labels=images.labels)
    out = tmp_path / "out.safetensors"
    assert train.main(["--data", str(tmp_path), "--epochs", "1", "--out", str(out)]) == 0
    said, bar = capsys.readouterr()
    with safe_open(out, "pt") as file:
        accuracy = float(file.metadata()["test_accuracy"])
    net = Net()
    net.load_state_dict(checkpoint.read(out))
    assert train.accuracy(net, images) == pytest.approx(accuracy)
    assert f"{accuracy:.2%} of 20 test images" in said.replace("\n", " ")
    assert "epoch 1/1" in bar


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "one of the arguments --data --download is required"),
        (["--data", "x", "--epochs", "0"], 2, "argument --epochs: must be at least 1, not 0"),
        (["--data", "x", "--lr", "nan"], 2, "argument --lr: must be at least 0, not nan"),
        (["--data", "x", "--oops"], 2, "unrecognized arguments: --oops"),
        (["--data", "nowhere"], 1, "there is no nowhere"),
    ],
)
def test_bad_usage_is_one_line_and_a_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        got = train.main(arguments)
    except SystemExit as end:
        got = end.code
    out, err = capsys.readouterr()
    assert (got, out) == (code, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_without_a_folder_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = data.packaged()
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images.pixels, labels=images.labels)
    code = train.main(["--data", str(tmp_path), "--out", str(tmp_path / "no" / "a.safetensors")])
    assert code == 1
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path}/no/a.safetensors: there is no folder {tmp_path}/no\n"
    )


def test_the_committed_checkpoint_is_as_good_as_it_says(shared: Path) -> None:
    net = Net()
    net.load_state_dict(checkpoint.read(COMMITTED))
    images = data.read(shared / "data/cifar10", "test")
    with safe_open(COMMITTED, "pt") as file:
        claimed = float(file.metadata()["test_accuracy"])
    assert claimed >= 0.6
    assert abs(train.accuracy(net, images) - claimed) <= 0.002  # rounding may turn a few near ties
