"""All objects to one World: what each change touches, and that no order of changes matters."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ambient.manifest import kinds, peer_authentication, policies
from ambient.manifest.kinds import Changed, Kind
from ambient.manifest.mesh import Mesh
from ambient.manifest.translate import Translator, translate
from ambient.model.address import parse_ip
from ambient.model.policy import Action
from ambient.model.workload import WorkloadStatus
from ambient.model.world import World

MESH = Mesh()
STRICT = "istio-system/istio_converted_static_strict"
WEB = "shop/web.shop.svc.cluster.local"


def meta(name: str, namespace: str = "shop", **more: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace} | more}


def pod(name: str, ip: str | None, namespace: str = "shop", **more: Any) -> Any:
    spec = {"nodeName": more.pop("node", "n1"), "hostNetwork": more.pop("host", False)}
    spec["serviceAccountName"] = more.pop("account", "web")
    status = {
        "phase": more.pop("phase", "Running"),
        "podIPs": [{"ip": ip}] if ip else None,
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return kinds.POD.convert(meta(name, namespace, **more) | {"spec": spec, "status": status})


def service(name: str, namespace: str = "shop", **spec: Any) -> Any:
    spec = {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "name": "web"}]} | spec
    return kinds.SERVICE.convert(meta(name, namespace) | {"spec": spec})


def piece(name: str, of: str, *pods: tuple[str, str], namespace: str = "shop", **more: Any) -> Any:
    endpoints = [
        {"addresses": [ip], "targetRef": {"kind": "Pod", "namespace": namespace, "name": who} if who else None}
        for who, ip in pods
    ]
    for endpoint in endpoints:
        if endpoint["targetRef"] is None:
            del endpoint["targetRef"]
    labels = {"kubernetes.io/service-name": of}
    value = {"addressType": "IPv4", "ports": [{"name": "web", "port": 8080}], "endpoints": endpoints} | more
    return kinds.ENDPOINT_SLICE.convert(meta(name, namespace, labels=labels) | value)


def authorization(name: str, namespace: str = "shop", **spec: Any) -> Any:
    return kinds.AUTHORIZATION_POLICY.convert(meta(name, namespace) | {"spec": spec})


def peer(mode: str, namespace: str = "shop", name: str = "default", **spec: Any) -> Any:
    return kinds.PEER_AUTHENTICATION.convert(meta(name, namespace) | {"spec": {"mtls": {"mode": mode}} | spec})


def node(name: str, zone: str) -> Any:
    return kinds.NODE.convert({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}})


def kind_of(item: Any) -> Kind[Any]:
    return kinds.KINDS[type(item).__name__]


class Cluster:
    """Objects fed to a translator one by one."""

    def __init__(self) -> None:
        self.translator = Translator(MESH)
        self.objects: dict[tuple[str, str], Any] = {}

    def put(self, *items: Any) -> World:
        for item in items:
            key = (kind_of(item).name, item.key)
            self.translator.change(Changed(kind_of(item), item.key, self.objects.get(key), item))
            self.objects[key] = item
        return self.world

    def remove(self, item: Any) -> World:
        old = self.objects.pop((kind_of(item).name, item.key), None)
        if old is not None:
            self.translator.change(Changed(kind_of(item), item.key, old, None))
        return self.world

    @property
    def world(self) -> World:
        self.translator.take()
        return self.translator.world

    def workload(self, name: str, namespace: str = "shop") -> Any:
        return self.world.workloads[f"Kubernetes//Pod/{namespace}/{name}"]


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def endpoints(world: World, key: str = WEB) -> list[tuple[str, int]]:
    return [(e.workload.name, e.port.target_port) for e in world.endpoints(world.services[key], 80)]


def test_a_service_finds_its_pods_whatever_arrives_first() -> None:
    items = [pod("a", "10.1.0.1"), service("web"), piece("web-1", "web", ("a", "10.1.0.1"))]
    for first in range(3):
        for second in range(3):
            if first != second:
                third = ({0, 1, 2} - {first, second}).pop()
                cluster = Cluster()
                for index in (first, second, third):
                    world = cluster.put(items[index])
                assert endpoints(world) == [("a", 8080)]


def test_endpoints_follow_the_slice(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1"), pod("b", "10.1.0.2"), service("web"))
    cluster.put(piece("web-1", "web", ("a", "10.1.0.1")))
    assert endpoints(cluster.put(piece("web-1", "web", ("b", "10.1.0.2")))) == [("b", 8080)]
    assert endpoints(cluster.put(piece("web-2", "web", ("a", "10.1.0.1")))) == [("a", 8080), ("b", 8080)]
    assert endpoints(cluster.remove(cluster.objects["EndpointSlice", "shop/web-1"])) == [("a", 8080)]
    world = cluster.remove(cluster.objects["Service", "shop/web"])
    assert world.services == {} and cluster.workload("a").services == ()


def test_a_slice_of_an_earlier_pod_of_the_same_name_serves_nobody(cluster: Cluster) -> None:
    cluster.put(service("web"), piece("web-1", "web", ("db-0", "10.1.0.1")))
    assert endpoints(cluster.put(pod("db-0", "10.1.0.7"))) == []
    assert endpoints(cluster.put(pod("db-0", "10.1.0.1"))) == [("db-0", 8080)]


def test_a_target_uid_of_another_pod_serves_nobody(cluster: Cluster) -> None:
    stale = {"kind": "Pod", "name": "db-0", "uid": "old"}
    cluster.put(service("web"))
    cluster.put(piece("web-1", "web", endpoints=[{"addresses": ["10.1.0.1"], "targetRef": stale}]))
    assert endpoints(cluster.put(pod("db-0", "10.1.0.1", uid="new"))) == []
    assert endpoints(cluster.put(pod("db-0", "10.1.0.1", uid="old"))) == [("db-0", 8080)]


def test_a_slice_gives_a_service_no_pods_of_another_namespace(cluster: Cluster) -> None:
    cluster.put(service("web"), pod("a", "10.1.0.1", "bank"))
    before = cluster.workload("a", "bank")
    target = {"kind": "Pod", "namespace": "bank", "name": "a"}
    world = cluster.put(piece("web-1", "web", endpoints=[{"addresses": ["10.1.0.1"], "targetRef": target}]))
    assert world.workloads[before.uid] is before and before.services == ()
    [endpoint] = world.endpoints(world.services[WEB], 80)
    assert (endpoint.workload.namespace, endpoint.workload.enrolled) == ("shop", False)
    assert world.workload_at(parse_ip("10.1.0.1")) is before


def test_addresses_without_a_pod_are_endpoints_that_own_no_address(cluster: Cluster) -> None:
    world = cluster.put(service("web"), piece("web-1", "web", ("", "192.0.2.1")))
    assert endpoints(world) == [("192.0.2.1", 8080)]
    assert world.workload_at(parse_ip("192.0.2.1")) is None
    gone = cluster.put(piece("web-1", "web"))
    assert endpoints(gone) == [] and gone.workloads == {}


def test_not_ready_endpoints_without_a_pod_are_unhealthy(cluster: Cluster) -> None:
    waiting = [{"addresses": ["192.0.2.1"], "conditions": {"ready": False}}]
    world = cluster.put(service("web"), piece("web-1", "web", endpoints=waiting))
    assert [w.status for w in world.workloads.values()] == [WorkloadStatus.UNHEALTHY]
    assert endpoints(world) == []
    assert endpoints(cluster.put(service("web", publishNotReadyAddresses=True))) == [("192.0.2.1", 8080)]


def test_an_address_given_to_a_new_pod_is_taken_from_the_ending_one(cluster: Cluster) -> None:
    ending = pod("old", "10.1.0.1", deletionTimestamp="2026-01-02T00:00:00Z", creationTimestamp="2026-01-01T00:00:00Z")
    for items in ([ending, pod("new", "10.1.0.1")], [pod("new", "10.1.0.1"), ending]):
        cluster = Cluster()
        world = cluster.put(*items)
        owner = world.workload_at(parse_ip("10.1.0.1"))
        assert owner is not None and owner.name == "new"
        assert cluster.workload("old").addresses == ()
        assert "10.1.0.1 belongs to shop/new" in str(cluster.translator.problems[0])
        world = cluster.remove(pod("new", "10.1.0.1"))
        owner = world.workload_at(parse_ip("10.1.0.1"))
        assert owner is not None and owner.name == "old" and cluster.translator.problems == ()


def test_an_ended_pod_leaves_the_world_and_its_address_free(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1"))
    assert cluster.put(pod("a", "10.1.0.1", phase="Succeeded")).workloads == {}
    assert cluster.put(pod("b", "10.1.0.1")).workload_at(parse_ip("10.1.0.1")) is not None
    assert cluster.translator.problems == ()


def test_host_network_pods_share_their_nodes_address_and_own_none(cluster: Cluster) -> None:
    world = cluster.put(pod("a", "192.0.2.1", host=True), pod("b", "192.0.2.1", host=True))
    assert len(world.workloads) == 2 and cluster.translator.problems == ()
    assert world.workload_at(parse_ip("192.0.2.1")) is None


def test_a_node_gives_its_pods_their_locality(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1"), node("n1", "z1"))
    assert cluster.workload("a").locality.zone == "z1"
    cluster.put(node("n1", "z2"))
    assert cluster.workload("a").locality.zone == "z2"
    cluster.remove(node("n1", "z2"))
    assert cluster.workload("a").locality.zone == ""


def test_a_policy_is_listed_by_the_workloads_it_selects(cluster: Cluster) -> None:
    app = {"selector": {"matchLabels": {"app": "x"}}}
    cluster.put(pod("a", "10.1.0.1", labels={"app": "x"}), pod("b", "10.1.0.2"))
    cluster.put(pod("c", "10.1.0.3", "bank", labels={"app": "x"}))
    cluster.put(authorization("p", **app), authorization("mesh", "istio-system", **app), authorization("ns"))
    assert cluster.workload("a").policies == ("istio-system/mesh", "shop/p")
    assert cluster.workload("b").policies == ()
    assert cluster.workload("c", "bank").policies == ("istio-system/mesh",)
    names = {p.key for p in cluster.world.policies_for(cluster.workload("a"))}
    assert names == {"istio-system/mesh", "shop/p", "shop/ns"}
    cluster.put(authorization("p", selector={"matchLabels": {"app": "y"}}))
    assert cluster.workload("a").policies == ("istio-system/mesh",)
    cluster.put(pod("a", "10.1.0.1", labels={"app": "y"}))
    assert cluster.workload("a").policies == ("shop/p",)
    cluster.remove(authorization("p"))
    assert cluster.workload("a").policies == () and "shop/p" not in cluster.world.policies


def test_strict_reaches_the_workloads_of_its_level_and_leaves_again(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1"), pod("b", "10.1.0.2", "bank"), peer("STRICT"))
    assert cluster.workload("a").policies == (STRICT,) and cluster.workload("b", "bank").policies == ()
    cluster.put(peer("STRICT", "istio-system"), peer("PERMISSIVE"))
    assert cluster.workload("a").policies == () and cluster.workload("b", "bank").policies == (STRICT,)
    cluster.remove(peer("STRICT", "istio-system"))
    assert cluster.workload("b", "bank").policies == ()


def test_the_strict_policy_is_known_before_any_workload_lists_it(cluster: Cluster) -> None:
    assert set(cluster.world.policies) == {STRICT}


def test_a_port_level_policy_comes_and_goes_with_its_object(cluster: Cluster) -> None:
    ports = {"selector": {"matchLabels": {"app": "x"}}, "portLevelMtls": {"80": {"mode": "PERMISSIVE"}}}
    cluster.put(pod("a", "10.1.0.1", labels={"app": "x"}), peer("UNSET", name="w", **ports))
    key = "shop/converted_peer_authentication_w"
    assert key not in cluster.world.policies and cluster.workload("a").policies == ()
    cluster.put(peer("STRICT", "istio-system"))  # now the port is an exception
    assert key in cluster.world.policies and cluster.workload("a").policies == (key,)
    cluster.remove(peer("UNSET", name="w"))
    assert key not in cluster.world.policies and cluster.workload("a").policies == (STRICT,)


def test_a_bad_policy_keeps_its_last_good_form_or_stands_closed(cluster: Cluster) -> None:
    good = cluster.put(authorization("p", action="DENY", rules=[{}])).policies["shop/p"]
    assert cluster.put(authorization("p", action="DENNY")).policies["shop/p"] == good
    assert "its last good form stays in force" in str(cluster.translator.problems[0])
    fresh = cluster.put(authorization("q", action="DENNY")).policies["shop/q"]
    assert (fresh.action, fresh.groups) == (Action.ALLOW, ())
    cluster.put(authorization("p"))
    cluster.remove(authorization("q"))
    assert cluster.translator.problems == ()


def test_a_bad_peer_authentication_keeps_its_last_good_form_or_is_strict(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1"), peer("PERMISSIVE"))
    cluster.put(peer("STRCT"))
    assert cluster.workload("a").policies == () and len(cluster.translator.problems) == 1
    cluster.remove(peer("STRCT"))
    cluster.put(peer("STRCT"))
    assert cluster.workload("a").policies == (STRICT,)


def test_what_never_was_good_stands_closed_for_whatever_it_selects_now(cluster: Cluster) -> None:
    cluster.put(pod("a", "10.1.0.1", labels={"app": "a"}), pod("b", "10.1.0.2", labels={"app": "b"}))
    a, b = ({"matchLabels": {"app": name}} for name in "ab")
    cluster.put(authorization("p", action="DENNY", selector=a), peer("STRCT", selector=a))
    assert cluster.workload("a").policies == (STRICT, "shop/p") and cluster.workload("b").policies == ()
    cluster.put(authorization("p", action="DENNY", selector=b), peer("STRCT", selector=b))
    assert cluster.workload("b").policies == (STRICT, "shop/p") and cluster.workload("a").policies == ()
    assert "until then it allows nothing" in str(cluster.translator.problems[0])
    # once good, it is the good form that stays
    cluster.put(authorization("p", action="DENY", selector=b), peer("PERMISSIVE", selector=b))
    cluster.put(authorization("p", action="DENNY", selector=a), peer("STRCT", selector=a))
    assert cluster.workload("b").policies == ("shop/p",) and cluster.workload("a").policies == ()


def test_a_policy_on_which_we_fail_ourselves_stands_closed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise TypeError("not ours")

    monkeypatch.setattr(policies, "convert", fail)
    monkeypatch.setattr(peer_authentication, "read", fail)
    cluster.put(pod("a", "10.1.0.1"), peer("PERMISSIVE"))
    fresh = cluster.put(authorization("p", rules=[{}])).policies["shop/p"]
    assert (fresh.action, fresh.groups) == (Action.ALLOW, ()) and cluster.workload("a").policies == (STRICT,)
    assert ["TypeError" in str(problem) for problem in cluster.translator.problems] == [True, True]


def test_a_bad_service_keeps_its_last_good_form_and_a_bad_pod_is_left_out(cluster: Cluster) -> None:
    cluster.put(service("web"), pod("a", "10.1.0.1"))
    world = cluster.put(service("web", clusterIP="nonsense"), pod("a", "10.1.0"), pod("b", "10.1.0.2", account="x/y"))
    assert [str(v) for v in world.services[WEB].vips] == ["10.96.0.9"]
    assert world.workloads == {}
    assert {p.where for p in cluster.translator.problems} == {"Service shop/web", "Pod shop/a", "Pod shop/b"}
    cluster.put(service("web"), pod("a", "10.1.0.1"), pod("b", "10.1.0.2"))
    assert cluster.translator.problems == () and len(cluster.world.workloads) == 2


def test_only_what_changed_is_said_to_have_changed(cluster: Cluster) -> None:
    cluster.put(service("web"), *(pod(f"p{n}", f"10.1.0.{n}") for n in range(1, 30)))
    cluster.put(piece("web-1", "web", *((f"p{n}", f"10.1.0.{n}") for n in range(1, 29))))
    before = cluster.objects["EndpointSlice", "shop/web-1"]
    after = piece("web-1", "web", *((f"p{n}", f"10.1.0.{n}") for n in range(1, 30)))
    cluster.translator.change(Changed(kinds.ENDPOINT_SLICE, after.key, before, after))
    assert [w.name for w in cluster.translator.take().workloads] == ["p29"]
    assert not cluster.translator.take()
    # the same pod again, as after a relist
    again = cluster.objects["Pod", "shop/p1"]
    cluster.translator.change(Changed(kinds.POD, again.key, again, again))
    assert not cluster.translator.take()


def test_a_change_of_one_pod_among_five_thousand_costs_little() -> None:
    cluster = Cluster()
    cluster.put(*(pod(f"p{n}", f"10.{n // 250}.0.{n % 250 + 1}", f"ns{n % 50}") for n in range(5000)))
    assert len(cluster.world.workloads) == 5000
    best = 1.0
    for n in range(5):
        item = pod("p77", "10.0.0.78", "ns27", labels={"app": str(n)})
        started = time.perf_counter()
        world = cluster.put(item)
        best = min(best, time.perf_counter() - started)
        assert world.workloads["Kubernetes//Pod/ns27/p77"].canonical_name == str(n)
    assert best < 0.02, f"{best * 1000:.1f} ms"


# -- no order of changes matters

names = st.sampled_from(["a", "b", "c"])
spaces = st.sampled_from(["shop", "bank", "istio-system"])
ips = st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3"])
labels = st.sampled_from([{}, {"app": "x"}, {"app": "y"}])
selectors = st.sampled_from([None, {"matchLabels": {"app": "x"}}])
items = st.one_of(
    st.builds(
        lambda name, ip, space, label, host, phase, ending: pod(
            name,
            ip,
            space,
            labels=label,
            host=host,
            phase=phase,
            **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if ending else {}),
        ),
        names,
        st.one_of(st.none(), ips),
        spaces,
        labels,
        st.booleans(),
        st.sampled_from(["Running", "Failed"]),
        st.booleans(),
    ),
    st.builds(
        lambda name, space, kind: service(name, space, type=kind),
        names,
        spaces,
        st.sampled_from(["ClusterIP", "ExternalName"]),
    ),
    st.builds(
        lambda name, of, who, space: piece(name, of, *who, namespace=space),
        names,
        names,
        st.lists(st.tuples(st.one_of(st.just(""), names), ips), max_size=3),
        spaces,
    ),
    st.builds(lambda name, space, selector: authorization(name, space, selector=selector), names, spaces, selectors),
    st.builds(
        lambda mode, space, name, selector, port: peer(
            mode, space, name, selector=selector, portLevelMtls={"80": {"mode": port}}
        ),
        st.sampled_from(["STRICT", "PERMISSIVE", "UNSET"]),
        spaces,
        names,
        selectors,
        st.sampled_from(["STRICT", "PERMISSIVE"]),
    ),
    st.builds(node, st.just("n1"), st.sampled_from(["z1", "z2"])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), items), max_size=25))
def test_the_world_depends_on_the_objects_and_not_on_their_history(steps: list[tuple[bool, bool, Any]]) -> None:
    cluster = Cluster()
    for remove, look, item in steps:
        if remove:
            old = cluster.objects.pop((kind_of(item).name, item.key), None)
            if old is not None:
                cluster.translator.change(Changed(kind_of(item), item.key, old, None))
        else:
            key = (kind_of(item).name, item.key)
            cluster.translator.change(Changed(kind_of(item), item.key, cluster.objects.get(key), item))
            cluster.objects[key] = item
        if look:
            cluster.translator.take()
    fresh, problems = translate(
        (Changed(kind_of(item), item.key, None, item) for item in cluster.objects.values()), MESH
    )
    assert cluster.world == fresh
    assert cluster.translator.problems == problems
    owned: dict[Any, str] = {}
    for workload in fresh.workloads.values():
        for address in () if workload.host_network else workload.addresses:
            assert owned.setdefault(address, workload.uid) == workload.uid
            assert fresh.workload_at(address) == workload == cluster.world.workload_at(address)
