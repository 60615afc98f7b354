"""The minutes there are, and how much of them a stage may take."""

import time
from dataclasses import dataclass, field

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """Seconds from now on."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def used(self) -> float:
        """Seconds that have gone."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds that are left; not below 0."""
        return max(0.0, self.seconds - self.used)

    def limit(self, most: float) -> float:
        """What a stage may take that should take ``most`` seconds at most."""
        return min(most, self.left)
