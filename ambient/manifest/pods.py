"""Pods: the workload a pod is in the mesh, and whether a pod is to be enrolled."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ambient.errors import ConfigFault
from ambient.manifest import mesh as words
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import Namespace, Node, Pod
from ambient.manifest.problems import reference
from ambient.model.address import IPAddress, parse_ip
from ambient.model.workload import Locality, Port, TunnelProtocol, Workload, WorkloadStatus, WorkloadType

ADDRESSES_MAX = 16  # Kubernetes gives two; more is an error or an attack
SANDBOX_RUNTIMES = ("gvisor", "runsc", "kata")
SYSTEM_NAMESPACES = frozenset({"ambient-system", "kube-system"})

MIRROR = "kubernetes.io/config.mirror"
_HASH = re.compile(r"[0-9a-f]{32}")

_CRONJOB_SUFFIX = re.compile(r"-\d{8,10}")


@dataclass(frozen=True, slots=True)
class Enrol:
    """The pod is to be in the mesh."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Nobody asked for the pod to be in the mesh, or it asked not to be."""


@dataclass(frozen=True, slots=True)
class NotEnrolled:
    """Asked for, but it cannot be. ``reason`` is one word for counters, ``detail`` a sentence for people."""

    reason: str
    detail: str


def enrolment(
    pod: Pod,
    namespace: Namespace | None,
    *,
    sandbox_runtimes: Collection[str] = SANDBOX_RUNTIMES,
    system_namespaces: Collection[str] = SYSTEM_NAMESPACES,
) -> Enrol | Leave | NotEnrolled:
    """By the labels istio.io/dataplane-mode of pod and namespace (the pod's word wins) and the exclusions.

    ``sandbox_runtimes`` are parts of RuntimeClass names whose pods have a network stack of their own.
    """
    mode = pod.labels.get(words.DATAPLANE_MODE)
    of_namespace = namespace.labels.get(words.DATAPLANE_MODE) if namespace else None
    if mode == "none" or (mode != "ambient" and of_namespace != "ambient"):
        return Leave()
    if pod.status.phase in ("Succeeded", "Failed"):
        return Leave()
    if pod.namespace in system_namespaces:
        return NotEnrolled("system_namespace", f"namespace {pod.namespace} runs the mesh or the cluster itself")
    if pod.spec.host_network:
        return NotEnrolled("host_network", "the pod shares its node's network (hostNetwork: true)")
    if words.SIDECAR_STATUS in pod.annotations:
        return NotEnrolled("sidecar", f"a sidecar is injected (annotation {words.SIDECAR_STATUS})")
    if any(label == "kubevirt.io" or label.startswith("kubevirt.io/") for label in pod.labels):
        return NotEnrolled("kubevirt", "traffic of a KubeVirt machine uses no socket of the pod")
    runtime = (pod.spec.runtime_class_name or "").lower()
    if any(part in runtime for part in sandbox_runtimes):
        return NotEnrolled("sandbox", f"RuntimeClass {pod.spec.runtime_class_name} has a network stack of its own")
    return Enrol()


def in_world(pod: Pod) -> bool:
    """Whether the pod can have traffic: it has an address and has not ended (an ended pod's address is reused)."""
    return pod.status.phase not in ("Succeeded", "Failed") and bool(pod.status.pod_ips or pod.status.pod_ip)


def uid_on_node(pod: Pod) -> str:
    """The UID by which kubelet, runtime and CNI know the pod. A static pod has another one than the object that mirrors
    it in the API: the hash of its manifest. Anybody can write the annotation, but no other pod's UID has that form."""
    mirrored = pod.annotations.get(MIRROR, "")
    return mirrored if _HASH.fullmatch(mirrored) else pod.metadata.uid


def workload_uid(mesh: Mesh, namespace: str, name: str) -> str:
    return f"{mesh.cluster_id}//Pod/{namespace}/{name}"


def addresses_of(pod: Pod) -> tuple[IPAddress, ...]:
    """status.podIPs without repetition. Raises ConfigFault naming the one that is no address."""
    texts = [entry.ip for entry in pod.status.pod_ips or ()] or [pod.status.pod_ip]
    where = reference("Pod", pod.namespace, pod.name)
    if len(texts) > ADDRESSES_MAX:
        raise ConfigFault(f"{where}: status.podIPs", len(texts), f"must be at most {ADDRESSES_MAX} addresses")
    found: dict[IPAddress, None] = {}
    for index, text in enumerate(texts):
        try:
            found[parse_ip(text)] = None
        except ValueError:
            raise ConfigFault(f"{where}: status.podIPs[{index}].ip", text[:80], "must be an IP address") from None
    return tuple(found)


def workload_of(
    pod: Pod,
    node: Node | None,
    mesh: Mesh,
    *,
    addresses: tuple[IPAddress, ...],
    services: tuple[tuple[str, tuple[Port, ...]], ...] = (),
    policies: tuple[str, ...] = (),
) -> Workload:
    """The workload of a pod that `in_world`. Raises ConfigFault if it cannot have a SPIFFE identity."""
    workload_name, workload_type = controller_of(pod)
    labels = pod.labels
    workload = Workload(
        uid=workload_uid(mesh, pod.namespace, pod.name),
        name=pod.name,
        namespace=pod.namespace,
        addresses=addresses,
        node=pod.spec.node_name,
        service_account=pod.spec.service_account_name or "default",
        trust_domain=mesh.trust_domain,
        protocol=_protocol(pod),
        status=WorkloadStatus.HEALTHY if healthy(pod) else WorkloadStatus.UNHEALTHY,
        services=services,
        policies=policies,
        cluster_id=mesh.cluster_id,
        canonical_name=_first(
            labels, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app", default=workload_name
        ),
        canonical_revision=_first(
            labels, "service.istio.io/canonical-revision", "app.kubernetes.io/version", "version", default="latest"
        ),
        workload_name=workload_name,
        workload_type=workload_type,
        host_network=pod.spec.host_network,
        native_tunnel=labels.get(words.TUNNEL) == "http",
        locality=locality_of(node),
    )
    try:
        _ = workload.identity
    except ValueError as error:
        where = reference("Pod", pod.namespace, pod.name)
        raise ConfigFault(f"{where}: spec.serviceAccountName", workload.service_account[:80], str(error)) from None
    return workload


def _protocol(pod: Pod) -> TunnelProtocol:
    captured = pod.annotations.get(words.REDIRECTION) == "enabled" and not pod.spec.host_network
    return TunnelProtocol.HBONE if captured else TunnelProtocol.NONE


def healthy(pod: Pod) -> bool:
    """Ready and not on its way out."""
    if pod.metadata.deletion_timestamp is not None:
        return False
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or ())


def controller_of(pod: Pod) -> tuple[str, WorkloadType]:
    """Name and kind of what made the pod: a ReplicaSet's hash and a CronJob's time are taken off."""
    owner = next((o for o in pod.metadata.owner_references or () if o.controller), None)
    if owner is None:
        return pod.name, WorkloadType.POD
    match owner.kind:
        case "ReplicaSet":
            template_hash = pod.labels.get("pod-template-hash")
            if template_hash and owner.name.endswith(f"-{template_hash}"):
                return owner.name.removesuffix(f"-{template_hash}"), WorkloadType.DEPLOYMENT
            return owner.name, WorkloadType.POD
        case "Job":
            base, separator, _ = owner.name.rpartition("-")
            if separator and base and _CRONJOB_SUFFIX.fullmatch(owner.name[len(base) :]):
                return base, WorkloadType.CRONJOB
            return owner.name, WorkloadType.JOB
        case _:
            return owner.name, WorkloadType.POD


def locality_of(node: Node | None) -> Locality:
    if node is None:
        return Locality()
    return Locality(
        node.labels.get("topology.kubernetes.io/region", ""),
        node.labels.get("topology.kubernetes.io/zone", ""),
        node.labels.get("topology.istio.io/subzone", ""),
    )


def _first(labels: Mapping[str, str], *keys: str, default: str) -> str:
    for key in keys:
        if value := labels.get(key):
            return value
    return default
