"""Node-local numbers: what the kernel maps call a workload, service, identity or policy.

0 means unknown and is never given. A number is never given again, also not after a restart: an entry that was left
behind must not come to mean somebody else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

NUMBER_MAX: Final = 2**32 - 1


class Numbers:
    """Names -> numbers. Keep `next` with the names: it is what makes numbers unique for good."""

    def __init__(self, names: Mapping[str, int] | None = None, next_number: int = 1) -> None:
        self._numbers = dict(names or {})
        self.next = max([next_number, *(n + 1 for n in self._numbers.values())])
        self.version = 0
        """Moves with every change."""

    def of(self, name: str) -> int:
        """The name's number, given now if it has none."""
        number = self._numbers.get(name)
        if number is None:
            if self.next > NUMBER_MAX:
                raise OverflowError("every number was given once; remove the node's pins and state to start again")
            number = self._numbers[name] = self.next
            self.next += 1
            self.version += 1
        return number

    def begin_beyond(self, used: Iterable[int]) -> None:
        """Give none of these to a new name: entries have them, whoever remembers what they stand for."""
        self.next = max([self.next, *(n + 1 for n in used)])

    def retain(self, names: Iterable[str]) -> None:
        """Forget every other name."""
        kept = set(names)
        gone = [name for name in self._numbers if name not in kept]
        for name in gone:
            del self._numbers[name]
        self.version += bool(gone)

    def names(self) -> dict[int, str]:
        return {number: name for name, number in self._numbers.items()}
