"""The caller's `Rename` rules: applies them to paths, and reports those that match nothing."""

from collections.abc import Sequence

from torchjax_bridge.exchange import Path, join_path, split_path

from .._nearest import did_you_mean
from .._report import Fault
from ..rules import Rename

__all__ = ["Renaming"]


class Renaming:
    """Applies the caller's renames and remembers which of them matched."""

    def __init__(self, renames: Sequence[Rename]) -> None:
        self._renames = renames
        self._used: set[Rename] = set()
        self._too_late: dict[
            Rename, Rename
        ] = {}  # a rename that matches only where an earlier one does: the earlier one
        self._known: dict[Path, Path] = {}
        self.targets: dict[Path, Rename] = {}  # new paths that renames name, and the first that names each

    def __call__(self, path: Path) -> Path:
        if path not in self._known:
            self._known[path] = self._change(path) if self._renames else path
        return self._known[path]

    def _change(self, path: Path) -> Path:
        for place, rename in enumerate(self._renames):
            new = rename.apply(path)
            if new is not None:
                self._used.add(rename)
                below = len(path) - len(split_path(rename.torch))
                self.targets.setdefault(new[: len(new) - below], rename)
                for later in self._renames[place + 1 :]:
                    if later.apply(path) is not None:
                        self._too_late.setdefault(later, rename)
                return new
        return path

    def unused(self) -> list[Fault]:
        """A fault for each rename that matched nothing."""
        return [Fault("rules", self._why(one), one.torch) for one in self._renames if one not in self._used]

    def _why(self, rename: Rename) -> str:
        if before := self._too_late.get(rename):
            return f"{rename} never applies, since {before} comes first and matches the same: put it first"
        names = {join_path(path[: depth + 1]) for path in self._known for depth in range(len(path))}
        return f"{rename} matches nothing on the torch side{did_you_mean(rename.torch, sorted(names))}"
