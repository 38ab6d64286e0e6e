"""``--namespace``, ``--pod`` and ``--service``: which rows of a map or a list are wanted, by the names in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ambient.errors import Misuse

_F = TypeVar("_F", bound=Callable[..., Any])
Row = dict[str, Any]

WORKLOADS = ("workload", "source", "destination", "pod", "client_name", "name")
"""Columns whose cells are ``namespace/pod``, or an identity."""
SERVICES = ("service", "destination", "name")
"""Columns whose cells may be ``namespace/service``."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Everything that is given must hold. A row holds if any cell of the fitting columns does."""

    namespace: str | None = None
    pod: str | None = None
    service: str | None = None

    def __bool__(self) -> bool:
        return any((self.namespace, self.pod, self.service))

    def __str__(self) -> str:
        """As it was given."""
        given = ("--namespace", self.namespace), ("--pod", self.pod), ("--service", self.service)
        return " ".join(f"{option} {value}" for option, value in given if value)

    def matches(self, row: Mapping[str, Any]) -> bool:
        names = [str(row[c]) for c in dict.fromkeys(WORKLOADS + SERVICES) if row.get(c)]
        pods = [str(row[c]) for c in WORKLOADS if row.get(c)]
        services = [str(row[c]) for c in SERVICES if row.get(c)]
        return (
            (self.namespace is None or any(namespace_of(n) == self.namespace for n in names))
            and (self.pod is None or any(_is(n, self.pod) for n in pods))
            and (self.service is None or any(_is(n, self.service) for n in services))
        )

    def apply(self, rows: Sequence[Row], what: str = "") -> list[Row]:
        """The rows that match. Raises Misuse if ``what`` has no names to go by."""
        if not self:
            return list(rows)
        if rows and not any(column in row for row in rows for column in WORKLOADS + SERVICES):
            raise Misuse("filter", what, "holds no names of pods or services: leave the filter out")
        return [row for row in rows if self.matches(row)]


def namespace_of(name: str) -> str:
    """Of ``namespace/name``, or of a SPIFFE ID; empty for what is neither."""
    if name.startswith("spiffe://"):
        return name.partition("/ns/")[2].partition("/")[0]
    namespace, separator, _ = name.partition("/")
    return namespace if separator else ""


def _is(name: str, wanted: str) -> bool:
    """``wanted`` is a whole name with its namespace, or the part after it."""
    return name == wanted or (not name.startswith("spiffe://") and name.partition("/")[2] == wanted)


def filter_options(function: _F) -> _F:
    """The three options, spelled alike everywhere; the command gets one `Filter` as ``only``."""

    def wrapped(*args: Any, namespace: str | None, pod: str | None, service: str | None, **rest: Any) -> Any:
        return function(*args, only=Filter(namespace, pod, service), **rest)

    wrapped.__doc__, wrapped.__name__ = function.__doc__, function.__name__
    wrapped.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in (
        click.option("--service", help="Only rows about this service: NAME or NAMESPACE/NAME."),
        click.option("--pod", help="Only rows about this pod: NAME or NAMESPACE/NAME."),
        click.option("-n", "--namespace", help="Only rows about this namespace."),
    ):
        option(wrapped)
    return wrapped  # type: ignore[return-value]
