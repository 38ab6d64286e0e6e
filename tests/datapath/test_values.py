"""Keys and values survive the way into bytes and back; what does not fit is refused by name."""

from __future__ import annotations

import ctypes
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient.datapath import values as v
from ambient.datapath.layout import LAYOUT

_BITS = {"__u8": 8, "__u16": 16, "__u32": 32, "__u64": 64}
ADDRESSES = st.one_of(
    st.just(""),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6)
    .filter(lambda ip: int(ip) != 0)
    .map(str)
    .map(lambda text: v.address_text(v.address_bytes(text))),
)


def records(kind: type[v.Record]) -> st.SearchStrategy[v.Record]:
    parts: dict[str, st.SearchStrategy[object]] = {}
    nested = {record._struct: record for record in v.RECORDS}
    for field in LAYOUT.structs[kind._struct].fields:
        if not field.is_padding:
            if field.kind in nested:
                parts[field.name] = records(nested[field.kind])
                continue
            bits = _BITS.get(field.kind, 0)
            parts[field.name] = ADDRESSES if field.kind == "address" else st.integers(0, 2**bits - 1)
    return st.builds(kind, **parts)


@pytest.mark.parametrize("kind", v.RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_survives_the_round_trip(kind):
    @given(records(kind))
    def check(record):
        raw = record.encode()
        assert len(raw) == kind.size() == ctypes.sizeof(LAYOUT.classes[kind._struct])
        assert kind.decode(raw) == record

    check()


@pytest.mark.parametrize("kind", v.RECORDS, ids=lambda kind: kind.__name__)
def test_the_bytes_are_those_of_the_c_struct(kind):
    """Each field lies where the layout says, in the machine's order."""

    @given(records(kind))
    def check(record):
        seen = LAYOUT.classes[kind._struct].from_buffer_copy(record.encode())
        for field in fields(record):
            value = getattr(seen, field.name)
            own = getattr(record, field.name)
            if isinstance(own, v.Record):
                assert bytes(value) == own.encode()
            elif isinstance(value, int):
                assert value == getattr(record, field.name)
            else:
                assert v.address_text(bytes(value)) == getattr(record, field.name)
        for padding in LAYOUT.structs[kind._struct].fields:
            if padding.is_padding:
                value = getattr(seen, padding.name)
                assert not any(value if not isinstance(value, int) else [value])

    check()


KINDS: tuple[Any, ...] = (*v.RECORDS, v.SettingsValue)
RANGES = st.builds(v.Range, ADDRESSES, st.integers(0, 128))
SETTINGS = st.builds(
    v.SettingsValue,
    generation=st.integers(0, 2**64 - 1),
    heartbeat_ns=st.integers(0, 2**64 - 1),
    exempt_cgroups=st.lists(st.integers(1, 2**64 - 1), max_size=8).map(tuple),
    kubelet_cgroups=st.lists(st.integers(1, 2**64 - 1), max_size=4).map(tuple),
    cluster_ranges=st.lists(RANGES, max_size=8).map(tuple),
    mode=st.integers(0, 1),
    complete=st.integers(0, 1),
    heartbeat_timeout_s=st.integers(0, 2**32 - 1),
    acceleration=st.integers(0, 3),
    high_bytes=st.integers(0, 2**32 - 1),
)


@given(SETTINGS)
def test_settings_survive_the_round_trip(value):
    raw = value.encode()
    assert len(raw) == ctypes.sizeof(LAYOUT.classes["settings_value"])
    assert v.SettingsValue.decode(raw) == value
    seen = LAYOUT.classes["settings_value"].from_buffer_copy(raw)
    assert seen.cluster_ranges_used == len(value.cluster_ranges)
    assert (seen.mode, seen.complete) == (value.mode, value.complete)


@given(st.binary(max_size=400))
def test_bytes_of_another_length_are_refused(raw):
    for kind in KINDS:
        if len(raw) != kind.size():
            with pytest.raises(ValueError, match=kind.__name__):
                kind.decode(raw)


@given(st.binary(min_size=400, max_size=400))
def test_any_bytes_of_the_right_length_can_be_shown(raw):
    for kind in KINDS:
        kind.decode(raw[: kind.size()])


@pytest.mark.parametrize(
    "value",
    [
        v.ServiceKey("10.0.0.1", 65536),
        v.ServiceKey("10.0.0.1", -1),
        v.ServiceKey("10.0.0.300", 80),
        v.ServiceKey("name", 80),
        v.WorkloadValue(2**32, 0, 0),
        v.WorkloadValue("7", 0, 0),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused_by_name(value):
    with pytest.raises(ValueError, match=type(value).__name__):
        value.encode()


@pytest.mark.parametrize(
    "value, complaint",
    [
        (v.SettingsValue(exempt_cgroups=tuple(range(1, 10))), "exempt_cgroups"),
        (v.SettingsValue(exempt_cgroups=(0,)), "exempt_cgroups"),
        (v.SettingsValue(kubelet_cgroups=tuple(range(1, 6))), "kubelet_cgroups"),
        (v.SettingsValue(cluster_ranges=(v.Range("10.0.0.0", 104),) * 9), "cluster_ranges"),
    ],
)
def test_settings_with_too_much_in_them_are_refused(value, complaint):
    with pytest.raises(ValueError, match=complaint):
        value.encode()


@pytest.mark.parametrize(
    "text, base, prefix",
    [("10.0.0.0/8", "10.0.0.0", 104), ("10.1.2.3", "10.1.2.3", 128), ("fd00::/16", "fd00::", 16), ("::/0", "", 0)],
)
def test_ranges_count_bits_of_the_128(text, base, prefix):
    assert v.network_range(text) == v.Range(base, prefix)


@pytest.mark.parametrize("text", ["10.0.0.0/33", "fd00::/129", "10.0.0.0/-1", "x/8", "10.0.0.0/x"])
def test_bad_ranges_are_refused(text):
    with pytest.raises(ValueError):
        v.network_range(text)


def test_reasons_have_the_words_of_the_command_line():
    assert v.reason_name(LAYOUT["REASON_NOT_MESH"]) == "not_mesh"
    assert v.reason_name(1000) == "unknown_1000"
