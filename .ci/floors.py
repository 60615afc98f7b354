"""Prints the floors of pyproject.toml as pip constraints: ``jax>=0.10`` becomes ``jax==0.10.0``.

So the floor lane installs what the project says, and cannot drift from it. torch is left out: the lanes pin it,
because every other release of it would pull a CUDA build of several GB.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FLOOR = re.compile(r"([A-Za-z0-9_.-]+)>=([0-9.]+)")


def floors(project: dict) -> Iterator[str]:
    """A constraint for every requirement with a floor, of the library and its extras but the peers' (``bench``)."""
    extras = [extra for name, extra in project["optional-dependencies"].items() if name != "bench"]
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        found = _FLOOR.fullmatch(requirement)
        if found and found[1] != "torch":
            release = found[2].split(".")
            yield f"{found[1]}=={'.'.join([*release, *['0'] * (3 - len(release))])}"


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sys.stdout.writelines(f"{line}\n" for line in sorted(set(floors(project))))
