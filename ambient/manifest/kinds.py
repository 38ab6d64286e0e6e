"""The table of kinds: where each lives in the API and which structure it decodes into; and what changed of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from ambient.errors import ConfigFault
from ambient.manifest import objects
from ambient.manifest.problems import reference

DEPTH_MAX = 50

T = TypeVar("T", bound=objects.Object)


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A resource type of the Kubernetes API. ``group`` is empty for the core group."""

    name: str
    group: str
    version: str
    plural: str
    namespaced: bool
    struct: type[T]

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL path of the collection (no name) or of one object."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        if name:
            parts.append(name)
        if subresource:
            parts.append(subresource)
        return "/".join(parts)

    def decode(self, raw: bytes | memoryview | msgspec.Raw) -> T:
        """One JSON object. Raises ConfigFault naming the object, the field path and the rule."""
        try:
            return self.bounded(msgspec.json.decode(raw, type=self.struct))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one of the former
            raise self._fault(_name_of(raw), error) from None
        except RecursionError:
            raise ConfigFault(self.name, "", "is nested too deeply") from None

    def convert(self, value: Any) -> T:
        """One object as plain values, from YAML. Raises ConfigFault as `decode` does."""
        try:
            return self.bounded(msgspec.convert(value, type=self.struct))
        except msgspec.ValidationError as error:
            meta = value.get("metadata") if isinstance(value, dict) else None
            raise self._fault(meta if isinstance(meta, dict) else {}, error) from None
        except RecursionError:
            raise ConfigFault(self.name, "", "is nested too deeply") from None

    def bounded(self, item: T) -> T:
        """What stays plain is no deeper than everybody who walks, compares or writes it can go. Raises ConfigFault."""
        if not isinstance(item, objects.PolicyObject):
            return item
        if _deeper(item.spec):
            where = reference(self.name, item.namespace, item.name)
            raise ConfigFault(f"{where}: spec", "", f"is nested deeper than {DEPTH_MAX}")
        return msgspec.structs.replace(item, status=None) if _deeper(item.status) else item

    def _fault(self, meta: dict[str, Any], error: Exception) -> ConfigFault:
        namespace, name = (str(meta.get(key) or "")[:253] for key in ("namespace", "name"))
        rule, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".") or "document"
        return ConfigFault(f"{reference(self.name, namespace, name or '?')}: {field}", "", rule)


def _deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _name_of(raw: bytes | memoryview | msgspec.Raw) -> dict[str, Any]:
    try:
        meta = msgspec.json.decode(raw)["metadata"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


@dataclass(frozen=True, slots=True)
class Changed(Generic[T]):
    """An object appeared (``old`` None), changed, or vanished (``new`` None). Never both None."""

    kind: Kind[T]
    key: str
    old: T | None
    new: T | None


NAMESPACE = Kind("Namespace", "", "v1", "namespaces", False, objects.Namespace)
NODE = Kind("Node", "", "v1", "nodes", False, objects.Node)
POD = Kind("Pod", "", "v1", "pods", True, objects.Pod)
SERVICE_ACCOUNT = Kind("ServiceAccount", "", "v1", "serviceaccounts", True, objects.ServiceAccount)
SERVICE = Kind("Service", "", "v1", "services", True, objects.Service)
CONFIG_MAP = Kind("ConfigMap", "", "v1", "configmaps", True, objects.ConfigMap)
ENDPOINT_SLICE = Kind("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices", True, objects.EndpointSlice)
DEPLOYMENT = Kind("Deployment", "apps", "v1", "deployments", True, objects.Deployment)
LEASE = Kind("Lease", "coordination.k8s.io", "v1", "leases", True, objects.Lease)
AUTHORIZATION_POLICY = Kind(
    "AuthorizationPolicy", "security.istio.io", "v1", "authorizationpolicies", True, objects.AuthorizationPolicy
)
PEER_AUTHENTICATION = Kind(
    "PeerAuthentication", "security.istio.io", "v1", "peerauthentications", True, objects.PeerAuthentication
)

KINDS: dict[str, Kind[Any]] = {
    kind.name: kind
    for kind in (
        NAMESPACE,
        NODE,
        POD,
        SERVICE_ACCOUNT,
        SERVICE,
        CONFIG_MAP,
        ENDPOINT_SLICE,
        DEPLOYMENT,
        LEASE,
        AUTHORIZATION_POLICY,
        PEER_AUTHENTICATION,
    )
}
"""Every kind this project knows, by name."""
