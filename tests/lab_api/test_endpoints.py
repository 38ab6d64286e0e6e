"""Slices of endpoints as tables, and those of a store following its pods and services."""

from __future__ import annotations

from typing import Any

import pytest

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import DEPLOYMENT, ENDPOINT_SLICE, POD, SERVICE
from ambient.lab.apiserver.store import Store
from ambient.lab.controllers.endpoints import desired_slices
from tests.lab_api.objects import deployment, pod, report, report_all, running, service, settle


def member(name: str, *addresses: str, ready: bool = True, **extra: Any) -> dict[str, Any]:
    made = pod(name, nodeName="n1")
    made["metadata"].update(namespace="default", uid=f"uid-{name}", labels={"app": "web"})
    made["metadata"].update(extra)
    made["status"] = running(*addresses, ready=ready)
    return made


def endpoints(obj: Any, pods: Any) -> dict[Any, Any]:
    return {
        (family, tuple(port[:2] for port in ports)): [(e["addresses"][0], e["conditions"]) for e in found]
        for (family, ports), found in desired_slices(obj, pods, {}).items()
    }


def conditions(ready: bool, serving: bool, terminating: bool) -> dict[str, bool]:
    return {"ready": ready, "serving": serving, "terminating": terminating}


def stored(**spec: Any) -> dict[str, Any]:
    made = service(**spec)
    made["spec"].setdefault("ipFamilies", ["IPv4"])
    for port in made["spec"]["ports"]:
        port.setdefault("protocol", "TCP")
    return made


GOING = {"deletionTimestamp": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("spec", "made", "expected"),
    [
        ({}, member("a", "10.0.0.1"), conditions(True, True, False)),
        ({}, member("a", "10.0.0.1", ready=False), conditions(False, False, False)),
        ({}, member("a", "10.0.0.1", **GOING), conditions(False, True, True)),
        ({}, member("a", "10.0.0.1", ready=False, **GOING), conditions(False, False, True)),
        (
            {"publishNotReadyAddresses": True},
            member("a", "10.0.0.1", ready=False),
            conditions(True, False, False),
        ),
    ],
)
def test_conditions_tell_ready_serving_and_terminating(spec: Any, made: Any, expected: Any) -> None:
    assert endpoints(stored(**spec), [made]) == {("IPv4", (("", 8080),)): [("10.0.0.1", expected)]}


def test_pods_that_ended_have_no_address_or_other_labels_are_no_endpoints() -> None:
    ended = member("a", "10.0.0.1")
    ended["status"]["phase"] = "Succeeded"
    bare = member("b", "10.0.0.2")
    bare["status"].update(podIP="", podIPs=[])
    other = member("c", "10.0.0.3", labels={"app": "other"})
    assert endpoints(stored(), [ended, bare, other]) == {("IPv4", ()): []}


def test_each_family_has_its_own_slice() -> None:
    both = member("a", "10.0.0.1", "fd00::1")
    found = endpoints(stored(ipFamilies=["IPv6", "IPv4"]), [both, member("b", "10.0.0.2")])
    assert [address for address, _ in found["IPv6", (("", 8080),)]] == ["fd00::1"]
    assert [address for address, _ in found["IPv4", (("", 8080),)]] == ["10.0.0.1", "10.0.0.2"]


def test_a_named_target_port_is_found_in_each_pod() -> None:
    def named(name: str, address: str, number: int) -> Any:
        made = member(name, address)
        made["spec"]["containers"][0]["ports"] = [{"name": "web", "containerPort": number, "protocol": "TCP"}]
        return made

    pods = [named("a", "10.0.0.1", 8080), named("b", "10.0.0.2", 9090), member("c", "10.0.0.3")]
    found = endpoints(stored(ports=[{"name": "http", "port": 80, "targetPort": "web"}]), pods)
    assert {key[1][0]: [a for a, _ in value] for key, value in found.items()} == {
        ("http", 8080): ["10.0.0.1"],
        ("http", 9090): ["10.0.0.2"],
    }


def test_slices_follow_pods_and_go_with_the_service(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    (piece,) = two_nodes.all(ENDPOINT_SLICE)
    assert piece["metadata"]["labels"]["kubernetes.io/service-name"] == "web"
    assert piece["endpoints"] == []
    report_all(two_nodes)
    settle(two_nodes)
    (piece,) = two_nodes.all(ENDPOINT_SLICE)
    assert len(piece["endpoints"]) == 2 and piece["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
    version = piece["metadata"]["resourceVersion"]
    settle(two_nodes)
    assert two_nodes.all(ENDPOINT_SLICE)[0]["metadata"]["resourceVersion"] == version
    two_nodes.delete(SERVICE, "default", "web")
    settle(two_nodes)
    assert two_nodes.all(ENDPOINT_SLICE) == []


def test_the_older_endpoints_object_says_the_same(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    two_nodes.create(DEPLOYMENT, "default", deployment(replicas=2))
    settle(two_nodes)
    assert "subsets" not in two_nodes.get(schema.ENDPOINTS, "default", "web")
    first, second = (obj["metadata"]["name"] for obj in two_nodes.all(POD))
    report(two_nodes, first)
    report(two_nodes, second, ready=False)
    settle(two_nodes)
    (subset,) = two_nodes.get(schema.ENDPOINTS, "default", "web")["subsets"]
    assert [address["targetRef"]["name"] for address in subset["addresses"]] == [first]
    assert [address["targetRef"]["name"] for address in subset["notReadyAddresses"]] == [second]
    assert subset["ports"] == [{"port": 8080, "protocol": "TCP"}]
    two_nodes.delete(SERVICE, "default", "web")
    settle(two_nodes)
    assert two_nodes.find(schema.ENDPOINTS, "default", "web") is None


def test_endpoints_made_by_hand_are_left_alone(two_nodes: Store) -> None:
    by_hand = {"metadata": {"name": "web"}, "subsets": [{"addresses": [{"ip": "192.0.2.1"}]}]}
    two_nodes.create(schema.ENDPOINTS, "default", by_hand)
    two_nodes.create(SERVICE, "default", service())
    settle(two_nodes)
    assert two_nodes.get(schema.ENDPOINTS, "default", "web")["subsets"] == by_hand["subsets"]


def test_a_service_without_a_selector_keeps_slices_made_by_hand(two_nodes: Store) -> None:
    body = service()
    del body["spec"]["selector"]
    two_nodes.create(SERVICE, "default", body)
    by_hand = {
        "metadata": {"name": "hand", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["192.0.2.1"]}],
    }
    two_nodes.create(ENDPOINT_SLICE, "default", by_hand)
    settle(two_nodes)
    assert [piece["metadata"]["name"] for piece in two_nodes.all(ENDPOINT_SLICE)] == ["hand"]


def test_more_than_a_hundred_endpoints_need_more_slices(two_nodes: Store) -> None:
    two_nodes.create(SERVICE, "default", service())
    for number in range(150):
        body = pod(f"p{number:03}", nodeName="n1")
        body["metadata"]["labels"] = {"app": "web"}
        two_nodes.create(POD, "default", body)
        status = running(f"10.0.{number // 100}.{number % 100}")
        two_nodes.modify(POD, "default", f"p{number:03}", lambda o, s=status: o.update(status=s), subresource="status")
    settle(two_nodes)
    assert sorted(len(piece["endpoints"]) for piece in two_nodes.all(ENDPOINT_SLICE)) == [50, 100]
