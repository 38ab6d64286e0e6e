"""Whether a message is redirected: order first, then bounds, then the path's own filters."""

from __future__ import annotations

import ctypes

import pytest

from ambient.datapath.layout import LAYOUT
from tests.bpf.test_decide import decide  # noqa: F401  (the compiled decisions)

S = 10**9
NATIVE, REDIRECT = LAYOUT["FLOW_NATIVE"], LAYOUT["FLOW_REDIRECT"]


class Redirection(ctypes.Structure):
    _fields_ = [
        ("now_ns", ctypes.c_uint64),
        ("last_native_ns", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("state", ctypes.c_uint32),
        ("queued_messages", ctypes.c_uint32),
        ("rmem", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("forward", ctypes.c_int32),
        ("native_gone", ctypes.c_uint8),
        ("receiver_ready", ctypes.c_uint8),
        ("pressed", ctypes.c_uint8),
        ("edge", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 4),
    ]


GOOD = {"now_ns": 100 * S, "last_native_ns": 99 * S, "size": 10, "state": REDIRECT, "high": 1000, "receiver_ready": 1}


@pytest.fixture
def redirects(decide):  # noqa: F811
    assert decide.call_redirection_size() == ctypes.sizeof(Redirection)
    return lambda **what: bool(decide.call_decide_redirect(ctypes.byref(Redirection(**(GOOD | what)))))


@pytest.mark.parametrize(
    ("what", "yes"),
    [
        ({}, True),
        ({"receiver_ready": 0}, False),
        ({"pressed": 1}, False),
        ({"rmem": 1000}, True),
        ({"rmem": 1001}, False),
        ({"queued_messages": 255, "rmem": 255, "size": 4096}, True),
        ({"queued_messages": 256, "rmem": 256, "size": 4096}, False),
        ({"queued_messages": 7, "rmem": 7}, True),
        ({"queued_messages": 8, "rmem": 8}, False),
        ({"state": NATIVE, "native_gone": 1}, True),
        ({"state": NATIVE, "native_gone": 0}, False),
        ({"state": NATIVE, "native_gone": 1, "pressed": 1}, False),
    ],
)
def test_order_and_bounds(redirects, what, yes):
    assert redirects(**what) is yes


@pytest.mark.parametrize(
    ("idle_s", "rmem", "yes"), [(4.9, 0, True), (5.1, 0, False), (5.1, 1, True), (9.9, 1, True), (10.1, 1, False)]
)
def test_a_native_message_is_due_every_ten_seconds_and_sooner_when_nothing_is_unread(redirects, idle_s, rmem, yes):
    assert redirects(last_native_ns=int((100 - idle_s) * S), rmem=rmem) is yes


@pytest.mark.parametrize(
    ("what", "yes"),
    [
        ({"state": NATIVE, "native_gone": 1}, False),
        ({"state": REDIRECT, "rmem": 0}, False),
        ({"state": REDIRECT, "rmem": 1}, True),
    ],
)
def test_a_receiver_waited_for_by_edges_gets_native_bytes_once_it_has_read_the_others(redirects, what, yes):
    assert redirects(edge=1, **what) is yes


def test_the_bound_is_the_smaller_of_what_is_wanted_and_twice_the_receive_buffer(decide):  # noqa: F811
    assert decide.call_redirect_high(0, 131072) == 262144
    assert decide.call_redirect_high(0, 4 << 20) == LAYOUT["REDIRECT_HIGH_BYTES"]
    assert decide.call_redirect_high(5000, 131072) == 5000
