"""Which addresses a name has in the mesh: services, headless services, pods with a hostname of their own.

Only names the World knows are answered; everything else is forwarded, also names below the cluster's domain,
because the cluster's own DNS may know what the mesh does not (SRV records, ExternalName).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ambient.model.address import IPAddress, fold
from ambient.model.world import World
from ztunnel.core.dns import CLASS_IN, TYPE_A, TYPE_AAAA, Question

ADDRESSES_MAX = 1000
"""In one answer; a TCP answer of so many IPv6 records still fits 64 KB."""
_WILDCARD_LABELS_MAX = 16


class Outcome(enum.Enum):
    ANSWER = "answer"
    NODATA = "nodata"
    """The name exists and has no address of this family: NOERROR with no answer (RFC 2308)."""
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class Resolution:
    outcome: Outcome
    addresses: tuple[IPAddress, ...] = ()
    alias: str = ""
    """The known name, if it was found behind a search suffix."""


_FORWARD = Resolution(Outcome.FORWARD)


@dataclass(frozen=True, slots=True)
class Names:
    """Hostnames of one World. Build with `Names.of`; services by lower-case hostname, then by namespace."""

    world: World | None = None
    _services: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    _workloads: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(world: World) -> Names:
        services: dict[str, dict[str, str]] = {}
        for service in world.services.values():
            services.setdefault(service.hostname.lower(), {})[service.namespace] = service.key
        workloads = {w.hostname.lower(): w.uid for w in world.workloads.values() if w.hostname}
        return Names(world, services, workloads)

    def resolve(self, question: Question, namespace: str, cluster_domain: str) -> Resolution:
        """``namespace`` is the asking pod's: it names the search suffixes, and decides between equal hostnames."""
        if self.world is None or question.klass != CLASS_IN or question.kind not in (TYPE_A, TYPE_AAAA):
            return _FORWARD
        # A dot within a label: no hostname, not even a wildcard's, and no alias to answer with.
        if "\\" in question.name:
            return _FORWARD
        found = self._addresses(question.name, namespace)
        alias = ""
        if found is None:
            for suffix in (f"{namespace}.svc.{cluster_domain}", f"svc.{cluster_domain}", cluster_domain):
                stripped = question.name.removesuffix(f".{suffix}")
                if stripped != question.name and (found := self._addresses(stripped, namespace)) is not None:
                    alias = stripped
                    break
        if found is None:
            return _FORWARD
        version = 4 if question.kind == TYPE_A else 6
        family = tuple(a for a in map(fold, found) if a.version == version)[:ADDRESSES_MAX]
        return Resolution(Outcome.ANSWER if family else Outcome.NODATA, family, alias)

    def _addresses(self, name: str, namespace: str) -> tuple[IPAddress, ...] | None:
        """None if the name is not known."""
        assert self.world is not None
        by_namespace = self._services.get(name)
        if by_namespace is None and name in self._workloads:
            return self.world.workloads[self._workloads[name]].addresses
        if by_namespace is None:
            by_namespace = self._wildcard(name)
        if by_namespace is None:
            return None
        key = by_namespace.get(namespace) or by_namespace[min(by_namespace)]
        service = self.world.services[key]
        if service.vips:
            return service.vips
        every = (a for w in self.world.serving(service) for a in w.addresses)
        return tuple(a for a in every if service.families.accepts(fold(a).version))

    def _wildcard(self, name: str) -> Mapping[str, str] | None:
        """A service with a hostname like ``*.example.org``; the longest suffix wins."""
        labels = name.split(".")
        for start in range(1, min(len(labels), _WILDCARD_LABELS_MAX)):
            found = self._services.get(f"*.{'.'.join(labels[start:])}")
            if found is not None:
                return found
        return None
