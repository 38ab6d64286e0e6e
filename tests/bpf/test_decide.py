"""The decisions of the hooks, compiled by gcc and called with values: for each accept a reject."""

from __future__ import annotations

import ctypes
import ipaddress
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath.layout import LAYOUT, source_directory
from ambient.datapath.values import (
    AuthorizedValue,
    Range,
    SettingsValue,
    VerdictValue,
    WorkloadValue,
    address_bytes,
    address_text,
    network_range,
)
from tests.support.require import require

CLASSES = LAYOUT.classes
NOW = 10**12
ENROLLED, LOCAL, WAYPOINT = (LAYOUT[f"WORKLOAD_{name}"] for name in ("ENROLLED", "LOCAL", "WAYPOINT"))


class Outbound(ctypes.Structure):
    _fields_ = [
        ("target", CLASSES["address"]),
        ("port", ctypes.c_uint16),
        ("stream", ctypes.c_uint8),
        ("exempt", ctypes.c_uint8),
        ("workload_known", ctypes.c_uint8),
        ("service_known", ctypes.c_uint8),
        ("in_cluster", ctypes.c_uint8),
        ("pad", ctypes.c_uint8),
        ("workload_flags", ctypes.c_uint32),
        ("enrolled_flags", ctypes.c_uint32),
        ("now_ns", ctypes.c_uint64),
    ]


@pytest.fixture(scope="session")
def decide(tmp_path_factory):
    require("gcc")
    library = tmp_path_factory.mktemp("decide") / "decide.so"
    shim = Path(__file__).parent / "decide_shim.c"
    include = source_directory() / "include"
    flags = ["-O2", "-Wall", "-Wextra", "-Wno-sign-compare", "-Wno-unused-parameter", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-I", include, "-o", library, shim], check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.call_outbound_size() == ctypes.sizeof(Outbound)
    return loaded


def address(text: str):
    return ctypes.byref(CLASSES["address"].from_buffer_copy(address_bytes(text)))


def settings(**changes):
    value = SettingsValue(**({"complete": 1, "heartbeat_ns": NOW} | changes))
    return ctypes.byref(CLASSES["settings_value"].from_buffer_copy(value.encode()))


def reason(decide, target: str, port: int = 80, *, with_settings=None, **facts) -> str:
    out = Outbound(port=port, stream=1, now_ns=NOW)
    out.target = CLASSES["address"].from_buffer_copy(address_bytes(target))
    if "workload_flags" in facts:
        facts["workload_known"] = 1
    for name, value in facts.items():
        setattr(out, name, value)
    number = decide.call_decide_outbound(ctypes.byref(out), with_settings or settings())
    return LAYOUT.names("reason")[number].removeprefix("REASON_")


UNSYNCED = {"complete": 0}
STALE = {"heartbeat_timeout_s": 30, "heartbeat_ns": NOW - 31 * 10**9}
FRESH = {"heartbeat_timeout_s": 30, "heartbeat_ns": NOW - 29 * 10**9}


@pytest.mark.parametrize(
    "target, port, facts, changes, expected",
    [
        # who is in the mesh
        ("10.0.0.1", 80, {"workload_flags": ENROLLED}, {}, "CAPTURED"),
        ("fd00::1", 80, {"workload_flags": ENROLLED}, {}, "CAPTURED"),
        ("10.0.0.1", 80, {"workload_flags": 0}, {}, "NOT_MESH"),
        ("10.0.0.1", 80, {"workload_flags": LOCAL}, {}, "NOT_MESH"),
        ("10.0.0.1", 80, {"workload_flags": WAYPOINT}, {}, "CAPTURED"),
        ("10.0.0.1", 80, {"workload_flags": 0, "in_cluster": 1}, {}, "NOT_MESH"),
        ("10.0.0.1", 80, {"workload_flags": 0, "service_known": 1}, {}, "CAPTURED"),
        ("10.0.0.1", 80, {"service_known": 1}, {}, "CAPTURED"),
        ("10.0.0.1", 80, {"in_cluster": 1}, {}, "CAPTURED"),
        ("10.0.0.1", 80, {}, {}, "NOT_MESH"),
        # before the maps are complete nothing counts as known to be outside
        ("10.0.0.1", 80, {"workload_flags": 0}, UNSYNCED, "NOT_SYNCED"),
        ("10.0.0.1", 80, {}, UNSYNCED, "NOT_SYNCED"),
        ("10.0.0.1", 80, {"workload_flags": ENROLLED}, UNSYNCED, "CAPTURED"),
        # what nobody else can reach for the pod
        ("127.0.0.1", 80, {}, UNSYNCED, "LOOPBACK"),
        ("127.255.0.1", 80, {}, {}, "LOOPBACK"),
        ("::1", 80, {}, UNSYNCED, "LOOPBACK"),
        ("::2", 80, {}, {}, "NOT_MESH"),
        ("fe80::1", 80, {}, UNSYNCED, "NOT_MESH"),
        ("fec0::1", 80, {}, UNSYNCED, "NOT_SYNCED"),
        ("169.254.169.254", 80, {}, UNSYNCED, "NOT_SYNCED"),
        # exempt
        ("10.0.0.1", 80, {"workload_flags": ENROLLED, "exempt": 1}, {}, "EXEMPT"),
        ("127.0.0.1", 15001, {"exempt": 1}, {}, "EXEMPT"),
        # the recursion guard
        ("127.0.0.1", 15001, {}, {}, "RECURSION"),
        ("::1", 15006, {}, {}, "RECURSION"),
        ("10.0.0.1", 15008, {"workload_flags": ENROLLED}, {}, "RECURSION"),
        ("10.0.0.1", 15008, {"workload_flags": 0}, {}, "NOT_MESH"),
        ("10.0.0.1", 15008, {}, {}, "NOT_MESH"),
        ("10.0.0.1", 15007, {"workload_flags": ENROLLED}, {}, "CAPTURED"),
        ("127.0.0.1", 15053, {}, {}, "LOOPBACK"),
        ("127.0.0.1", 15001, {"stream": 0}, {}, "LOOPBACK"),
        ("127.0.0.1", 15001, {}, {"mode": 1}, "RECURSION"),
        # bypass and open on failure
        ("10.0.0.1", 80, {"workload_flags": ENROLLED}, {"mode": 1}, "BYPASS"),
        ("10.0.0.1", 53, {}, {"mode": 1}, "BYPASS"),
        ("10.0.0.1", 80, {"workload_flags": ENROLLED, "enrolled_flags": LAYOUT["ENROLLED_BYPASS"]}, {}, "BYPASS"),
        ("10.0.0.1", 80, {"workload_flags": ENROLLED, "enrolled_flags": LAYOUT["ENROLLED_OPEN"]}, STALE, "BYPASS"),
        ("10.0.0.1", 80, {"workload_flags": ENROLLED, "enrolled_flags": LAYOUT["ENROLLED_OPEN"]}, FRESH, "CAPTURED"),
        ("10.0.0.1", 80, {"workload_flags": ENROLLED}, STALE, "CAPTURED"),
        # DNS
        ("10.0.0.1", 53, {}, {}, "DNS"),
        ("10.0.0.1", 53, {"stream": 0}, {}, "DNS"),
        ("8.8.8.8", 53, {"stream": 0}, UNSYNCED, "DNS"),
        ("127.0.0.1", 53, {"stream": 0}, {}, "LOOPBACK"),
        ("10.0.0.1", 53, {"stream": 0, "exempt": 1}, {}, "EXEMPT"),
        ("10.0.0.1", 80, {"stream": 0, "workload_flags": ENROLLED}, {}, "NONE"),
    ],
)
def test_what_happens_to_a_connect(decide, target, port, facts, changes, expected):
    assert reason(decide, target, port, with_settings=settings(**changes), **facts) == expected


@given(
    target=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    port=st.integers(0, 65535),
    flags=st.integers(0, 63),
    stream=st.booleans(),
)
def test_an_enrolled_destination_is_never_left_alone_while_capturing(decide, target, port, flags, stream):
    found = reason(decide, str(target), port, workload_flags=flags | ENROLLED, stream=int(stream))
    if address_text(address_bytes(str(target))) and decide.call_is_loopback(address(str(target))):
        assert found in ("LOOPBACK", "RECURSION")
    elif stream:
        assert found in ("CAPTURED", "DNS", "RECURSION")
    else:
        assert found in ("NONE", "DNS")


class TestAddresses:
    @given(st.ip_addresses())
    def test_loopback_any_and_family_are_what_python_says(self, decide, ip):
        text = str(ip)
        mapped = getattr(ip, "ipv4_mapped", None)
        real = mapped or ip
        assert bool(decide.call_is_loopback(address(text))) == real.is_loopback
        assert bool(decide.call_is_any(address(text))) == (int(real) == 0)
        assert bool(decide.call_is4(address(text))) == (real.version == 4)

    @pytest.mark.parametrize(
        "text", ["127.0.0.1", "::1", "0.0.0.0", "::", "128.0.0.1", "::ffff:127.0.0.1", "126.0.0.1"]
    )
    def test_the_edges(self, decide, text):
        test: Any = self.test_loopback_any_and_family_are_what_python_says
        test.hypothesis.inner_test(self, decide, ipaddress.ip_address(text))

    @given(st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(0, 32))
    def test_an_ipv4_range_holds_what_python_says(self, decide, base, ip, bits):
        network = ipaddress.ip_network(f"{base}/{bits}", strict=False)
        self.assert_range(decide, network, ip)

    @given(st.ip_addresses(v=6), st.integers(0, 128), st.integers(0, 2**128 - 1))
    def test_an_ipv6_range_holds_what_python_says(self, decide, base, bits, noise):
        network = ipaddress.ip_network(f"{base}/{bits}", strict=False)
        near = ipaddress.IPv6Address(int(network.network_address) | noise & int(network.hostmask))
        for ip in (near, ipaddress.IPv6Address(noise)):
            # IPv4 addresses are kept as ::ffff:a.b.c.d and so are inside any IPv6 range that holds those.
            self.assert_range(decide, network, ip)

    def assert_range(self, decide, network, ip):
        value = network_range(str(network)) if network.version == 4 else Range(str(network[0]), network.prefixlen)
        if network.version == 6 and int(network[0]) == 0:
            value = Range("", network.prefixlen)
        raw = address_bytes(value.base) + value.prefix.to_bytes(4, "little") + bytes(4)
        entry = ctypes.byref(CLASSES["cluster_range"].from_buffer_copy(raw))
        assert bool(decide.call_in_range(address(str(ip)), entry)) == (ip in network)

    def test_only_ranges_in_use_count(self, decide):
        some = settings(cluster_ranges=(network_range("10.0.0.0/8"), network_range("fd00::/16")))
        assert decide.call_in_cluster(address("10.1.2.3"), some)
        assert decide.call_in_cluster(address("fd00::1"), some)
        assert not decide.call_in_cluster(address("11.0.0.1"), some)
        assert not decide.call_in_cluster(address("10.1.2.3"), settings())

    @pytest.mark.parametrize(
        "target, source, effective",
        [
            ("10.0.0.1", "10.0.0.9", "10.0.0.1"),
            ("0.0.0.0", "10.0.0.9", "10.0.0.9"),
            ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
            ("::", "::", "::1"),
            ("::", "fd00::9", "fd00::9"),
        ],
    )
    def test_connecting_to_any_means_oneself(self, decide, target, source, effective):
        out = CLASSES["address"]()
        decide.call_effective_target(address(target), address(source), ctypes.byref(out))
        assert address_text(bytes(out)) == effective

    def test_the_redirect_goes_to_loopback_of_the_same_family(self, decide):
        for target, loopback in (("10.0.0.1", "127.0.0.1"), ("fd00::1", "::1")):
            out = CLASSES["address"]()
            decide.call_loopback_for(address(target), ctypes.byref(out))
            assert address_text(bytes(out)) == loopback


class TestInbound:
    def authorizes(self, decide, entry: AuthorizedValue, local: WorkloadValue | None) -> bool:
        value = CLASSES["authorized_value"].from_buffer_copy(entry.encode())
        owner = ctypes.byref(CLASSES["workload_value"].from_buffer_copy(local.encode())) if local else None
        return bool(decide.call_authorizes(ctypes.byref(value), owner))

    @pytest.mark.parametrize(
        "generation, workload, name, admitted",
        [
            (5, 7, "ZTUNNEL", True),
            (0, 7, "ZTUNNEL", True),
            (5, 7, "PROBE", True),
            (4, 7, "PROBE", False),
            (5, 8, "ZTUNNEL", False),
            (0, 8, "PROBE", False),
            (5, 7, "CAPTURED", False),
            (5, 7, "NONE", False),
        ],
    )
    def test_an_entry_counts_for_its_workload_and_generation(self, decide, generation, workload, name, admitted):
        entry = AuthorizedValue(generation, 0, workload, LAYOUT[f"REASON_{name}"])
        assert self.authorizes(decide, entry, WorkloadValue(7, LOCAL | ENROLLED, 5)) is admitted

    def test_at_an_address_nobody_owns_no_entry_counts(self, decide):
        assert not self.authorizes(decide, AuthorizedValue(0, 0, 0, LAYOUT["REASON_ZTUNNEL"]), None)

    @pytest.mark.parametrize(
        "flags, changes, bypassed",
        [
            (0, {}, False),
            (0, {"mode": 1}, True),
            (LAYOUT["WORKLOAD_BYPASS"], {}, True),
            (LAYOUT["WORKLOAD_OPEN"], STALE, True),
            (LAYOUT["WORKLOAD_OPEN"], FRESH, False),
            (0, STALE, False),
        ],
    )
    def test_plaintext_is_steered_unless_told_otherwise(self, decide, flags, changes, bypassed):
        value = WorkloadValue(7, flags | LOCAL | ENROLLED, 1)
        owner = ctypes.byref(CLASSES["workload_value"].from_buffer_copy(value.encode()))
        assert bool(decide.call_inbound_bypassed(owner, settings(**changes), ctypes.c_uint64(NOW))) is bypassed

    def test_a_heartbeat_from_the_future_is_alive(self, decide):
        ahead = settings(heartbeat_timeout_s=1, heartbeat_ns=NOW + 10**12)
        assert not decide.call_heartbeat_stopped(ahead, ctypes.c_uint64(NOW))


class TestWithinTheNode:
    """Connections that the kernel may authorize itself."""

    WORDS: ClassVar = {"off": 0, "direct": 1, "redirect": 2}

    @pytest.mark.parametrize("able", [0, LAYOUT["CAN_REDIRECT"]])
    @pytest.mark.parametrize("source", ["off", "direct", "redirect"])
    @pytest.mark.parametrize("destination", ["off", "direct", "redirect"])
    def test_the_stricter_of_both_ends_holds(self, decide, source, destination, able):
        flags = LAYOUT[f"ENROLLED_{source.upper()}"], LAYOUT[f"WORKLOAD_{destination.upper()}"]
        wanted = min(self.WORDS[source], self.WORDS[destination])
        assert decide.call_agreed_acceleration(*flags, able) == (wanted if able else min(wanted, 1))

    @pytest.mark.parametrize("end", ["DIRECT", "REDIRECT"])
    @pytest.mark.parametrize("why", ["NO_DESTROY", "CROWDED"])
    def test_a_kernel_that_cannot_close_connections_or_has_no_room_lets_none_in(self, decide, end, why):
        flags = LAYOUT[f"ENROLLED_{end}"], LAYOUT[f"WORKLOAD_{end}"]
        assert decide.call_agreed_acceleration(*flags, LAYOUT["CAN_REDIRECT"] | LAYOUT[why]) == 0

    def test_an_end_that_says_nothing_is_off(self, decide):
        assert decide.call_agreed_acceleration(0, LAYOUT["WORKLOAD_DIRECT"], 3) == 0
        assert decide.call_agreed_acceleration(LAYOUT["ENROLLED_DIRECT"], 0, 3) == 0

    @pytest.mark.parametrize(
        "verdict, generation, reason",
        [
            (None, 5, "NO_VERDICT"),
            (VerdictValue(5, 1), 5, "KERNEL"),
            (VerdictValue(5, 0), 5, "VERDICT_DENIES"),
            (VerdictValue(4, 1), 5, "STALE_VERDICT"),
            (VerdictValue(6, 1), 5, "STALE_VERDICT"),
            (VerdictValue(0, 1), 0, "STALE_VERDICT"),
        ],
    )
    def test_only_a_current_allow_allows(self, decide, verdict, generation, reason):
        raw = ctypes.byref(CLASSES["verdict_value"].from_buffer_copy(verdict.encode())) if verdict else None
        assert decide.call_judge(raw, ctypes.c_uint64(generation)) == LAYOUT[f"REASON_{reason}"]

    @pytest.mark.parametrize(
        "flags, same",
        [(LOCAL | ENROLLED, True), (LOCAL, False), (ENROLLED, False), (LOCAL | ENROLLED | WAYPOINT, False)],
    )
    def test_only_an_enrolled_pod_of_this_node_without_a_waypoint(self, decide, flags, same):
        raw = ctypes.byref(CLASSES["workload_value"].from_buffer_copy(WorkloadValue(7, flags, 1).encode()))
        assert bool(decide.call_is_same_node(raw)) is same

    def test_an_entry_of_the_kernel_path_without_a_generation_admits_nobody(self, decide):
        entry = AuthorizedValue(0, 0, 7, LAYOUT["REASON_KERNEL"])
        owner = ctypes.byref(CLASSES["workload_value"].from_buffer_copy(WorkloadValue(7, LOCAL, 5).encode()))
        assert not decide.call_authorizes(
            ctypes.byref(CLASSES["authorized_value"].from_buffer_copy(entry.encode())), owner
        )

    def test_a_silent_agent_decides_nothing(self, decide):
        silent = LAYOUT["AGENT_SILENT_S"] * 10**9
        for age, answer in ((silent, 0), (silent + 1, 1), (-1, 0)):
            value = settings(heartbeat_ns=NOW - age)
            assert bool(decide.call_agent_is_silent(value, ctypes.c_uint64(NOW))) is bool(answer)
