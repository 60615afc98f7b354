"""The page of layers is what the table of rules says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from torchjax_bridge.weights.rules import PLAIN


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "docs" / "make_layers.py"
    spec = importlib.util.spec_from_file_location("make_layers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text() == script.page(), "run python docs/make_layers.py"


def test_every_rule_has_an_example_and_its_settings(script: ModuleType) -> None:
    for rule in PLAIN:
        assert script.examples_of(rule), rule.name
        assert rule.settings, rule.name
