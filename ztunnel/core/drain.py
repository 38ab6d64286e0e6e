"""When something that is ending may be closed for good: a pod that leaves, or the whole worker."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    SERVING = "serving"
    DRAINING = "draining"
    """Nothing new is accepted; what is open may finish until the deadline."""
    ENDED = "ended"
    """Close whatever is left."""


class Drain:
    """One drain. ``begin`` may be repeated: the earliest deadline holds."""

    __slots__ = ("deadline",)

    def __init__(self) -> None:
        self.deadline: float | None = None

    def begin(self, now: float, grace_s: float) -> None:
        end = now + max(0.0, grace_s)
        self.deadline = end if self.deadline is None else min(self.deadline, end)

    def phase(self, now: float, open_connections: int) -> Phase:
        """Ended once nothing is open or the deadline has passed."""
        if self.deadline is None:
            return Phase.SERVING
        if open_connections == 0 or now >= self.deadline:
            return Phase.ENDED
        return Phase.DRAINING
