"""Services, their endpoints and the preference among them."""

from __future__ import annotations

from typing import Any

import pytest

from ambient.errors import ConfigFault
from ambient.manifest.kinds import ENDPOINT_SLICE, SERVICE
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import EndpointSlice, Service
from ambient.manifest.services import members_of, ports_served, service_of
from ambient.model.workload import AppProtocol, LoadBalancing, LoadBalancingMode, LoadBalancingScope, Port

R, Z, N, S, NODE = (
    LoadBalancingScope.REGION,
    LoadBalancingScope.ZONE,
    LoadBalancingScope.NETWORK,
    LoadBalancingScope.SUBZONE,
    LoadBalancingScope.NODE,
)


def service(annotations: dict[str, str] | None = None, **spec: Any) -> Service:
    spec = {"clusterIP": "10.96.0.9", "ports": [{"port": 80, "targetPort": 8080}]} | spec
    return SERVICE.convert(
        {"metadata": {"name": "cart", "namespace": "shop", "annotations": annotations}, "spec": spec}
    )


def piece(**changes: Any) -> EndpointSlice:
    labels = {"kubernetes.io/service-name": "cart"}
    value = {
        "metadata": {"name": "cart-x", "namespace": "shop", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": [
            {"addresses": ["10.1.0.4"], "targetRef": {"kind": "Pod", "name": "p1", "uid": "u1"}},
            {"addresses": ["10.1.0.5"], "conditions": {"ready": False}},
        ],
    }
    return ENDPOINT_SLICE.convert(value | changes)


def converted(item: Service) -> Any:
    made, problems = service_of(item, Mesh())
    assert made is not None and problems == ()
    return made


def test_a_service_has_its_names_addresses_and_tcp_ports() -> None:
    made = converted(
        service(
            clusterIPs=["10.96.0.9", "fd00::9"],
            ports=[
                {"port": 443, "name": "https"},
                {"port": 80, "targetPort": "web", "name": "http-web"},
                {"port": 53, "protocol": "UDP", "name": "dns"},
            ],
        )
    )
    assert made.key == "shop/cart.shop.svc.cluster.local"
    assert [str(v) for v in made.vips] == ["10.96.0.9", "fd00::9"]
    assert made.ports == (Port(80, 0, AppProtocol.HTTP11), Port(443, 443, AppProtocol.TLS))
    assert made.subject_alt_names == ()


def test_a_headless_service_has_no_address() -> None:
    assert converted(service(clusterIP="None", clusterIPs=["None"])).vips == ()


@pytest.mark.parametrize(
    ("families", "four", "six"),
    [(["IPv4"], True, False), (["IPv6"], False, True), (["IPv6", "IPv4"], True, True), (None, True, True)],
)
def test_a_headless_service_says_by_its_families_which_addresses_are_meant(
    families: list[str] | None, four: bool, six: bool
) -> None:
    made = converted(service(clusterIP="None", clusterIPs=["None"], ipFamilies=families))
    assert (made.families.accepts(4), made.families.accepts(6)) == (four, six)


def test_an_external_name_is_left_out_with_a_notice() -> None:
    made, problems = service_of(service(type="ExternalName", externalName="example.org"), Mesh())
    assert made is None
    assert [p.notice for p in problems] == [True] and problems[0].where == "Service shop/cart"


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"clusterIP": "10.96.0"}, r"Service shop/cart: spec.clusterIPs\[0\]"),
        ({"ports": [{"port": 0}]}, r"Service shop/cart: spec.ports\[0\].port"),
        ({"ports": [{"port": 80}, {"port": 65536}]}, r"Service shop/cart: spec.ports\[1\].port"),
        ({"ports": [{"port": 80, "targetPort": 70000}]}, r"Service shop/cart: spec.ports\[0\].targetPort"),
    ],
)
def test_a_bad_field_is_named(spec: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigFault, match=where):
        service_of(service(**spec), Mesh())


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        ({"name": "grpc-api"}, AppProtocol.GRPC),
        ({"name": "http2"}, AppProtocol.HTTP2),
        ({"name": "mongo"}, AppProtocol.UNKNOWN),
        ({"name": "httpx"}, AppProtocol.UNKNOWN),
        ({"name": "tcp-db"}, AppProtocol.TCP),
        ({"name": "grpc", "appProtocol": "kubernetes.io/h2c"}, AppProtocol.HTTP2),
        ({"name": "grpc", "appProtocol": "example.org/other"}, AppProtocol.UNKNOWN),
    ],
)
def test_the_protocol_comes_from_app_protocol_else_from_the_name(port: dict[str, str], expected: AppProtocol) -> None:
    assert converted(service(ports=[{"port": 80} | port])).ports[0].app_protocol is expected


@pytest.mark.parametrize(
    ("spec", "annotations", "expected"),
    [
        ({}, None, LoadBalancing()),
        ({"internalTrafficPolicy": "Cluster"}, None, LoadBalancing()),
        ({"internalTrafficPolicy": "Local"}, None, LoadBalancing((NODE,), LoadBalancingMode.STRICT)),
        ({"trafficDistribution": "PreferClose"}, None, LoadBalancing((N, R, Z), LoadBalancingMode.FAILOVER)),
        ({"trafficDistribution": "PreferSameZone"}, None, LoadBalancing((N, R, Z), LoadBalancingMode.FAILOVER)),
        (
            {"trafficDistribution": "PreferSameNode"},
            None,
            LoadBalancing((N, R, Z, S, NODE), LoadBalancingMode.FAILOVER),
        ),
        (
            {"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"},
            None,
            LoadBalancing((NODE,), LoadBalancingMode.STRICT),
        ),
        (
            {},
            {"networking.istio.io/traffic-distribution": "PreferSameZone"},
            LoadBalancing((N, R, Z), LoadBalancingMode.FAILOVER),
        ),
        ({"publishNotReadyAddresses": True}, None, LoadBalancing(allow_unhealthy=True)),
    ],
)
def test_traffic_policies_become_endpoint_preferences(
    spec: dict[str, Any], annotations: dict[str, str] | None, expected: LoadBalancing
) -> None:
    assert converted(service(annotations, **spec)).load_balancing == expected


def test_an_unknown_distribution_is_reported_and_endpoints_are_chosen_evenly() -> None:
    made, problems = service_of(service(trafficDistribution="PreferMoon"), Mesh())
    assert made is not None and made.load_balancing == LoadBalancing()
    assert problems[0].field == "spec.trafficDistribution" and "PreferMoon" in problems[0].rule


def test_a_slice_names_pods_with_their_tcp_ports() -> None:
    first, second = members_of(piece())
    assert (first.service, first.pod, first.pod_uid, first.ready) == ("shop/cart", "shop/p1", "u1", True)
    assert first.ports == (("web", 8080),)
    assert (second.pod, second.ready, str(second.addresses[0])) == ("", False, "10.1.0.5")


@pytest.mark.parametrize(
    "changes",
    [
        {"addressType": "FQDN", "endpoints": [{"addresses": ["example.org"]}]},
        {"metadata": {"name": "x", "namespace": "shop"}},
        {"endpoints": None},
    ],
)
def test_a_slice_of_host_names_or_of_no_service_has_no_members(changes: dict[str, Any]) -> None:
    assert members_of(piece(**changes)) == ()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"endpoints": [{"addresses": ["example.org"]}]}, r"EndpointSlice shop/cart-x: endpoints\[0\].addresses"),
        ({"ports": [{"name": "web", "port": 70000}]}, r"EndpointSlice shop/cart-x: ports\[0\].port"),
    ],
)
def test_a_bad_slice_is_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigFault, match=where):
        members_of(piece(**changes))


def test_a_named_target_port_is_what_the_slice_resolved() -> None:
    item = service(ports=[{"port": 80, "targetPort": "http", "name": "web"}, {"port": 81, "name": "missing"}])
    assert ports_served(item, members_of(piece())[:1]) == (Port(80, 8080, AppProtocol.UNKNOWN),)


def test_a_slice_port_without_number_serves_the_service_port_itself() -> None:
    item = service(ports=[{"port": 80, "name": "web"}])
    assert ports_served(item, members_of(piece(ports=[{"name": "web"}]))[:1]) == (Port(80, 80),)
