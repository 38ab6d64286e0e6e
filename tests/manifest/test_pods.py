"""Pods: the workload each is, and who is enrolled."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from ambient.errors import ConfigFault
from ambient.manifest.kinds import NAMESPACE, NODE, POD
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import Namespace, Pod
from ambient.manifest.pods import (
    MIRROR,
    Enrol,
    Leave,
    NotEnrolled,
    addresses_of,
    enrolment,
    in_world,
    uid_on_node,
    workload_of,
)
from ambient.model.identity import Identity
from ambient.model.workload import Locality, TunnelProtocol, Workload, WorkloadStatus, WorkloadType

MODE = "istio.io/dataplane-mode"


def pod(**changes: Any) -> Pod:
    """A ready pod; ``labels``, ``annotations``, ``owner``, ``spec`` and ``status`` are merged in, ``meta`` too."""
    meta: dict[str, Any] = {"name": "cart-1", "namespace": "shop", "labels": changes.get("labels", {})}
    meta |= {"annotations": changes.get("annotations", {})} | changes.get("meta", {})
    if "owner" in changes:
        kind, name = changes["owner"]
        meta["ownerReferences"] = [{"kind": "Other", "name": "x"}, {"kind": kind, "name": name, "controller": True}]
    status = {"phase": "Running", "podIPs": [{"ip": "10.1.0.4"}], "conditions": [{"type": "Ready", "status": "True"}]}
    spec = {"nodeName": "n1", "serviceAccountName": "cart"}
    return POD.convert(
        {"metadata": meta, "spec": spec | changes.get("spec", {}), "status": status | changes.get("status", {})}
    )


def namespace(mode: str | None) -> Namespace:
    return NAMESPACE.convert({"metadata": {"name": "shop", "labels": {MODE: mode} if mode else {}}})


def workload(item: Pod, **node_labels: str) -> Workload:
    node = NODE.convert({"metadata": {"name": "n1", "labels": node_labels}})
    return workload_of(item, node, Mesh(trust_domain="example.org", cluster_id="c1"), addresses=addresses_of(item))


def test_a_pod_becomes_a_workload_under_istios_names() -> None:
    made = workload(pod(), **{"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"})
    assert made.uid == "c1//Pod/shop/cart-1"
    assert made.identity == Identity("example.org", "shop", "cart")
    assert made.addresses == (ipaddress.ip_address("10.1.0.4"),)
    assert (made.node, made.cluster_id, made.locality) == ("n1", "c1", Locality("eu", "eu-1"))
    assert (made.status, made.protocol) == (WorkloadStatus.HEALTHY, TunnelProtocol.NONE)


@pytest.mark.parametrize(
    ("changes", "protocol"),
    [
        ({"annotations": {"ambient.istio.io/redirection": "enabled"}}, TunnelProtocol.HBONE),
        ({"annotations": {"ambient.istio.io/redirection": "pending"}}, TunnelProtocol.NONE),
        ({"labels": {"ambient.istio.io/redirection": "enabled"}}, TunnelProtocol.NONE),
        (
            {"annotations": {"ambient.istio.io/redirection": "enabled"}, "spec": {"hostNetwork": True}},
            TunnelProtocol.NONE,
        ),
        ({"labels": {MODE: "ambient"}}, TunnelProtocol.NONE),
    ],
)
def test_only_the_agents_annotation_makes_a_pod_hbone(changes: dict[str, Any], protocol: TunnelProtocol) -> None:
    assert workload(pod(**changes)).protocol is protocol


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, WorkloadStatus.HEALTHY),
        ({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}, WorkloadStatus.UNHEALTHY),
        ({"status": {"conditions": None}}, WorkloadStatus.UNHEALTHY),
        ({"meta": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, WorkloadStatus.UNHEALTHY),
    ],
)
def test_healthy_is_ready_and_not_on_its_way_out(changes: dict[str, Any], status: WorkloadStatus) -> None:
    assert workload(pod(**changes)).status is status


@pytest.mark.parametrize(
    ("owner", "labels", "expected"),
    [
        (("ReplicaSet", "cart-5d9"), {"pod-template-hash": "5d9"}, ("cart", WorkloadType.DEPLOYMENT)),
        (("ReplicaSet", "bare"), {}, ("bare", WorkloadType.POD)),
        (("ReplicaSet", "cart-5d9"), {"pod-template-hash": "other"}, ("cart-5d9", WorkloadType.POD)),
        (("Job", "backup-28340500"), {}, ("backup", WorkloadType.CRONJOB)),
        (("Job", "backup-once"), {}, ("backup-once", WorkloadType.JOB)),
        (("Job", "-28340500"), {}, ("-28340500", WorkloadType.JOB)),
        (("StatefulSet", "db"), {}, ("db", WorkloadType.POD)),
    ],
)
def test_the_workload_is_named_after_its_controller(
    owner: tuple[str, str], labels: dict[str, str], expected: tuple[str, WorkloadType]
) -> None:
    made = workload(pod(owner=owner, labels=labels))
    assert (made.workload_name, made.workload_type) == expected


@pytest.mark.parametrize(
    ("labels", "name", "revision"),
    [
        ({}, "cart-1", "latest"),
        ({"app": "a", "version": "v1"}, "a", "v1"),
        ({"app": "a", "app.kubernetes.io/name": "b", "app.kubernetes.io/version": "2"}, "b", "2"),
        ({"app": "a", "service.istio.io/canonical-name": "c", "service.istio.io/canonical-revision": "r"}, "c", "r"),
        ({"app": ""}, "cart-1", "latest"),
    ],
)
def test_canonical_name_and_revision_follow_istios_labels(labels: dict[str, str], name: str, revision: str) -> None:
    made = workload(pod(labels=labels))
    assert (made.canonical_name, made.canonical_revision) == (name, revision)


def test_both_families_and_the_single_old_field_are_read_and_mapped_addresses_folded() -> None:
    both = pod(status={"podIPs": [{"ip": "10.1.0.4"}, {"ip": "fd00::4"}, {"ip": "::ffff:10.1.0.4"}]})
    assert [str(a) for a in addresses_of(both)] == ["10.1.0.4", "fd00::4"]
    assert [str(a) for a in addresses_of(pod(status={"podIPs": None, "podIP": "10.9.9.9"}))] == ["10.9.9.9"]


@pytest.mark.parametrize(
    ("mirrored", "uid"),
    [
        ("c0ffee00c0ffee00c0ffee00c0ffee00", "c0ffee00c0ffee00c0ffee00c0ffee00"),
        ("0b7c1d1e-58f5-4c39-8a3b-0d6a6b0f2f11", "u1"),
        ("", "u1"),
    ],
)
def test_a_static_pod_is_known_by_its_hash_and_nobody_by_another_pods_uid(mirrored: str, uid: str) -> None:
    assert uid_on_node(pod(annotations={MIRROR: mirrored}, meta={"uid": "u1"})) == uid


def test_a_bad_address_is_named() -> None:
    with pytest.raises(ConfigFault, match=r"Pod shop/cart-1: status.podIPs\[1\].ip: '10.1.0': must be an IP address"):
        addresses_of(pod(status={"podIPs": [{"ip": "10.1.0.4"}, {"ip": "10.1.0"}]}))
    with pytest.raises(ConfigFault, match="at most 16"):
        addresses_of(pod(status={"podIPs": [{"ip": f"10.1.0.{n}"} for n in range(17)]}))


def test_a_service_account_that_fits_no_spiffe_id_is_refused() -> None:
    with pytest.raises(ConfigFault, match=r"Pod shop/cart-1: spec.serviceAccountName: 'a/b'"):
        workload(pod(spec={"serviceAccountName": "a/b"}))
    assert workload(pod(spec={"serviceAccountName": ""})).service_account == "default"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, True),
        ({"phase": "Pending"}, True),
        ({"phase": "Succeeded"}, False),
        ({"phase": "Failed"}, False),
        ({"podIPs": None}, False),
    ],
)
def test_only_pods_with_an_address_that_have_not_ended_are_in_the_world(status: dict[str, Any], expected: bool) -> None:
    assert in_world(pod(status=status)) is expected


@pytest.mark.parametrize(
    ("of_pod", "of_namespace", "expected"),
    [
        (None, None, Leave()),
        (None, "ambient", Enrol()),
        (None, "none", Leave()),
        (None, "sidecar", Leave()),
        ("ambient", None, Enrol()),
        ("ambient", "none", Enrol()),
        ("none", "ambient", Leave()),
        ("other", "ambient", Enrol()),
        ("other", None, Leave()),
    ],
)
def test_the_pods_label_outweighs_the_namespaces(of_pod: str | None, of_namespace: str | None, expected: Any) -> None:
    labels = {MODE: of_pod} if of_pod else {}
    assert enrolment(pod(labels=labels), namespace(of_namespace)) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spec": {"hostNetwork": True}}, "host_network"),
        ({"annotations": {"sidecar.istio.io/status": "{}"}}, "sidecar"),
        ({"spec": {"runtimeClassName": "gVisor"}}, "sandbox"),
        ({"spec": {"runtimeClassName": "kata-qemu"}}, "sandbox"),
        ({"spec": {"runtimeClassName": "runsc"}}, "sandbox"),
        ({"labels": {"kubevirt.io": "virt-launcher"}}, "kubevirt"),
        ({"labels": {"kubevirt.io/domain": "vm"}}, "kubevirt"),
        ({"meta": {"namespace": "ambient-system"}}, "system_namespace"),
        ({"meta": {"namespace": "kube-system"}}, "system_namespace"),
    ],
)
def test_what_cannot_be_enrolled_is_told_why_and_what_was_not_asked_for_is_left(
    changes: dict[str, Any], reason: str
) -> None:
    refused = enrolment(pod(**changes), namespace("ambient"))
    assert isinstance(refused, NotEnrolled) and refused.reason == reason and refused.detail
    assert enrolment(pod(**changes), namespace(None)) == Leave()


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": {"runtimeClassName": "nvidia"}},
        {"labels": {"kubevirt": "x"}},
        {"annotations": {"sidecar.istio.io/inject": "false"}},
    ],
)
def test_what_only_looks_like_an_exclusion_is_enrolled(changes: dict[str, Any]) -> None:
    assert enrolment(pod(**changes), namespace("ambient")) == Enrol()


def test_sandboxes_and_system_namespaces_can_be_named() -> None:
    boxed = pod(spec={"runtimeClassName": "firecracker"})
    assert enrolment(boxed, namespace("ambient")) == Enrol()
    assert isinstance(enrolment(boxed, namespace("ambient"), sandbox_runtimes=("firecracker",)), NotEnrolled)
    assert isinstance(enrolment(pod(), namespace("ambient"), system_namespaces=("shop",)), NotEnrolled)


def test_an_ended_pod_is_left_and_an_unknown_namespace_asks_for_nothing() -> None:
    assert enrolment(pod(status={"phase": "Succeeded"}), namespace("ambient")) == Leave()
    assert enrolment(pod(), None) == Leave()
