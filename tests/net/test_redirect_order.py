"""Attacks on the order of a redirected direction: interleavings that applications and the kernel can really produce."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading

import pytest

from ambient.datapath.layout import LAYOUT
from tests.support.netlab import until
from tests.support.redirect import CAN, REDIRECT, SO_MEMINFO, Held, enrol, read

pytestmark = [pytest.mark.net, pytest.mark.bpf]


@pytest.fixture
def pods(node, make_pod):
    node.reset(acceleration=CAN)
    return enrol(make_pod()), enrol(make_pod())


@pytest.fixture
def held(node, pods):
    found = Held(node, *pods)
    yield found
    found.close()


@contextlib.contextmanager
def dropping(pod, rule):
    """What arrives in the pod's namespace and fits the rule is dropped."""
    prefix = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pod.fd}", "nft"]
    table = f"table inet order {{ chain c {{ type filter hook input priority 0; {rule} drop; }}; }}"
    subprocess.run([*prefix, table], check=True)
    try:
        yield
    finally:
        subprocess.run([*prefix, "delete table inet order"], check=True)


def meminfo(sock):
    """(sk_sndbuf, sk_wmem_queued)"""
    told = struct.unpack("=9I", sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))
    return told[3], told[5]


def natively(node, on):
    node.reset(acceleration=CAN | (LAYOUT["DRAINING"] if on else 0))


def unread(sock):
    """All there is."""
    out = bytearray()
    with contextlib.suppress(BlockingIOError):
        while data := sock.recv(1 << 20):
            out += data
    return bytes(out)


def test_bytes_that_a_sleeping_writer_adds_natively_are_read_before_what_it_writes_next(node, pods, held):
    """A blocking send sleeps in the middle of a native message; the program is not asked again for the rest of it."""
    held.warm()
    client, server = held.client, held.server
    natively(node, True)
    for _ in range(50):  # the congestion window opens
        client.send(bytes(20000))
        read(server, 20000)
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    until(lambda: meminfo(client)[1] == 0, "all is acknowledged")
    message = bytes(range(250)) * 320
    sent = []
    slow = threading.Thread(target=lambda: sent.append(client.send(message)))
    got = bytearray()

    def sleeps():
        before = len(got)
        got.extend(unread(server))
        return got and len(got) == before

    with dropping(pods[0], "tcp sport 6000"):
        slow.start()
        until(sleeps, "the writer sleeps, and all it wrote was read")
        assert len(got) < len(message)
        # Room for others, and too little to wake it.
        queued = meminfo(client)[1]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, (queued + queued // 4) // 2)
        assert client.send(b"between") == 7
        assert read(server, 7) == b"between"
        natively(node, False)
        assert client.send(b"redirected") == 10
        assert held.ends()[0].state == REDIRECT
        assert not sent
    slow.join(10)
    assert sent == [len(message)]
    assert client.send(b"next") == 4
    rest = message[len(got) :] + b"next"
    said = read(server, 10 + len(rest))
    assert said == b"redirected" + rest
