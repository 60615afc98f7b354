"""What is built and shipped: the wheel, the sdist, and the versions that pyproject.toml admits."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchjax_bridge

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "torchjax_bridge"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> dict[str, bytes]:
    """The files of the wheel, by name."""
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[str]:
    """The names in the sdist, without its folder."""
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def metadata(wheel: dict[str, bytes]) -> Message:
    (name,) = [name for name in wheel if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel[name].decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    sources = [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
    expected = {str(file.relative_to(PACKAGE.parent)) for file in sources}
    assert {name for name in wheel if ".dist-info/" not in name} == expected


def test_the_wheel_carries_the_license_and_the_command(wheel: dict[str, bytes]) -> None:
    (license,) = [content for name, content in wheel.items() if name.endswith("/licenses/LICENSE")]
    assert license == (ROOT / "LICENSE").read_bytes()
    (commands,) = [content for name, content in wheel.items() if name.endswith("/entry_points.txt")]
    assert "torchjax-bridge = " in commands.decode()


def test_the_sdist_holds_what_its_own_tests_and_manual_need_and_no_data_of_others(sdist: set[str]) -> None:
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "src/torchjax_bridge/py.typed",
        "tests/test_packaging.py",
        "docs/index.md",
        "examples/cifar10/port.py",
        "benchmarks/__main__.py",
    } <= sdist
    heavy = {name for name in sdist if re.search(r"\.(safetensors|npz|npy|bin|th|pth?|gz|msgpack)$", name)}
    assert heavy == {"examples/cifar10/checkpoints/net.safetensors"}  # trained by this project
    assert not {
        name for name in sdist if "__pycache__" in name or name.startswith((".venv", ".lanes", "site/"))
    }


def test_the_metadata_says_what_pyproject_says(metadata: Message) -> None:
    assert metadata["Name"] == "torchjax-bridge"
    assert metadata["Version"] == PROJECT["version"] == torchjax_bridge.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {one.name for one in needed if one.marker is None} == {"torch", "jax", "numpy"}
    assert not [one for one in needed if one.name == "dlpack"]
    assert "to_jax" in metadata.get_payload()  # the README is the description


def test_nothing_is_given_a_ceiling() -> None:
    for line in _requirements():
        assert not [one for one in Requirement(line).specifier if one.operator in ("<", "<=", "~=")], line


def test_the_pinned_environment_satisfies_every_requirement() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    pins = {_canonical(name): version for name, version in pins.items()}
    for line in _requirements():
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pins[_canonical(requirement.name)]), line


def test_the_floor_lane_installs_the_floors() -> None:
    done = subprocess.run(
        [sys.executable, ".ci/floors.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    pins = [Requirement(line) for line in done.stdout.split()]
    named = {pin.name for pin in pins}
    assert {"jax", "numpy", "flax", "optax", "orbax-checkpoint", "safetensors", "typer", "rich"} <= named
    assert "torch" not in named
    floors = {Requirement(line).name: Requirement(line).specifier for line in _requirements()}
    for pin in pins:
        (only,) = pin.specifier
        (floor,) = floors[pin.name]
        assert only.operator == "=="
        assert only.version.startswith(floor.version)


def test_the_tests_run_against_the_version_that_is_installed() -> None:
    assert importlib.metadata.version("torchjax-bridge") == torchjax_bridge.__version__


def test_the_workflow_on_github_runs_what_the_ci_runs() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow
    targets = set(re.findall(r"run: make ([a-z-]+)", workflow))
    assert {"docs", "test-wheel", "test-floor", "test-latest"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"(?m)^{target}:", makefile), target


def _requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
