"""Model objects survive the wire exactly, and what cannot be right is refused by resource and field."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.errors import PeerFault
from ambient.model.policy import Action, Connection, Policy, Scope
from ambient.model.workload import Service, Workload
from ambient.proto import authorization_pb2, discovery_pb2, workload_pb2
from ambient.xds.policies import decode_policy, encode_policy, stand_in
from ambient.xds.resources import Resource, decode_address, encode_service, encode_workload
from tests.support import worlds


def body(resource: Resource) -> bytes:
    response = discovery_pb2.DeltaDiscoveryResponse.FromString(resource.wire)
    assert [r.name for r in response.resources] == [resource.name]
    assert response.resources[0].version == resource.version
    return response.resources[0].resource.value


@given(worlds.workloads)
def test_a_workload_survives_the_wire(workload: Workload) -> None:
    resource = encode_workload(workload)
    assert decode_address(workload.uid, body(resource)) == workload
    assert resource.hbone == workload.enrolled


@given(worlds.services)
def test_a_service_survives_the_wire(service: Service) -> None:
    assert decode_address(service.key, body(encode_service(service))) == service


@given(worlds.policies)
def test_a_policy_survives_the_wire(policy: Policy) -> None:
    assert decode_policy(policy.key, body(encode_policy(policy))) == policy


@given(worlds.workloads, worlds.workloads)
def test_versions_differ_exactly_when_workloads_do(a: Workload, b: Workload) -> None:
    assert (encode_workload(a).version == encode_workload(b).version) == (a == b)


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_read_but_never_crashes(garbage: bytes) -> None:
    for read in (decode_address, decode_policy):
        try:
            read("a/b", garbage)
        except PeerFault as error:
            assert "a/b" in str(error)
    stand_in("a/b", garbage)


@given(worlds.workloads, st.data())
def test_a_damaged_workload_is_refused_or_read_but_never_crashes(workload: Workload, data: st.DataObject) -> None:
    raw = bytearray(body(encode_workload(workload)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_address(workload.uid, bytes(raw))
    except PeerFault as error:
        assert workload.uid in str(error)


def good_workload() -> workload_pb2.Address:
    address = workload_pb2.Address()
    address.workload.uid, address.workload.name, address.workload.namespace = "c//Pod/ns/a", "a", "ns"
    address.workload.addresses.append(bytes((10, 0, 0, 1)))
    address.workload.services["ns/svc"].ports.add(service_port=80, target_port=8080)
    return address


def test_the_good_workload_is_read_with_istios_defaults() -> None:
    workload = decode_address("c//Pod/ns/a", good_workload().SerializeToString())
    assert isinstance(workload, Workload)
    assert str(workload.identity) == "spiffe://cluster.local/ns/ns/sa/default"
    assert workload.capacity == 1


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("addresses", lambda w: w.addresses.append(b"\x01\x02\x03")),
        ("identity", lambda w: setattr(w, "service_account", "a/b")),
        ("identity", lambda w: setattr(w, "namespace", "")),
        ("identity", lambda w: setattr(w, "trust_domain", "UPPER")),
        ("uid", lambda w: setattr(w, "uid", "other")),
        ("status", lambda w: setattr(w, "status", 7)),
        ("tunnel_protocol", lambda w: setattr(w, "tunnel_protocol", 9)),
        ("tunnel_protocol", lambda w: setattr(w, "tunnel_protocol", 2)),
        ("workload_type", lambda w: setattr(w, "workload_type", 9)),
        ("network_mode", lambda w: setattr(w, "network_mode", 9)),
        ("service_port", lambda w: w.services["ns/svc"].ports.add(service_port=0, target_port=1)),
        ("target_port", lambda w: w.services["ns/svc"].ports.add(service_port=1, target_port=65536)),
        ("app_protocol", lambda w: w.services["ns/svc"].ports.add(service_port=1, app_protocol=77)),
        ("services", lambda w: w.services["svc"].ports.add(service_port=1)),
        ("authorization_policies", lambda w: w.authorization_policies.append("nothing")),
        ("waypoint", lambda w: w.waypoint.SetInParent()),
        (
            "waypoint",
            lambda w: (setattr(w.waypoint, "hbone_mtls_port", 1), setattr(w.waypoint.hostname, "hostname", "x")),
        ),
        ("network_gateway", lambda w: w.network_gateway.SetInParent()),
        ("application_tunnel", lambda w: setattr(w.application_tunnel, "protocol", 1)),
    ],
)
def test_a_bad_workload_is_refused_by_resource_and_field(field: str, spoil: object) -> None:
    address = good_workload()
    spoil(address.workload)  # type: ignore[operator]
    with pytest.raises(PeerFault, match=f"c//Pod/ns/a: .*{field}"):
        decode_address("c//Pod/ns/a", address.SerializeToString())


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("addresses", lambda s: s.addresses.add(address=b"12345")),
        ("addresses", lambda s: s.addresses.add(network="else", address=b"1234")),
        ("addresses", lambda s: setattr(s.addresses[0].length, "value", 24)),
        ("health_policy", lambda s: setattr(s.load_balancing, "health_policy", 5)),
        ("routing_preference", lambda s: s.load_balancing.routing_preference.append(0)),
        ("mode", lambda s: setattr(s.load_balancing, "mode", 99)),
        ("hostname", lambda s: setattr(s, "hostname", "other")),
        ("namespace", lambda s: setattr(s, "namespace", "")),
    ],
)
def test_a_bad_service_is_refused_by_resource_and_field(field: str, spoil: object) -> None:
    address = workload_pb2.Address()
    address.service.name, address.service.namespace, address.service.hostname = "a", "ns", "a.ns"
    address.service.addresses.add(address=bytes((10, 96, 0, 1)))
    assert isinstance(decode_address("ns/a.ns", address.SerializeToString()), Service)
    spoil(address.service)  # type: ignore[operator]
    with pytest.raises(PeerFault, match=f"ns/a.ns: .*{field}"):
        decode_address("ns/a.ns", address.SerializeToString())


def test_a_full_length_prefix_is_an_address() -> None:
    address = workload_pb2.Address()
    address.service.name, address.service.namespace, address.service.hostname = "a", "ns", "a.ns"
    address.service.addresses.add(address=bytes((10, 96, 0, 1))).length.value = 32
    service = decode_address("ns/a.ns", address.SerializeToString())
    assert isinstance(service, Service)
    assert service.vips == (ipaddress.ip_address("10.96.0.1"),)


def policy_message() -> authorization_pb2.Authorization:
    message = authorization_pb2.Authorization(name="p", namespace="ns", action=authorization_pb2.DENY)
    match = message.groups.add().rules.add().matches.add()
    match.source_ips.add(address=bytes((10, 0, 0, 0)), length=8)
    return message


@pytest.mark.parametrize(
    ("field", "spoil"),
    [
        ("source_ips", lambda m: m.groups[0].rules[0].matches[0].source_ips.add(address=b"123", length=1)),
        ("not_source_ips", lambda m: m.groups[0].rules[0].matches[0].not_source_ips.add(address=b"1234", length=33)),
        ("destination_ports", lambda m: m.groups[0].rules[0].matches[0].destination_ports.append(65536)),
        ("principals", lambda m: m.groups[0].rules[0].matches[0].principals.add()),
        ("scope", lambda m: setattr(m, "scope", 5)),
        ("action", lambda m: setattr(m, "action", 5)),
        ("name", lambda m: setattr(m, "name", "q")),
    ],
)
def test_a_bad_policy_is_refused_by_resource_and_field_and_its_stand_in_lets_nobody_in(
    field: str, spoil: object
) -> None:
    message = policy_message()
    assert decode_policy("ns/p", message.SerializeToString()).action is Action.DENY
    spoil(message)  # type: ignore[operator]
    with pytest.raises(PeerFault, match=f"ns/p: .*{field}"):
        decode_policy("ns/p", message.SerializeToString())
    substitute = stand_in("ns/p", message.SerializeToString())
    ip = ipaddress.ip_address("10.0.0.1")
    assert substitute is not None
    assert substitute.key == "ns/p"
    assert substitute.action is Action.DENY
    assert substitute.matches(Connection(None, ip, ip, 80))


def test_the_stand_in_of_a_bad_allow_allows_nothing_and_a_dry_run_needs_none() -> None:
    message = policy_message()
    message.action, message.scope = authorization_pb2.ALLOW, authorization_pb2.NAMESPACE
    message.groups[0].rules[0].matches[0].principals.add()
    substitute = stand_in("ns/p", message.SerializeToString())
    assert substitute == Policy("p", "ns", Scope.NAMESPACE, Action.ALLOW, ())
    message.dry_run = True
    assert stand_in("ns/p", message.SerializeToString()) is None


def test_a_mapped_range_is_the_ipv4_range() -> None:
    message = policy_message()
    mapped = ipaddress.ip_address("::ffff:10.1.0.0").packed
    message.groups[0].rules[0].matches[0].not_source_ips.add(address=mapped, length=112)
    match = decode_policy("ns/p", message.SerializeToString()).groups[0].rules[0].matches[0]
    assert match.not_source_ips == (ipaddress.ip_network("10.1.0.0/16"),)
