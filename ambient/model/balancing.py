"""Which endpoints of a service a client prefers, by where both are: Istio's load-balancing preferences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ambient.model.workload import LoadBalancing, LoadBalancingMode, LoadBalancingScope, Workload


@dataclass(frozen=True, slots=True)
class Here:
    """Where a client is: its node, and its workload if it is known."""

    node: str
    source: Workload | None = None


def prefer(here: Here, workloads: Iterable[Workload], balancing: LoadBalancing) -> list[str]:
    """UIDs of the workloads that a load-balancing preference leaves.

    Each scope of the ordered preference that the workload shares with the source, from the first without a gap,
    counts one; the highest count wins (FAILOVER), or all must match (STRICT). A source whose locality is not
    known shares only its node.
    """
    candidates = list(workloads)
    if not balancing.preference or balancing.mode not in (LoadBalancingMode.STRICT, LoadBalancingMode.FAILOVER):
        return [w.uid for w in candidates]
    ranks = [_rank(here, w, balancing.preference) for w in candidates]
    strict = balancing.mode is LoadBalancingMode.STRICT
    wanted = len(balancing.preference) if strict else max(ranks, default=0)
    return [w.uid for w, rank in zip(candidates, ranks, strict=True) if rank == wanted]


def _rank(here: Here, workload: Workload, preference: tuple[LoadBalancingScope, ...]) -> int:
    for rank, scope in enumerate(preference):
        if not _shares(here, workload, scope):
            return rank
    return len(preference)


def _shares(here: Here, workload: Workload, scope: LoadBalancingScope) -> bool:
    if scope is LoadBalancingScope.NODE:
        return workload.node == here.node
    source = here.source
    if source is None:
        return False
    ours, theirs = source.locality, workload.locality
    match scope:
        case LoadBalancingScope.REGION:
            return theirs.region == ours.region
        case LoadBalancingScope.ZONE:
            return theirs.zone == ours.zone
        case LoadBalancingScope.SUBZONE:
            return theirs.subzone == ours.subzone
        case LoadBalancingScope.CLUSTER:
            return workload.cluster_id == source.cluster_id
        case LoadBalancingScope.NETWORK:
            return workload.network == source.network
