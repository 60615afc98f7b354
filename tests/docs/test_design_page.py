"""The pages that lead through the code name files that exist, and the picture is drawn from the code."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NAMED = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:\.py|/))`")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_every_file_and_folder_that_is_named_exists(page: str) -> None:
    named = _NAMED.findall((ROOT / page).read_text())
    assert len(named) > 10
    for name in named:
        places = [ROOT / name, ROOT / "src/torchjax_bridge" / name]
        assert any(place.exists() for place in places) or name in ("to_jax/", "to_torch/", "site/"), name


def test_every_room_has_its_place_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for door in (ROOT / "src/torchjax_bridge").rglob("__init__.py"):
        room = str(door.parent.relative_to(ROOT / "src/torchjax_bridge"))
        assert room in (".", "weights/layers") or f"{room}/" in text, room


def test_the_floor_plan_is_what_its_maker_draws() -> None:
    maker = _maker()
    assert maker.PICTURE.read_text() == maker.picture(), "run python docs/make_floor_plan.py"


def test_an_arrow_that_a_chain_of_others_implies_is_left_out() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert _maker().thinned(graph) == {"a": {"b"}, "b": {"c"}, "c": set()}


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_floor_plan", ROOT / "docs" / "make_floor_plan.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
