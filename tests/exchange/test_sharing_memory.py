import re

import pytest


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_every_block_of_the_page_runs_and_its_assertions_hold(root):
    page = (root / "docs/sharing-memory.md").read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    assert len(blocks) > 10
    namespace = {"__name__": "sharing_memory"}
    for block in blocks:
        # Blank lines in front, so that a failure is reported at the page's own line.
        above = page.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], "docs/sharing-memory.md", "exec"), namespace)
