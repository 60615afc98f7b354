"""A type checker sees the public names as they are: mypy agrees with every line of ``api.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _mypy(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", *options, "tests/typing/api.py"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)


def test_mypy_agrees_with_what_is_said_of_the_public_names_and_of_wrong_calls() -> None:
    done = _mypy()  # the settings and the cache of `make types`
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_installed_package_carries_its_types(tmp_path: Path) -> None:
    done = _mypy("--config-file", "tests/typing/mypy.ini", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
