"""What to write back to the API: conditions of policies, and the trust bundle in every namespace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ambient.manifest.objects import AuthorizationPolicy, ConfigMap, Namespace
from ambient.manifest.policies import Converted

CONDITION = "ZtunnelAccepted"
MESSAGE_MAX = 1024
ROOT_CONFIG_MAP = "istio-ca-root-cert"
ROOT_KEY = "root-cert.pem"


@dataclass(frozen=True, slots=True)
class StatusPatch:
    """A merge patch of the status of one AuthorizationPolicy; ``conditions`` are all of them, others' included."""

    namespace: str
    name: str
    conditions: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RootWrite:
    """The ConfigMap with the trust bundle is to be created, or changed, in a namespace."""

    namespace: str
    create: bool
    bundle: str


def condition_of(converted: Converted) -> tuple[str, str, str] | None:
    """Status, reason and message; None for a policy that is not meant for ztunnels."""
    if converted.problems:
        found = "; ".join(f"{p.field}: {p.rule}" for p in converted.problems)
        return "False", "UnsupportedValue", found[:MESSAGE_MAX]
    if converted.policy is None:
        return None
    return "True", "Accepted", "attached to ztunnel"


def status_patch(item: AuthorizationPolicy, converted: Converted, now_text: str) -> StatusPatch | None:
    """What to write so that the object's condition says what was judged; None if it says so already.

    ``now_text`` is the time in RFC 3339. A new observedGeneration alone is not written: on a server without
    a status subresource our own write would raise the generation again.
    """
    found = item.status.get("conditions") if isinstance(item.status, dict) else None
    have = found if isinstance(found, list) else []
    ours = [c for c in have if isinstance(c, dict) and c.get("type") == CONDITION]
    others = tuple(c for c in have if c not in ours)
    old = ours[0] if ours else None
    wanted = condition_of(converted)
    if wanted is None:
        return None if old is None else StatusPatch(item.namespace, item.name, others)
    status, reason, message = wanted
    if old is not None and (old.get("status"), old.get("reason"), old.get("message")) == wanted:
        return None
    since = old.get("lastTransitionTime") if old is not None and old.get("status") == status else None
    new: dict[str, Any] = {
        "type": CONDITION,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since or now_text,
    }
    if item.metadata.generation:
        new["observedGeneration"] = str(item.metadata.generation)  # a string in Istio's schema
    return StatusPatch(item.namespace, item.name, (*others, new))


def root_writes(namespaces: Iterable[Namespace], have: Mapping[str, ConfigMap], bundle: str) -> tuple[RootWrite, ...]:
    """``have`` is the present ConfigMap by namespace. Namespaces on their way out take no new objects."""
    writes = []
    for namespace in namespaces:
        if namespace.metadata.deletion_timestamp is not None:
            continue
        present = have.get(namespace.name)
        if present is None or (present.data or {}).get(ROOT_KEY) != bundle:
            writes.append(RootWrite(namespace.name, present is None, bundle))
    return tuple(sorted(writes, key=lambda w: w.namespace))
