"""Whether `flows` is nearly full: then ztunnel takes what is new, until there is room again.

A connection that the hook let go straight to its pod and that finds no room in `flows` is authorized nowhere: it
arrives as plaintext, which STRICT refuses. Shares bound what one pod's open connections take; many pods, or one whose
ends of connections are never closed, can still fill the map.
"""

from __future__ import annotations

from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.io.bpf_maps import Maps

FULL: Final = LAYOUT["FLOWS_MAX"]
FROM: Final = FULL * 3 // 4
UNTIL: Final = FULL * 5 // 8
PAUSE_S: Final = 3.0
"""Between two counts while it is crowded: counting reads the whole map."""


class Crowd:
    """Call `look` about once a second."""

    def __init__(self, maps: Maps) -> None:
        self._maps = maps
        self._most = FULL
        """No more entries than that were there when `_made` flows had been made."""
        self._made = 0
        self._counted = float("-inf")
        self.crowded = False

    def look(self, now: float) -> bool:
        made = self._maps.counters()["kernel"]
        if self._most + made - self._made < FROM and not self.crowded:
            return False
        if self.crowded and now - self._counted < PAUSE_S:
            return True
        self._most, self._made, self._counted = len(self._maps.tables["flows"].items()), made, now
        self.crowded = self._most >= (UNTIL if self.crowded else FROM)
        return self.crowded
