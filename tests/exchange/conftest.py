"""Every test of this folder runs on both DLPack paths, unless it is about the choice between them.

The public path is slow, but for the properties that hold in every generated case.
"""

from collections.abc import Iterator

import hypothesis
import pytest

from tests.marking import slow_but
from torchjax_bridge.exchange import _dlpack

# `pytest tests/exchange/test_properties.py --hypothesis-profile=deep` runs a million cases, in minutes.
hypothesis.settings.register_profile("deep", max_examples=17_000, deadline=None)


@pytest.fixture(params=slow_but(["fast"], ["fast", "public"]), autouse=True)
def dlpack_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The DLPack path that this run of the test crosses on."""
    before = _dlpack.choice().path
    _dlpack.set_path(request.param)
    _dlpack.cuda_choice()  # on a GPU, the trial is over before a test looks at what runs there
    yield request.param
    _dlpack.set_path(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases the property tests generated."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "cases":
                terminalreporter.write_line(f"{value:,} generated cases: {report.nodeid}")
