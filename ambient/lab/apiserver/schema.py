"""The kinds this server knows: names, scope, versions and subresources, and kinds added by definition objects.

A new kind is a row here (or a CustomResourceDefinition created through the API). Fields are not described:
unknown fields are preserved, `defaults` and `validate` look only at those they know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ambient.lab.apiserver.status import JsonObject, qualified

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind. ``versions`` in order of preference; objects are stored once and served in any of them."""

    group: str
    versions: tuple[str, ...]
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    """Of ``status``, ``scale``, ``token``, ``binding``, ``eviction``, ``finalize``."""
    generation: bool = False
    """Whether metadata.generation counts changes outside metadata and status."""
    custom: bool = False
    """Known only as JSON: no strategic merge patch, generic table."""
    columns: tuple[tuple[str, str, str, int], ...] = ()
    """Additional printer columns of a custom kind: name, type, JSON path, priority."""
    virtual: bool = False
    """Answered but not stored (reviews): create only."""

    @property
    def singular(self) -> str:
        return self.kind.lower()

    @property
    def resource(self) -> str:
        """``pods`` or ``deployments.apps``: the key in the store and the name in messages."""
        return qualified(self.plural, self.group)

    def api_version(self, version: str | None = None) -> str:
        version = version or self.versions[0]
        return f"{self.group}/{version}" if self.group else version

    def has_status(self) -> bool:
        return "status" in self.subresources


NAMESPACE = Kind(
    "", ("v1",), "Namespace", "namespaces", namespaced=False, short_names=("ns",), subresources=("finalize", "status")
)
NODE = Kind("", ("v1",), "Node", "nodes", namespaced=False, short_names=("no",), subresources=("status",))
POD = Kind(
    "",
    ("v1",),
    "Pod",
    "pods",
    short_names=("po",),
    categories=("all",),
    subresources=("binding", "eviction", "status"),
)
SERVICE_ACCOUNT = Kind("", ("v1",), "ServiceAccount", "serviceaccounts", short_names=("sa",), subresources=("token",))
SERVICE = Kind("", ("v1",), "Service", "services", short_names=("svc",), categories=("all",), subresources=("status",))
ENDPOINTS = Kind("", ("v1",), "Endpoints", "endpoints", short_names=("ep",))
ENDPOINT_SLICE = Kind("discovery.k8s.io", ("v1",), "EndpointSlice", "endpointslices", generation=True)
CONFIG_MAP = Kind("", ("v1",), "ConfigMap", "configmaps", short_names=("cm",))
SECRET = Kind("", ("v1",), "Secret", "secrets")
EVENT = Kind("", ("v1",), "Event", "events", short_names=("ev",))
LEASE = Kind("coordination.k8s.io", ("v1",), "Lease", "leases")
DEPLOYMENT = Kind(
    "apps",
    ("v1",),
    "Deployment",
    "deployments",
    short_names=("deploy",),
    categories=("all",),
    subresources=("scale", "status"),
    generation=True,
)
REPLICA_SET = Kind(
    "apps",
    ("v1",),
    "ReplicaSet",
    "replicasets",
    short_names=("rs",),
    categories=("all",),
    subresources=("scale", "status"),
    generation=True,
)
DEFINITION = Kind(
    "apiextensions.k8s.io",
    ("v1",),
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
    short_names=("crd", "crds"),
    categories=("api-extensions",),
    subresources=("status",),
    generation=True,
)
TOKEN_REVIEW = Kind("authentication.k8s.io", ("v1",), "TokenReview", "tokenreviews", namespaced=False, virtual=True)
SELF_REVIEW = Kind(
    "authentication.k8s.io", ("v1",), "SelfSubjectReview", "selfsubjectreviews", namespaced=False, virtual=True
)
SELF_ACCESS_REVIEW = Kind(
    "authorization.k8s.io",
    ("v1",),
    "SelfSubjectAccessReview",
    "selfsubjectaccessreviews",
    namespaced=False,
    virtual=True,
)

_AGE = ("Age", "date", ".metadata.creationTimestamp", 0)
ISTIO_GROUP = "security.istio.io"
GATEWAY_GROUP = "gateway.networking.k8s.io"
AUTHORIZATION_POLICY = Kind(
    ISTIO_GROUP,
    ("v1", "v1beta1"),
    "AuthorizationPolicy",
    "authorizationpolicies",
    short_names=("ap",),
    categories=("istio-io", "security-istio-io"),
    subresources=("status",),
    generation=True,
    custom=True,
    columns=(("Action", "string", ".spec.action", 0), _AGE),
)
PEER_AUTHENTICATION = Kind(
    ISTIO_GROUP,
    ("v1", "v1beta1"),
    "PeerAuthentication",
    "peerauthentications",
    short_names=("pa",),
    categories=("istio-io", "security-istio-io"),
    subresources=("status",),
    generation=True,
    custom=True,
    columns=(("Mode", "string", ".spec.mtls.mode", 0), _AGE),
)
GATEWAY_CLASS = Kind(
    GATEWAY_GROUP,
    ("v1", "v1beta1"),
    "GatewayClass",
    "gatewayclasses",
    namespaced=False,
    short_names=("gc",),
    categories=("gateway-api",),
    subresources=("status",),
    generation=True,
    custom=True,
    columns=(
        ("Controller", "string", ".spec.controllerName", 0),
        ("Accepted", "string", '.status.conditions[?(@.type=="Accepted")].status', 0),
        _AGE,
        ("Description", "string", ".spec.description", 1),
    ),
)
GATEWAY = Kind(
    GATEWAY_GROUP,
    ("v1", "v1beta1"),
    "Gateway",
    "gateways",
    short_names=("gtw",),
    categories=("gateway-api",),
    subresources=("status",),
    generation=True,
    custom=True,
    columns=(
        ("Class", "string", ".spec.gatewayClassName", 0),
        ("Address", "string", ".status.addresses[*].value", 0),
        ("Programmed", "string", '.status.conditions[?(@.type=="Programmed")].status', 0),
        _AGE,
    ),
)
HTTP_ROUTE = Kind(
    GATEWAY_GROUP,
    ("v1", "v1beta1"),
    "HTTPRoute",
    "httproutes",
    categories=("gateway-api",),
    subresources=("status",),
    generation=True,
    custom=True,
    columns=(("Hostnames", "string", ".spec.hostnames", 0), _AGE),
)

BUILT_IN: tuple[Kind, ...] = (
    NAMESPACE,
    NODE,
    POD,
    SERVICE_ACCOUNT,
    SERVICE,
    ENDPOINTS,
    CONFIG_MAP,
    SECRET,
    EVENT,
    DEPLOYMENT,
    REPLICA_SET,
    ENDPOINT_SLICE,
    LEASE,
    DEFINITION,
    TOKEN_REVIEW,
    SELF_REVIEW,
    SELF_ACCESS_REVIEW,
    AUTHORIZATION_POLICY,
    PEER_AUTHENTICATION,
    GATEWAY_CLASS,
    GATEWAY,
    HTTP_ROUTE,
)


class Registry:
    """Which kinds are served. Built-in rows cannot be replaced by a definition object of the same name."""

    def __init__(self, kinds: Iterable[Kind] = BUILT_IN) -> None:
        self._fixed = {kind.resource: kind for kind in kinds}
        self._defined: dict[str, Kind] = {}

    def __iter__(self) -> Iterator[Kind]:
        yield from self._fixed.values()
        yield from self._defined.values()

    def define(self, kind: Kind) -> None:
        """Serve ``kind`` from now on, unless a built-in kind has its name (whose row knows more)."""
        if kind.resource not in self._fixed:
            self._defined[kind.resource] = kind

    def forget(self, resource: str) -> None:
        self._defined.pop(resource, None)

    def get(self, resource: str) -> Kind | None:
        return self._fixed.get(resource) or self._defined.get(resource)

    def find(self, group: str, version: str, plural: str) -> Kind | None:
        kind = self.get(qualified(plural, group))
        return kind if kind is not None and version in kind.versions else None

    def by_kind(self, api_version: str, kind_name: str) -> Kind | None:
        """The kind of an object by its apiVersion and kind, as written in a manifest."""
        group, _, version = api_version.rpartition("/")
        for kind in self:
            if kind.kind == kind_name and kind.group == group and version in kind.versions:
                return kind
        return None

    def stored(self) -> list[Kind]:
        return [kind for kind in self if not kind.virtual]


def kind_of_definition(definition: JsonObject) -> Kind:
    """The Kind a validated CustomResourceDefinition asks for; only served versions, the storage version first."""
    spec = definition["spec"]
    served = [version for version in spec["versions"] if version.get("served", True)]
    served.sort(key=lambda version: not version.get("storage", False))
    names = spec["names"]
    subresources = served[0].get("subresources") or {} if served else {}
    columns = [
        (str(c["name"]), str(c.get("type", "string")), str(c["jsonPath"]), int(c.get("priority", 0)))
        for c in (served[0].get("additionalPrinterColumns") or [] if served else [])
    ]
    return Kind(
        group=str(spec["group"]),
        versions=tuple(str(version["name"]) for version in served),
        kind=str(names["kind"]),
        plural=str(names["plural"]),
        namespaced=spec.get("scope") != "Cluster",
        short_names=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        subresources=("status",) if "status" in subresources else (),
        generation=True,
        custom=True,
        columns=tuple(columns) or (_AGE,),
    )
