"""Services as nftables rules: which endpoints, which masquerade, and that the kernel takes the script."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from ambient.lab.objects import SERVICE, LabService
from ambient.lab.service_rules import backends, render
from ambient.lab.topology import Lab
from ambient.manifest.kinds import ENDPOINT_SLICE
from ambient.manifest.objects import EndpointSlice, ServicePort
from tests.support.require import require

NODE = Lab("rules").node(1)


def service(name: str = "web", **spec: Any) -> LabService:
    spec = {"clusterIP": "10.96.0.5", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]} | spec
    return SERVICE.convert({"metadata": {"name": name, "namespace": "shop"}, "spec": spec})


def slice_of(*addresses: str, name: str = "web", ready: bool | None = True, node: str = "node2") -> EndpointSlice:
    return ENDPOINT_SLICE.convert(
        {
            "metadata": {
                "name": f"{name}-{'6' if ':' in addresses[0] else '4'}{node}{ready}",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": name},
            },
            "addressType": "IPv6" if ":" in addresses[0] else "IPv4",
            "endpoints": [{"addresses": [a], "conditions": {"ready": ready}, "nodeName": node} for a in addresses],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }
    )


def script(*slices: EndpointSlice, **spec: Any) -> str:
    return render(NODE, {"shop/web": service(**spec)}, slices)


def test_a_cluster_address_is_translated_to_every_ready_endpoint() -> None:
    text = script(slice_of("10.244.2.2", "10.244.2.3"), slice_of("10.244.2.4", ready=False))
    assert "numgen random mod 2 map { 0 : 10.244.2.2 . 8080, 1 : 10.244.2.3 . 8080 }" in text
    assert "10.96.0.5 . tcp . 80 : goto s0" in text
    assert "10.244.2.4" not in text


def test_an_endpoint_without_a_ready_condition_is_ready() -> None:
    assert backends([slice_of("10.244.2.2", ready=None)], ServicePort(name="http", port=80), 4)


def test_endpoints_of_another_port_name_are_not_used() -> None:
    assert not backends([slice_of("10.244.2.2")], ServicePort(name="other", port=80), 4)


def test_a_service_without_endpoints_refuses() -> None:
    text = script()
    assert "elements = { 10.96.0.5 . tcp . 80 }" in text
    assert "dnat" not in text


def test_a_node_port_is_masqueraded_and_a_local_one_is_not() -> None:
    spec = {"type": "NodePort", "ports": [{"name": "http", "port": 80, "nodePort": 30080}]}
    wide = script(slice_of("10.244.2.2"), slice_of("10.244.1.2", node="node1"), **spec)
    assert "tcp . 30080 : goto n" in wide and "meta mark set meta mark or 0x4000" in wide
    local = script(slice_of("10.244.2.2"), slice_of("10.244.1.2", node="node1"), **spec, externalTrafficPolicy="Local")
    assert "meta mark set" not in local
    assert "numgen random mod 1 map { 0 : 10.244.1.2 . 8080 }" in local


def test_a_local_policy_without_a_local_endpoint_refuses() -> None:
    text = script(slice_of("10.244.2.2"), internalTrafficPolicy="Local")
    assert "goto s" not in text and "elements = { 10.96.0.5 . tcp . 80 }" in text


def test_each_family_has_its_own_endpoints() -> None:
    text = script(slice_of("10.244.2.2"), slice_of("fd00:244:0:2::2"), clusterIPs=["10.96.0.5", "fd00:96::5"])
    assert "dnat ip to numgen random mod 1 map { 0 : 10.244.2.2 . 8080 }" in text
    assert "dnat ip6 to numgen random mod 1 map { 0 : fd00:244:0:2::2 . 8080 }" in text


@pytest.mark.parametrize("spec", [{"clusterIP": "None"}, {"clusterIP": "", "type": "ExternalName"}])
def test_headless_and_external_services_have_no_rules(spec: dict[str, Any]) -> None:
    assert "elements" not in script(slice_of("10.244.2.2"), **spec)


def test_an_ignored_address_has_no_rules() -> None:
    text = render(NODE, {"shop/web": service()}, [slice_of("10.244.2.2")], frozenset({"10.96.0.5"}))
    assert "10.96.0.5" not in text


@pytest.fixture
def netns() -> Iterator[str]:
    require("net")
    name = f"al-rules{os.getpid()}-p0123456789"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.net
@pytest.mark.parametrize("slices", [[], [slice_of("10.244.2.2", "10.244.1.2"), slice_of("fd00:244:0:2::2")]])
def test_the_kernel_takes_the_script_and_takes_it_again(netns: str, slices: list[EndpointSlice]) -> None:
    spec = {
        "type": "NodePort",
        "clusterIPs": ["10.96.0.5", "fd00:96::5"],
        "ports": [
            {"name": "http", "port": 80, "nodePort": 30080},
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
        ],
    }
    for sticky in ("None", "ClientIP"):
        text = script(*slices, **spec, sessionAffinity=sticky)
        for _ in range(2):
            done = subprocess.run(
                ["nsenter", f"--net=/run/netns/{netns}", "nft", "-f", "-"], input=text, text=True, capture_output=True
            )
            assert done.returncode == 0, done.stderr
