"""Real CIFAR-10 images: from the installed package, from a path, or from the official site.

Reads the official binary version (a folder, its ``.tar.gz``, or one ``.bin`` batch) and ``.npz`` files with
``images`` and ``labels``. Refuses pickles (the "python version"). Never makes up an image.
"""

import hashlib
import http.client
import importlib.util
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import DownloadColumn, TransferSpeedColumn

from . import atomic, terminal

Split = Literal["train", "test"]

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CACHE = Path(__file__).parent / "data"  # git ignores it

# The names of the official binary version.
_FOLDER = "cifar-10-batches-bin"
_BATCHES: dict[Split, Sequence[str]] = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
_RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane, row by row

# The statistics (of ImageNet) with which the third-party ResNet-20 was trained; Net uses the same.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


class DataError(ValueError):
    """The images are not available; the message names the path and what was expected there."""


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: ``(N, 32, 32, 3)`` uint8.
        labels: ``(N,)`` uint8, each below 10.
        source: Where they came from, as text.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def normalised(self) -> NDArray[np.float32]:
        """The pixels as the networks take them: ``(N, 32, 32, 3)`` float32, centred and scaled by channel."""
        return ((self.pixels / np.float32(255) - _MEAN) / _STD).astype(np.float32, copy=False)


def packaged() -> Images:
    """The first 20 images of the CIFAR-10 test set, which the package ``foolbox`` ships as PNG files.

    Only its files are read; the package itself is not imported.
    """
    spec = importlib.util.find_spec("foolbox")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the default images ship with the package foolbox, which is not installed. "
            "Run pip install 'torchjax-bridge[examples]', or pass --data."
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob("cifar10_*.png"))  # cifar10_00_3.png: image 0, a cat
    if not files:
        raise DataError(f"the installed foolbox has no cifar10_*.png in {folder}; pass --data instead")
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    labels = np.array([int(file.stem.rsplit("_", 1)[1]) for file in files], np.uint8)
    return Images(pixels, labels, f"the first {len(files)} images of the CIFAR-10 test set")


def read(path: Path, split: Split = "test") -> Images:
    """The images at ``path``.

    Args:
        path: A folder or archive with the official binary version, one of its ``.bin`` batches, an ``.npz``
            with ``images`` ``(N, 32, 32, 3)`` uint8 and ``labels`` ``(N,)``, or a folder with ``train.npz``
            and ``test.npz``.
        split: Which part to read, if ``path`` holds both.

    Raises:
        DataError: Nothing is there, or something else.
    """
    try:
        if path.is_dir():
            return _from_folder(path, split)
        if path.suffix == ".npz":
            return _from_npz(path)
        if path.suffix == ".bin":
            return _from_batches([(path.name, path.read_bytes())], str(path))
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _from_archive(path, split)
    except OSError as err:
        raise DataError(f"cannot read {path}: {err.strerror or err}") from err
    if not path.exists():
        raise DataError(f"there is no {path}")
    raise DataError(f"{path} is neither a folder nor a .tar.gz, .bin or .npz file")


def download(folder: Path = CACHE, *, url: str = URL, sha256: str = SHA256) -> Path:
    """The official archive (162 MiB), fetched into ``folder`` unless it is there already.

    The archive appears under its name only when it is complete and its checksum is correct.

    Args:
        folder: Where to keep it; created if it does not exist.
        url: Where to fetch it.
        sha256: Its checksum, as a hex digest.

    Returns:
        The path of the archive.

    Raises:
        DataError: It cannot be fetched, or what was fetched is not the archive.
    """
    target = folder / url.rsplit("/", 1)[1]
    if target.exists():
        with target.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return target
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.writer(target) as file:
        found = _fetch(url, file)
        if found != sha256:
            raise DataError(f"{url} is not the expected archive: its SHA-256 is {found}, not {sha256}")
    return target


def _fetch(url: str, into: BinaryIO) -> str:
    """Download ``url`` into a file, with a progress bar; returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as reply,
            terminal.progress(DownloadColumn(), TransferSpeedColumn()) as bar,
        ):
            size = reply.headers.get("Content-Length")
            task = bar.add_task("downloading", total=int(size) if size else None)
            while chunk := reply.read(1 << 16):
                into.write(chunk)
                digest.update(chunk)
                bar.advance(task, len(chunk))
    except (OSError, http.client.HTTPException) as err:  # URLError is an OSError
        raise DataError(f"cannot download {url}: {getattr(err, 'reason', err)}") from err
    return digest.hexdigest()


def _from_folder(folder: Path, split: Split) -> Images:
    names = _BATCHES[split]
    for root in (folder, folder / _FOLDER):
        missing = [name for name in names if not (root / name).is_file()]
        if not missing:
            return _from_batches([(name, (root / name).read_bytes()) for name in names], str(root))
        if len(missing) < len(names):
            raise DataError(f"{root} lacks {', '.join(missing)}")
    if (folder / f"{split}.npz").is_file():
        return _from_npz(folder / f"{split}.npz")
    if (folder / "batches.meta").is_file():
        raise DataError(
            f"{folder} holds the python version of CIFAR-10, which consists of pickles; "
            "use the binary version instead"
        )
    raise DataError(f"{folder} holds neither {names[0]} nor {split}.npz")


def _from_archive(path: Path, split: Split) -> Images:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:  # read in memory: nothing is unpacked to disk
                name = member.name.rsplit("/", 1)[-1]
                if name in _BATCHES[split] and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error) as err:
        reason = str(err).split("\n")[0].rstrip(":")  # the other lines list every compression that was tried
        raise DataError(f"{path} is not a valid tar archive: {reason}") from err
    missing = [name for name in _BATCHES[split] if name not in found]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: not the binary version of CIFAR-10")
    return _from_batches([(name, found[name]) for name in _BATCHES[split]], str(path))


def _from_batches(batches: Sequence[tuple[str, bytes]], source: str) -> Images:
    for name, content in batches:
        if not content or len(content) % _RECORD:
            raise DataError(
                f"{name} in {source} is cut short: {len(content)} bytes are not a multiple of {_RECORD}"
            )
    records = np.frombuffer(b"".join(content for _, content in batches), np.uint8).reshape(-1, _RECORD)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return _checked(planes.transpose(0, 2, 3, 1), records[:, 0], source)


def _from_npz(path: Path) -> Images:
    if path.is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not a valid .npz archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels, labels = archive["images"], archive["labels"]
    except KeyError:
        raise DataError(f"{path} must hold the arrays 'images' and 'labels'") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise DataError(f"{path} is not a valid .npz archive: {err}") from err
    return _checked(pixels, labels, str(path))


def _checked(pixels: NDArray[np.uint8], labels: NDArray[np.uint8], source: str) -> Images:
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (32, 32, 3) or not len(pixels):
        raise DataError(f"images in {source} must be (N, 32, 32, 3) uint8, not {pixels.shape} {pixels.dtype}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels in {source} must be {len(pixels)} integers, not {labels.shape} {labels.dtype}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(
            f"labels in {source} must lie in 0..9, but reach from {labels.min()} to {labels.max()}"
        )
    return Images(np.ascontiguousarray(pixels), labels.astype(np.uint8), source)
