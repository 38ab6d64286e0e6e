"""What to do to a table so that it becomes another: ordered, and nothing if it is so already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Plan(Generic[K, V]):
    """First delete, then put: what is deleted makes room in a table with a limit."""

    deletes: tuple[K, ...] = ()
    puts: tuple[tuple[K, V], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.deletes or self.puts)


def plan(have: Mapping[K, V], want: Mapping[K, V]) -> Plan[K, V]:
    """In the order of the mappings, so that a table that is too small always refuses the same entries."""
    return Plan(
        tuple(key for key in have if key not in want),
        tuple((key, value) for key, value in want.items() if key not in have or have[key] != value),
    )
