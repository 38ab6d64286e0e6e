"""An enrolled pod's connections reach ztunnel's listener with their record; the application notices nothing."""

from __future__ import annotations

import errno
import socket

import pytest

pytestmark = [pytest.mark.net, pytest.mark.bpf]


def test_a_captured_connection_reaches_ztunnel_with_its_record(node, a, b):
    app = a.puppet()
    slot = app.connect(b.ip4, 80)
    accepted, cookie = a.ztunnel_accept()
    record = node.maps.take_redirect(cookie)
    assert record is not None
    assert (record.original, record.original_port) == (b.ip4, 80)
    assert (record.client, record.client_port) == app.name(slot)
    assert (record.source, record.netns) == (a.workload, a.cookie)
    assert node.maps.take_redirect(cookie) is None
    assert app.name(slot)[0] == a.ip4
    assert app.peer(slot) == (b.ip4, 80)
    app.call("send", slot, "hello")
    assert accepted.recv(10) == b"hello"
    accepted.close()
