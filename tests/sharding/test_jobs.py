"""Torch and JAX share the processes of a job. Each process runs every case; here each case has a test."""

import pathlib
import sys

import pytest

from .launch import launch

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # as the workers see the cases
from all_cases import cases


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch(4, tmp_path_factory.mktemp("four"))


def check(results: list[dict[str, str]], case: str) -> None:
    for rank, found in enumerate(results):
        said = found.get(case, "not reached")
        assert said == "passed", f"rank {rank}: {said}"


@pytest.mark.xdist_group("jobs")
@pytest.mark.parametrize("case", cases(2))
def test_two_processes(two: list[dict[str, str]], case: str) -> None:
    check(two, case)


@pytest.mark.slow
@pytest.mark.xdist_group("jobs")
@pytest.mark.parametrize("case", cases(4))
def test_four_processes(four: list[dict[str, str]], case: str) -> None:
    check(four, case)
