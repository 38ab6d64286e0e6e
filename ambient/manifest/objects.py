"""Kubernetes objects, only the fields this project reads, decoded straight from bytes.

Unknown fields are skipped without ever becoming objects, which keeps a 5,000-pod list at a few MB. Go writes
nil slices and maps as null, so collections admit None on the wire; the properties of `Object` hide that.
The specs of policies stay plain values here, because a rule that cannot be read must weaken nothing:
ambient.manifest.policies and peer_authentication walk them and judge every field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

_NOTHING: Mapping[str, str] = {}


class Slim(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, kw_only=True):
    """Base of every structure here: immutable, camelCase on the wire."""


class OwnerReference(Slim, frozen=True):
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None


class Metadata(Slim, frozen=True):
    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    """RFC 3339, UTC."""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: list[OwnerReference] | None = None


class Object(Slim, frozen=True):
    """What every kind has."""

    metadata: Metadata = Metadata()

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def namespace(self) -> str:
        return self.metadata.namespace

    @property
    def key(self) -> str:
        """``namespace/name``, or the name alone for what has no namespace."""
        meta = self.metadata
        return f"{meta.namespace}/{meta.name}" if meta.namespace else meta.name

    @property
    def labels(self) -> Mapping[str, str]:
        return self.metadata.labels or _NOTHING

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.metadata.annotations or _NOTHING


class Namespace(Object, frozen=True):
    pass


class NodeAddress(Slim, frozen=True):
    type: str = ""
    address: str = ""


class NodeSpec(Slim, frozen=True):
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")


class NodeStatus(Slim, frozen=True):
    addresses: list[NodeAddress] | None = None


class Node(Object, frozen=True):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class ServiceAccount(Object, frozen=True):
    pass


class ConfigMap(Object, frozen=True):
    data: dict[str, str] | None = None


class PodSpec(Slim, frozen=True):
    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False
    runtime_class_name: str | None = None


class PodIP(Slim, frozen=True):
    ip: str = ""


class PodCondition(Slim, frozen=True):
    type: str = ""
    status: str = ""


class PodStatus(Slim, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[PodIP] | None = msgspec.field(default=None, name="podIPs")
    host_ip: str = msgspec.field(default="", name="hostIP")
    conditions: list[PodCondition] | None = None


class Pod(Object, frozen=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class ServicePort(Slim, frozen=True):
    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    target_port: int | str = 0
    app_protocol: str | None = None
    node_port: int = 0


class ServiceSpec(Slim, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    ports: list[ServicePort] | None = None
    selector: dict[str, str] | None = None
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: str | None = None
    traffic_distribution: str | None = None
    external_name: str = ""


class Service(Object, frozen=True):
    spec: ServiceSpec = ServiceSpec()


class ObjectReference(Slim, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class EndpointConditions(Slim, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class SliceEndpoint(Slim, frozen=True):
    addresses: list[str] | None = None
    conditions: EndpointConditions = EndpointConditions()
    target_ref: ObjectReference | None = None
    node_name: str | None = None
    hostname: str | None = None


class SlicePort(Slim, frozen=True):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    app_protocol: str | None = None


class EndpointSlice(Object, frozen=True):
    address_type: str = "IPv4"
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class LabelSelector(Slim, frozen=True):
    match_labels: dict[str, str] | None = None


class EnvVar(Slim, frozen=True):
    name: str
    value: str = ""


class ContainerPort(Slim, frozen=True):
    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Container(Slim, frozen=True):
    """A container of a Deployment's template. Probes stay plain: only the lab's kubelet reads them."""

    name: str
    image: str = ""
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[EnvVar] | None = None
    ports: list[ContainerPort] | None = None
    working_dir: str = ""
    readiness_probe: dict[str, Any] | None = None
    liveness_probe: dict[str, Any] | None = None


class TemplateSpec(PodSpec, frozen=True):
    containers: list[Container] | None = None


class PodTemplate(Slim, frozen=True):
    metadata: Metadata = Metadata()
    spec: TemplateSpec = TemplateSpec()


class DeploymentSpec(Slim, frozen=True):
    replicas: int | None = None
    selector: LabelSelector = LabelSelector()
    template: PodTemplate = PodTemplate()


class Deployment(Object, frozen=True):
    spec: DeploymentSpec = DeploymentSpec()


class PolicyObject(Object, frozen=True):
    """An AuthorizationPolicy or PeerAuthentication: ``spec`` is what the user wrote, not yet judged. ``status`` has any
    shape: the definitions do not check it, and a policy must not be unreadable for what was written there."""

    spec: Any = None
    status: Any = None


class AuthorizationPolicy(PolicyObject, frozen=True):
    pass


class PeerAuthentication(PolicyObject, frozen=True):
    pass


class LeaseSpec(Slim, frozen=True):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(Object, frozen=True):
    spec: LeaseSpec = LeaseSpec()
