"""Every test of this folder runs on both DLPack paths, unless it is about the choice between them."""

from collections.abc import Iterator

import pytest

from torchjax_bridge.exchange import _dlpack


@pytest.fixture(params=["fast", "public"], autouse=True)
def dlpack_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The DLPack path that this run of the test crosses on."""
    before = _dlpack.choice().path
    _dlpack.use(request.param)
    yield request.param
    _dlpack.use(before)
