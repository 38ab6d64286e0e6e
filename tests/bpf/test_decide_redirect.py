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


GOOD = {
    "now_ns": 100 * S,
    "last_native_ns": 99 * S,
    "size": 10,
    "state": REDIRECT,
    "high": 1000,
    "native_gone": 1,
    "receiver_ready": 1,
}


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
        ({"queued_messages": 255, "rmem": 255}, True),
        ({"queued_messages": 256, "rmem": 256}, False),
        ({"native_gone": 0}, False),
        ({"state": NATIVE, "native_gone": 1}, True),
        ({"state": NATIVE, "native_gone": 0}, False),
        ({"state": NATIVE, "native_gone": 1, "pressed": 1}, False),
    ],
)
def test_order_and_bounds(redirects, what, yes):
    assert redirects(**what) is yes


class Progress(ctypes.Structure):
    _fields_ = [
        ("written", ctypes.c_uint32),
        ("acknowledged", ctypes.c_uint32),
        ("arrived", ctypes.c_uint32),
        ("consumed", ctypes.c_uint32),
        ("seen", ctypes.c_uint32),
        ("reading", ctypes.c_uint8),
        ("numbered", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 2),
    ]


ALL_READ = {"written": 9, "acknowledged": 9, "arrived": 9, "consumed": 9, "seen": 8}


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        ({}, True),
        ({"acknowledged": 8}, False),
        ({"numbered": 1, "acknowledged": 8}, True),
        ({"numbered": 1, "consumed": 8, "seen": 7}, False),
        ({"numbered": 1, "written": 10}, False),
        ({"numbered": 1, "seen": 9}, False),
        ({"numbered": 1, "reading": 1}, False),
        ({"reading": 1}, False),
        # the numbers are changed on the way: all is read, and then not all
        ({"arrived": 12, "consumed": 12}, False),
        ({"written": 12, "acknowledged": 12, "arrived": 15, "consumed": 12}, False),
    ],
)
def test_native_bytes_are_gone_when_all_that_was_written_was_read(decide, what, gone):  # noqa: F811
    assert decide.call_progress_size() == ctypes.sizeof(Progress)
    assert bool(decide.call_native_is_gone(ctypes.byref(Progress(**(ALL_READ | what))))) is gone


@pytest.mark.parametrize(
    ("idle_s", "rmem", "yes"), [(2.9, 0, True), (3.1, 0, False), (3.1, 1, True), (5.9, 1, True), (6.1, 1, False)]
)
def test_a_native_message_is_due_every_six_seconds_and_sooner_when_nothing_is_unread(redirects, idle_s, rmem, yes):
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
