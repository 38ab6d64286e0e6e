"""The decisions that `ambient why` makes in Python are those that gcc compiles from the header of the hooks."""

from __future__ import annotations

import ctypes
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from ambient.datapath import decide as twin
from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import Range, SettingsValue, VerdictValue, WorkloadValue, address_bytes, network_range
from tests.bpf.test_decide import CLASSES, Outbound, decide  # noqa: F401 - the fixture

NOW = 10**12
RANGES = ("10.244.0.0/16", "10.96.0.0/16", "fd00:244::/48", "0.0.0.0/0", "10.1.2.3/32", "fd00::/7")
ADDRESSES = (
    "10.244.1.2",
    "10.96.0.10",
    "127.0.0.1",
    "127.9.9.9",
    "::1",
    "fd00:244::5",
    "fe80::1",
    "febf::1",
    "fec0::1",
)
OTHERS = ("fec0::1", "192.0.2.1", "10.1.2.3", "10.1.2.4", "169.254.1.1", "2001:db8::1", "128.0.0.1")
PORTS = (53, 80, 8080, 15000, 15001, 15006, 15008, 15053, 65535)

ANY = st.sampled_from(ADDRESSES + OTHERS)
settings_values = st.builds(
    SettingsValue,
    generation=st.just(1),
    heartbeat_ns=st.sampled_from((0, NOW, NOW - 15 * 10**9, NOW - 15 * 10**9 - 1, NOW + 5)),
    cluster_ranges=st.lists(st.sampled_from(RANGES), max_size=3).map(lambda xs: tuple(map(network_range, xs))),
    mode=st.sampled_from((LAYOUT["MODE_CAPTURE"], LAYOUT["MODE_BYPASS"])),
    complete=st.integers(0, 1),
    heartbeat_timeout_s=st.sampled_from((0, 1, 15, 30)),
)
flags = st.integers(0, 511)
facts = st.builds(
    twin.Outbound,
    target=st.sampled_from(ADDRESSES + OTHERS),
    port=st.sampled_from(PORTS),
    stream=st.booleans(),
    exempt=st.booleans(),
    workload_known=st.booleans(),
    service_known=st.booleans(),
    in_cluster=st.booleans(),
    workload_flags=flags,
    enrolled_flags=flags,
    now_ns=st.just(NOW),
)


def c_settings(value: SettingsValue) -> object:
    return ctypes.byref(CLASSES["settings_value"].from_buffer_copy(value.encode()))


@settings(max_examples=600, deadline=None)
@given(facts=facts, now=settings_values)
def test_outbound_connections_are_decided_alike(decide, facts, now) -> None:  # noqa: F811
    out = Outbound()
    for field in dataclasses.fields(facts):
        value = getattr(facts, field.name)
        if field.name == "target":
            value = CLASSES["address"].from_buffer_copy(address_bytes(value))
        setattr(out, field.name, value)
    assert twin.decide_outbound(facts, now) == decide.call_decide_outbound(ctypes.byref(out), c_settings(now))


@settings(max_examples=150, deadline=None)
@given(local=st.none() | flags.map(lambda bits: WorkloadValue(1, bits, 1)), now=settings_values)
def test_inbound_bypass_is_decided_alike(decide, local, now) -> None:  # noqa: F811
    raw = None if local is None else ctypes.byref(CLASSES["workload_value"].from_buffer_copy(local.encode()))
    said = bool(decide.call_inbound_bypassed(raw, c_settings(now), ctypes.c_uint64(NOW)))
    assert twin.inbound_bypassed(local, now, NOW) is said


@settings(max_examples=200, deadline=None)
@given(address=ANY, base=ANY, prefix=st.integers(0, 128))
def test_ranges_hold_the_same_addresses(decide, address, base, prefix) -> None:  # noqa: F811
    ours = ctypes.byref(CLASSES["address"].from_buffer_copy(address_bytes(address)))
    span = CLASSES["cluster_range"]()
    span.base = CLASSES["address"].from_buffer_copy(address_bytes(base))
    span.prefix = prefix
    assert twin.address_in_range(address, Range(base, prefix)) is bool(decide.call_in_range(ours, ctypes.byref(span)))


@settings(max_examples=400, deadline=None)
@given(ours=flags, theirs=flags, capabilities=st.integers(0, 255))
def test_acceleration_is_agreed_alike(decide, ours, theirs, capabilities) -> None:  # noqa: F811
    assert twin.agreed_acceleration(ours, theirs, capabilities) == decide.call_agreed_acceleration(
        ours, theirs, capabilities
    )


@settings(max_examples=60, deadline=None)
@given(now=settings_values)
def test_a_silent_agent_is_known_alike(decide, now) -> None:  # noqa: F811
    said = bool(decide.call_agent_is_silent(c_settings(now), ctypes.c_uint64(NOW)))
    assert twin.agent_is_silent(now, NOW) is said


generations = st.sampled_from((0, 1, 2))
verdicts = st.builds(VerdictValue, generation=generations, allow=st.integers(0, 1), policy=st.integers(0, 1))


@settings(max_examples=150, deadline=None)
@given(bits=flags, verdict=st.none() | verdicts, generation=generations)
def test_connections_within_the_node_are_judged_alike(decide, bits, verdict, generation) -> None:  # noqa: F811
    value = WorkloadValue(1, bits, 1)
    raw = ctypes.byref(CLASSES["workload_value"].from_buffer_copy(value.encode()))
    assert twin.is_same_node(value) is bool(decide.call_is_same_node(raw))
    raw = None if verdict is None else ctypes.byref(CLASSES["verdict_value"].from_buffer_copy(verdict.encode()))
    assert twin.judge(verdict, generation) == decide.call_judge(raw, ctypes.c_uint64(generation))
