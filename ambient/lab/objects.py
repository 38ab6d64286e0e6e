"""What the lab's stand-ins read of Kubernetes objects beyond ambient.manifest.objects: whole pods, traffic policies."""

from __future__ import annotations

from typing import Any

import msgspec

from ambient.manifest.kinds import Kind
from ambient.manifest.objects import Metadata, Object, PodStatus, ServiceSpec, Slim

MIRROR = "kubernetes.io/config.mirror"
"""Annotation of a pod that the API only shows: kubelets leave it alone."""
SERVICE_NAME = "kubernetes.io/service-name"
"""Label of an EndpointSlice that names its Service."""


class FieldRef(Slim, frozen=True):
    field_path: str = ""


class ValueFrom(Slim, frozen=True):
    field_ref: FieldRef | None = None
    config_map_key_ref: dict[str, Any] | None = None
    secret_key_ref: dict[str, Any] | None = None
    resource_field_ref: dict[str, Any] | None = None


class EnvVar(Slim, frozen=True):
    name: str
    value: str = ""
    value_from: ValueFrom | None = None


class NamedPort(Slim, frozen=True):
    container_port: int
    name: str = ""


class HttpHeader(Slim, frozen=True):
    name: str
    value: str = ""


class HttpGet(Slim, frozen=True):
    port: int | str
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    http_headers: list[HttpHeader] | None = None


class TcpSocket(Slim, frozen=True):
    port: int | str
    host: str = ""


class ExecAction(Slim, frozen=True):
    command: list[str] | None = None


class Probe(Slim, frozen=True):
    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    exec: ExecAction | None = None
    grpc: dict[str, Any] | None = None
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


class Container(Slim, frozen=True):
    name: str
    image: str = ""
    command: list[str] | None = None
    args: list[str] | None = None
    working_dir: str = ""
    env: list[EnvVar] | None = None
    env_from: list[Any] | None = None
    ports: list[NamedPort] | None = None
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    volume_mounts: list[dict[str, Any]] | None = None

    def port(self, name: int | str) -> int:
        """The number of a port given by number or name. Raises LookupError."""
        if isinstance(name, int):
            return name
        for port in self.ports or ():
            if port.name == name:
                return port.container_port
        if name.isdigit():
            return int(name)
        raise LookupError(f"container {self.name} has no port named {name!r}")


class PodSpec(Slim, frozen=True):
    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False
    hostname: str = ""
    subdomain: str = ""
    restart_policy: str = "Always"
    termination_grace_period_seconds: int = 30
    init_containers: list[Container] | None = None
    containers: list[Container] | None = None
    volumes: list[dict[str, Any]] | None = None


class PodMetadata(Metadata, frozen=True):
    deletion_grace_period_seconds: int | None = None


class Condition(Slim, frozen=True):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class KubeletPodStatus(PodStatus, frozen=True):
    conditions: list[Condition] | None = None  # type: ignore[assignment]
    qos_class: str = "BestEffort"


class KubeletPod(Object, frozen=True):
    """A pod with all that it takes to run it."""

    metadata: PodMetadata = PodMetadata()
    spec: PodSpec = PodSpec()
    status: KubeletPodStatus = KubeletPodStatus()


class LabServiceSpec(ServiceSpec, frozen=True):
    external_traffic_policy: str | None = None
    session_affinity: str | None = None


class LabService(Object, frozen=True):
    spec: LabServiceSpec = LabServiceSpec()


POD = Kind("Pod", "", "v1", "pods", True, KubeletPod)
SERVICE = Kind("Service", "", "v1", "services", True, LabService)


class Anything(Object, frozen=True):
    """An object of which only the metadata matters."""


EVENT = Kind("Event", "", "v1", "events", True, Anything)
SECRET = Kind("Secret", "", "v1", "secrets", True, Anything)


def plain(value: Any) -> Any:
    """The JSON values of a structure."""
    return msgspec.to_builtins(value)
