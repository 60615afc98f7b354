"""A pytest plugin that writes down each test as it begins and ends, so that a process that dies leaves a trace.

Lines of JSON: ``{"collected": [...]}``, ``{"begins": ID}``, and ``{"ends": ID}`` with outcome, seconds and text.
After an error that leaves the device unusable the process stops, and another one goes on with what is left.
"""

import json
import os
from typing import Any

import pytest

from ._tests import WATCH_VARIABLE

# A kernel that failed leaves its process without a usable device; every later test would fail for nothing.
_LOST = (
    "CUDA error",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_LAUNCH",
    "CUDA_ERROR_MISALIGNED",
    "device-side assert",
)


class _Watch:
    def __init__(self, path: str) -> None:
        self._path = path
        self._texts: dict[str, list[str]] = {}
        self._outcomes: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._session: pytest.Session | None = None

    def _write(self, **line: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._session = session
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        worst = self._outcomes.get(report.nodeid, "passed")
        if report.outcome != "passed" and worst != "failed":
            self._outcomes[report.nodeid] = report.outcome
        if report.longrepr and report.outcome == "failed":
            self._texts.setdefault(report.nodeid, []).append(report.longreprtext)
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self._texts.setdefault(report.nodeid, []).append(str(report.longrepr[2]))
        if report.when == "teardown":
            text = "\n".join(self._texts.get(report.nodeid, []))
            outcome = self._outcomes.get(report.nodeid, "passed")
            seconds = round(self._seconds[report.nodeid], 3)
            self._write(ends=report.nodeid, outcome=outcome, seconds=seconds, text=text)
            if outcome == "failed" and self._session and any(word in text for word in _LOST):
                self._session.shouldstop = "the device is lost to this process"


def pytest_configure(config: pytest.Config) -> None:
    """Watch, if the variable says where to write."""
    if path := os.environ.get(WATCH_VARIABLE):
        config.pluginmanager.register(_Watch(path))
