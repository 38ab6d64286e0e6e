"""Hypothesis strategies for the objects of a World, in the form the wire keeps."""

from __future__ import annotations

import ipaddress

from hypothesis import strategies as st

from ambient.model.address import fold
from ambient.model.policy import (
    Action,
    Group,
    Match,
    MatchKind,
    Policy,
    Rule,
    Scope,
    ServiceAccountMatch,
    StringMatch,
)
from ambient.model.workload import (
    AddressFamilies,
    AppProtocol,
    GatewayAddress,
    LoadBalancing,
    LoadBalancingMode,
    LoadBalancingScope,
    Locality,
    Port,
    Service,
    TunnelProtocol,
    Workload,
    WorkloadStatus,
    WorkloadType,
)
from ambient.model.world import World

labels = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
texts = st.text(max_size=12).filter(lambda text: text.isprintable())
ips = st.ip_addresses().map(fold)
ports = st.builds(Port, st.integers(1, 65535), st.integers(0, 65535), st.sampled_from(AppProtocol))
port_lists = st.lists(ports, max_size=3).map(tuple)
keys = st.builds("{}/{}".format, labels, labels)
gateways = st.builds(GatewayAddress, st.one_of(keys, ips), st.integers(1, 65535))


def tuples(elements: st.SearchStrategy, most: int = 3) -> st.SearchStrategy:
    return st.lists(elements, max_size=most, unique=True).map(tuple)


workloads = st.builds(
    Workload,
    uid=st.builds("c//Pod/{}/{}".format, labels, labels),
    name=labels,
    namespace=labels,
    addresses=tuples(ips),
    node=labels,
    service_account=labels,
    trust_domain=st.sampled_from(("cluster.local", "other.example")),
    protocol=st.sampled_from(TunnelProtocol),
    status=st.sampled_from(WorkloadStatus),
    services=st.dictionaries(keys, port_lists, max_size=3).map(lambda found: tuple(sorted(found.items()))),
    policies=tuples(keys),
    hostname=texts,
    network=st.sampled_from(("", "net-2")),
    cluster_id=texts,
    canonical_name=texts,
    canonical_revision=texts,
    workload_name=texts,
    workload_type=st.sampled_from(WorkloadType),
    host_network=st.booleans(),
    native_tunnel=st.booleans(),
    waypoint=st.one_of(st.none(), gateways),
    locality=st.builds(Locality, texts, texts, texts),
    capacity=st.integers(0, 2**32 - 1),
)


def _service(name: str, namespace: str, vips: tuple, network: str, **more: object) -> Service:
    # a service without an address has no network on the wire
    return Service(name, namespace, f"{name}.{namespace}.svc", vips, network=network if vips else "", **more)


services = st.builds(
    _service,
    name=labels,
    namespace=labels,
    vips=tuples(ips),
    network=st.just(""),
    ports=port_lists,
    families=st.sampled_from(AddressFamilies),
    subject_alt_names=tuples(texts),
    load_balancing=st.builds(
        LoadBalancing, tuples(st.sampled_from(LoadBalancingScope)), st.sampled_from(LoadBalancingMode), st.booleans()
    ),
    waypoint=st.one_of(st.none(), gateways),
)


@st.composite
def networks(draw: st.DrawFn) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    address = draw(ips)
    length = draw(st.integers(0, address.max_prefixlen))
    network = ipaddress.ip_network((address, length), strict=False)
    if network.version == 6 and network.network_address.ipv4_mapped is not None and length >= 96:
        return ipaddress.ip_network((network.network_address.ipv4_mapped, length - 96), strict=False)
    return network


strings = st.one_of(
    st.just(StringMatch(MatchKind.PRESENCE)),
    st.builds(StringMatch, st.sampled_from((MatchKind.EXACT, MatchKind.PREFIX, MatchKind.SUFFIX)), texts),
)
accounts = st.builds(ServiceAccountMatch, labels, labels)
policy_ports = st.integers(1, 65535)
matches = st.builds(
    Match,
    namespaces=tuples(strings, 2),
    not_namespaces=tuples(strings, 2),
    principals=tuples(strings, 2),
    not_principals=tuples(strings, 2),
    source_ips=tuples(networks(), 2),
    not_source_ips=tuples(networks(), 2),
    destination_ips=tuples(networks(), 2),
    not_destination_ips=tuples(networks(), 2),
    destination_ports=tuples(policy_ports, 2),
    not_destination_ports=tuples(policy_ports, 2),
    service_accounts=tuples(accounts, 2),
    not_service_accounts=tuples(accounts, 2),
)
policies = st.builds(
    Policy,
    name=labels,
    namespace=labels,
    scope=st.sampled_from(Scope),
    action=st.sampled_from(Action),
    groups=tuples(st.builds(Group, tuples(st.builds(Rule, tuples(matches, 2)), 2)), 2),
    dry_run=st.booleans(),
)


def _one_of_few(strategy: st.SearchStrategy, field: str, most: int) -> st.SearchStrategy:
    """Lists whose members differ in ``field``."""
    return st.lists(strategy, max_size=most, unique_by=lambda item: getattr(item, field))


_small_names = st.sampled_from(("a", "b", "c", "d"))
_small_workloads = st.builds(
    lambda name, n, policy, protocol, service, node: Workload(
        f"c//Pod/ns/{name}",
        name,
        "ns",
        addresses=(ipaddress.ip_address(f"10.0.0.{n}"),),
        policies=(f"ns/{policy}",) if policy else (),
        protocol=protocol,
        services=((f"ns/{service}.ns.svc", (Port(80, 8080),)),) if service else (),
        node=node,
    ),
    _small_names,
    st.integers(1, 4),
    st.one_of(st.none(), _small_names),
    st.sampled_from(TunnelProtocol),
    st.one_of(st.none(), _small_names),
    st.sampled_from(("n1", "n2")),
)
_small_services = st.builds(
    lambda name, n: Service(name, "ns", f"{name}.ns.svc", (ipaddress.ip_address(f"10.96.0.{n}"),), (Port(80, 8080),)),
    _small_names,
    st.integers(1, 4),
)
_small_policies = st.builds(
    lambda name, action, group: Policy(name, "ns", Scope.WORKLOAD_SELECTOR, action, (Group(),) if group else ()),
    _small_names,
    st.sampled_from(Action),
    st.booleans(),
)
small_worlds = st.builds(
    World.of,
    _one_of_few(_small_workloads, "uid", 4),
    _one_of_few(_small_services, "key", 3),
    _one_of_few(_small_policies, "key", 4),
)
"""Worlds over few names, so that sequences of them add, change and remove the same objects."""
