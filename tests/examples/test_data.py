"""Images: the packaged ones, the official binary version, .npz files, and the download."""

import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.cifar10 import data
from examples.cifar10.data import DataError

BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def record(label: int, pixels: np.ndarray) -> bytes:
    """One image as https://www.cs.toronto.edu/~kriz/cifar.html says: label, red, green, blue, by rows."""
    return bytes([label]) + b"".join(pixels[:, :, channel].tobytes() for channel in range(3))


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The binary version with two images in each batch: image i of batch b has label (2b + i) mod 10."""
    root = tmp_path / "cifar-10-batches-bin"
    root.mkdir()
    for b, name in enumerate(BATCHES):
        images = [record((2 * b + i) % 10, picture(2 * b + i)) for i in range(2)]
        (root / name).write_bytes(b"".join(images))
    (root / "batches.meta.txt").write_text("airplane\n")
    return root


@pytest.fixture
def archive(folder: Path) -> Path:
    path = folder.parent / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return path


def npz(path: Path, n: int = 3, **changes: object) -> Path:
    arrays = {"images": np.stack([picture(i) for i in range(9)])[:n], "labels": np.arange(n, dtype=np.uint8)}
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


def test_the_packaged_images_are_the_first_twenty_of_the_test_set() -> None:
    images = data.packaged()
    assert images.pixels.shape == (20, 32, 32, 3)
    assert images.pixels.dtype == np.uint8
    assert images.labels.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]
    # The first pixel of the official test_batch.bin is (158, 112, 49).
    assert images.pixels[0, 0, 0].tolist() == [158, 112, 49]


def test_reading_the_packaged_images_imports_no_foolbox(root: Path) -> None:
    code = "import sys; from examples.cifar10 import data; data.packaged(); print('foolbox' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'torchjax-bridge\[examples\]', or pass --data"):
        data.packaged()


def test_normalising_centres_and_scales_each_channel() -> None:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[..., 2] = 255
    normalised = data.Images(pixels, np.zeros(1, np.uint8), "").normalised()
    assert normalised.dtype == np.float32
    expected = [-0.485 / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(normalised[0, 5, 7], expected, rtol=1e-6)


@pytest.mark.parametrize("where", ["folder", "parent", "archive"])
def test_the_binary_version_is_read_from_its_folder_the_one_above_and_the_archive(
    folder: Path, archive: Path, where: str
) -> None:
    path = {"folder": folder, "parent": folder.parent, "archive": archive}[where]
    train, test = data.read(path, "train"), data.read(path, "test")
    assert train.labels.tolist() == list(range(10))
    assert test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(train.pixels, [picture(i) for i in range(10)])
    np.testing.assert_array_equal(test.pixels, [picture(10), picture(11)])


def test_one_batch_is_read_alone(folder: Path) -> None:
    assert data.read(folder / "data_batch_2.bin").labels.tolist() == [2, 3]


def test_an_npz_is_read_and_a_folder_of_two_by_the_split(tmp_path: Path) -> None:
    npz(tmp_path / "train.npz", 5)
    npz(tmp_path / "test.npz", 2, labels=np.array([9, 0]))
    assert len(data.read(tmp_path, "train")) == 5
    images = data.read(tmp_path, "test")
    assert images.labels.tolist() == [9, 0]
    assert images.labels.dtype == np.uint8
    np.testing.assert_array_equal(images.pixels, [picture(0), picture(1)])


def _empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def _without_a_batch(folder: Path) -> Path:
    (folder / "test_batch.bin").rename(folder / "data_batch_9.bin")
    return folder


def _cut(folder: Path) -> Path:
    path = folder / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


def _nothing_in_it(folder: Path) -> Path:
    (folder / "test_batch.bin").write_bytes(b"")
    return folder


def _label_ten(folder: Path) -> Path:
    (folder / "test_batch.bin").write_bytes(record(10, picture(0)))
    return folder


def _python_version(folder: Path) -> Path:
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    (root / "batches.meta").write_bytes(b"\x80\x02}.")
    return root


def _cut_archive(folder: Path) -> Path:
    path = folder.parent / "cut.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _other_archive(folder: Path) -> Path:
    path = folder.parent / "other.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "batches.meta.txt", arcname="batches.meta.txt")
    return path


def _archive_of_noise(folder: Path) -> Path:
    path = folder.parent / "noise.tgz"
    path.write_bytes(b"this is no archive" * 100)
    return path


def _text(folder: Path) -> Path:
    return folder / "batches.meta.txt"


def _cut_npz(folder: Path) -> Path:
    path = npz(folder / "cut.npz")
    path.write_bytes(path.read_bytes()[:-200])
    return path


def _npz_with_flipped_bits(folder: Path) -> Path:
    path = npz(folder / "flipped.npz")
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", r"^there is no .*nowhere$"),
        (lambda folder: folder / "nowhere.npz", r"^cannot read .*nowhere.npz: No such file or directory$"),
        (_empty_folder, r"^.*empty holds neither test_batch.bin nor test.npz$"),
        (_without_a_batch, r"holds neither test_batch.bin nor test.npz$"),
        (_cut, r"^test_batch.bin in .* is cut short: 6145 bytes are not a multiple of 3073$"),
        (_nothing_in_it, r"^test_batch.bin in .* is cut short: 0 bytes"),
        (_label_ten, r"must lie in 0..9, but reach from 10 to 10$"),
        (_python_version, r"consists of pickles; use the binary version instead$"),
        (_cut_archive, r"cut.tar.gz is not a valid tar archive: "),
        (_other_archive, r"other.tar lacks test_batch.bin: not the binary version of CIFAR-10$"),
        (_archive_of_noise, r"noise.tgz is not a valid tar archive: "),
        (_text, r"batches.meta.txt is neither a folder nor a .tar.gz, .bin or .npz file$"),
        (_cut_npz, r"cut.npz is not a valid .npz archive"),
        (_npz_with_flipped_bits, r"flipped.npz is not a valid .npz archive: "),
        (lambda f: npz(f / "a.npz", labels=None), r"must hold the arrays 'images' and 'labels'$"),
        (lambda f: npz(f / "a.npz", images=np.zeros((3, 3, 32, 32), "u1")), r"uint8, not \(3, 3, 32, 32\)"),
        (lambda f: npz(f / "a.npz", images=np.zeros((3, 32, 32, 3))), r"not \(3, 32, 32, 3\) float64$"),
        (lambda f: npz(f / "a.npz", 0), r"must be \(N, 32, 32, 3\) uint8, not"),
        (lambda f: npz(f / "a.npz", labels=np.arange(2)), r"must be 3 integers, not \(2,\) int64$"),
        (lambda f: npz(f / "a.npz", labels=np.ones(3)), r"must be 3 integers, not \(3,\) float64$"),
        (lambda f: npz(f / "a.npz", labels=np.array([0, -1, 2])), r"reach from -1 to 2$"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_gives_one_line_that_says_why(folder: Path, make, message: str) -> None:
    path = make(folder)
    with pytest.raises(DataError, match=message) as caught:
        data.read(path)
    assert "\n" not in str(caught.value)


def test_the_training_half_names_every_batch_that_lacks(folder: Path) -> None:
    (folder / "data_batch_2.bin").unlink()
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_2.bin, data_batch_4.bin$"):
        data.read(folder, "train")


def test_a_pickle_in_an_npz_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    path = npz(tmp_path / "a.npz", images=np.array([Trap()], dtype=object))
    with pytest.raises(DataError, match=r"not a valid .npz archive: Object arrays cannot be loaded"):
        data.read(path)
    assert not (tmp_path / "sprung").exists()


class _Site(http.server.BaseHTTPRequestHandler):
    """Serves ``content``, or only half of what it announces."""

    content = b""
    halved = False
    served = 0

    def do_GET(self) -> None:
        type(self).served += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2] if self.halved else self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Site]]:
    monkeypatch.setenv("no_proxy", "*")

    class Site(_Site):
        content = archive.read_bytes()

    with http.server.HTTPServer(("127.0.0.1", 0), Site) as server:
        Site.url = f"http://127.0.0.1:{server.server_port}/cifar-10-binary.tar.gz"
        Site.sha256 = hashlib.sha256(Site.content).hexdigest()
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Site
        server.shutdown()
        thread.join()


def test_a_download_is_kept_and_not_fetched_twice(site: type[_Site], tmp_path: Path) -> None:
    cache = tmp_path / "a" / "cache"
    path = data.download(cache, url=site.url, sha256=site.sha256)
    assert data.read(path).labels.tolist() == [0, 1]
    assert data.download(cache, url=site.url, sha256=site.sha256) == path
    assert site.served == 1
    assert [p.name for p in cache.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_a_damaged_copy_in_the_cache_is_fetched_anew(site: type[_Site], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "cifar-10-binary.tar.gz").write_bytes(site.content[:-1])
    path = data.download(cache, url=site.url, sha256=site.sha256)
    assert path.read_bytes() == site.content


@pytest.mark.parametrize("fault", ["checksum", "halved", "refused", "interrupt"])
def test_a_download_that_fails_leaves_nothing(
    site: type[_Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    cache = tmp_path / "cache"
    url, sha256, error = site.url, site.sha256, DataError
    if fault == "checksum":
        sha256 = "0" * 64
    elif fault == "halved":
        site.halved = True
    elif fault == "refused":
        url = "http://127.0.0.1:9/cifar-10-binary.tar.gz"
    else:
        error = KeyboardInterrupt

        def interrupted(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(data.urllib.request, "urlopen", interrupted)
    with pytest.raises(error):
        data.download(cache, url=url, sha256=sha256)
    assert list(cache.iterdir()) == []


def test_the_progress_bar_of_a_download_goes_to_stderr(
    site: type[_Site], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.download(tmp_path / "cache", url=site.url, sha256=site.sha256)
    out, err = capsys.readouterr()
    assert out == ""
    assert "downloading" in err


def test_the_reader_takes_an_archive_in_memory_order_of_the_batches(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "reversed.tar"
    with tarfile.open(path, "w") as tar:
        for name in reversed(BATCHES):
            content = (folder / name).read_bytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert data.read(path, "train").labels.tolist() == list(range(10))
