"""Whatever the API server sends, the reconciler answers with a World and problems, and never raises."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ambient.control.dump import plain
from ambient.control.reconcile import Reconciler
from ambient.errors import ConfigFault
from ambient.manifest.kinds import KINDS, Changed
from ambient.manifest.mesh import Mesh
from ambient.model.workload import Workload
from ambient.xds.store import Store

texts = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["a", "shop", "a/b", "10.1.0.1", "fd00::1", "fe80::1%eth0", "None", "80", "-1", "TCP", "Pod", "*"]),
)
numbers = st.sampled_from([0, 1, 80, -1, 65536, 1 << 40])
labels = st.none() | st.dictionaries(
    st.sampled_from(["kubernetes.io/service-name", "app", "pod-template-hash", "x"]), texts, max_size=3
)
metadata = st.fixed_dictionaries(
    {"name": texts, "namespace": texts},
    optional={
        "labels": labels,
        "annotations": st.none()
        | st.dictionaries(
            st.sampled_from(["ambient.istio.io/redirection", "istio.io/dry-run"]),
            st.sampled_from(["enabled", "true", "x"]),
        ),
        "uid": texts,
        "creationTimestamp": st.none() | texts,
        "deletionTimestamp": st.none() | texts,
        "generation": numbers,
        "ownerReferences": st.none()
        | st.lists(
            st.fixed_dictionaries(
                {"kind": st.sampled_from(["ReplicaSet", "Job", "x"]), "name": texts, "controller": st.just(True)}
            ),
            max_size=2,
        ),
    },
)
pod_body = {
    "spec": st.fixed_dictionaries(
        {}, optional={"nodeName": texts, "serviceAccountName": texts, "hostNetwork": st.booleans()}
    ),
    "status": st.fixed_dictionaries(
        {},
        optional={
            "phase": texts,
            "podIP": texts,
            "podIPs": st.none() | st.lists(st.fixed_dictionaries({"ip": texts}), max_size=3),
        },
    ),
}
service_body = {
    "spec": st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["ClusterIP", "ExternalName", "x"]),
            "clusterIP": texts,
            "clusterIPs": st.none() | st.lists(texts, max_size=2),
            "ports": st.none()
            | st.lists(
                st.fixed_dictionaries(
                    {"port": numbers}, optional={"targetPort": numbers | texts, "name": texts, "protocol": texts}
                ),
                max_size=2,
            ),
            "trafficDistribution": texts,
        },
    )
}
slice_body = {
    "addressType": st.sampled_from(["IPv4", "IPv6", "FQDN", ""]),
    "ports": st.none() | st.lists(st.fixed_dictionaries({}, optional={"name": texts, "port": numbers}), max_size=2),
    "endpoints": st.none()
    | st.lists(
        st.fixed_dictionaries(
            {"addresses": st.none() | st.lists(texts, max_size=2)},
            optional={
                "targetRef": st.none()
                | st.fixed_dictionaries({"kind": texts, "name": texts}, optional={"namespace": texts, "uid": texts})
            },
        ),
        max_size=2,
    ),
}
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "rules",
                    "from",
                    "source",
                    "namespaces",
                    "selector",
                    "matchLabels",
                    "mtls",
                    "mode",
                    "portLevelMtls",
                    "80",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)
bodies: dict[str, dict[str, Any]] = {
    "Pod": pod_body,
    "Service": service_body,
    "EndpointSlice": slice_body,
    "AuthorizationPolicy": {"spec": anything, "status": st.none()},
    "PeerAuthentication": {"spec": anything},
    "Node": {},
    "Namespace": {},
    "ConfigMap": {"data": st.none() | st.dictionaries(texts, texts, max_size=2)},
}
changes = st.sampled_from(sorted(bodies)).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.booleans(),
        st.fixed_dictionaries({"metadata": metadata}, optional=bodies[kind]),
    )
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(changes, max_size=12))
def test_no_object_raises_and_every_workload_has_an_identity(steps: list[tuple[str, bool, dict[str, Any]]]) -> None:
    reconciler, store, known = Reconciler(Mesh(), 5.0), Store(), {}
    for now, (name, remove, value) in enumerate(steps):
        kind = KINDS[name]
        try:
            item = kind.convert(value)
        except ConfigFault:
            continue  # the reflector reports it and keeps what it has
        key = (name, item.key)
        old, new = known.pop(key, None), None if remove else item
        if new is not None:
            known[key] = new
        if old is not None or new is not None:
            reconciler.change(Changed(kind, item.key, old, new))
        store.set_world(reconciler.publish(float(now)))
        reconciler.release(float(now), lambda _uid: (), lambda _uid: ())
        reconciler.status_patches("now")
        reconciler.root_writes("bundle")
        assert all(problem.where and problem.rule for problem in reconciler.problems)
    if reconciler.world is not None:
        plain(reconciler.world)
        for workload in reconciler.world.workloads.values():
            assert isinstance(workload, Workload)
            if "/Pod/" in workload.uid:
                _ = workload.identity
