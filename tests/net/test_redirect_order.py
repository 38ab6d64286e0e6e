"""Attacks on the order of a redirected direction: interleavings that applications and the kernel can really produce.

Every byte is compared with what was sent at its place. A test whose direction did not turn both ways fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time

import pytest

from ambient.datapath.layout import LAYOUT
from tests.support.netlab import until
from tests.support.redirect import CAN, NATIVE, REDIRECT, SO_MEMINFO, read

pytestmark = [pytest.mark.net, pytest.mark.bpf]

STREAM = random.Random(5).randbytes(1_000_003) * 30
"""What senders send: no period that a kernel or an application has."""


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


class Exchange:
    """The client sends STREAM by some means until the end; the server reads pieces, at times none, and compares."""

    def __init__(self, node, held, total=0, high=8192, seed=1):
        total = total or len(STREAM)
        held.warm()
        node.reset(acceleration=CAN, high_bytes=high)
        self.client, self.server = held.client, held.server
        self.total, self.sent, self.got, self.random = total, 0, 0, random.Random(seed)
        self.again = self.partial = 0
        self._held, self._before = held, held.ends()[0]
        self._deadline = time.monotonic() + 30

    def send(self, size, how):
        """``how(first, last)`` sends bytes of STREAM; how many it took."""
        size = min(size, self.total - self.sent)
        try:
            taken = how(self.sent, self.sent + size)
        except BlockingIOError:
            taken = 0
        self.again += not taken
        self.partial += 0 < taken < size
        self.sent += taken

    def compare(self, data, at):
        assert data == STREAM[at : at + len(data)], f"bytes from {at} on are not those that were sent"

    def read(self):
        """What is there, in pieces, and perhaps not all of it; after the end all of it."""
        assert time.monotonic() < self._deadline, f"{self.got} of {self.sent} bytes came"
        if self.sent == self.total:
            assert select.select([self.server], [], [], 5)[0], f"{self.got} of {self.total} bytes came, and no more"
        for _ in range(self.random.choice((0, 1, 1, 2, 64))):
            try:
                data = self.server.recv(self.random.choice((1, 100, 4096, 65536, 1 << 20)))
            except BlockingIOError:
                return
            self.compare(data, self.got)
            self.got += len(data)

    def run(self, how, sizes, *, turns=20):
        while self.got < self.total:
            if self.sent < self.total:
                self.send(self.random.choice(sizes), how)
            self.read()
        self.check(turns)

    def check(self, turns):
        end = self._held.ends()[0]
        redirected = end.redirect_bytes - self._before.redirect_bytes
        print(
            f"{redirected} of {self.total} bytes redirected, {end.switches - self._before.switches} turns, "
            f"{self.partial} partial sends, {self.again} times EAGAIN"
        )
        assert self.total > redirected > self.total // 100
        assert end.switches - self._before.switches >= turns


class TestOneWriter:
    @pytest.mark.parametrize("sndbuf", [1, 20_000, 0])
    def test_sends_that_are_taken_in_part(self, node, held, sndbuf):
        if sndbuf:
            held.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        run = Exchange(node, held)
        edges = (4096, 32768, 65536, 17 * 32768)
        sizes = [edge + more for edge in edges for more in (-1, 0, 1)] + [1, 1 << 20]
        run.run(lambda first, last: held.client.send(STREAM[first:last]), sizes)
        assert run.again or run.partial, "the kernel's own send buffer may be full seldom"
        assert (run.again and run.partial) or not sndbuf

    def test_a_sendmsg_that_is_more_than_one_message_sleeps_in_between(self, node, held):
        held.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        run = Exchange(node, held, high=65536)
        held.client.setblocking(True)
        while run.sent < run.total:
            parts, size = [], 0
            while len(parts) < 1000 and size < 1_500_000 and run.sent < run.total:
                parts.append(STREAM[run.sent : run.sent + run.random.choice((1, 100, 5000, 70_000))])
                run.sent += len(parts[-1])
                size += len(parts[-1])
            taken = []
            writer = threading.Thread(target=lambda: taken.append(held.client.sendmsg(parts)))  # noqa: B023
            writer.start()
            data = read(held.server, size)
            run.compare(data, run.got)
            run.got += size
            writer.join(10)
            assert taken == [size]
        run.check(turns=10)

    def test_corked_bytes_are_read_first(self, node, held):
        run = Exchange(node, held, total=10_000_000)

        def how(first, last):
            flags = run.random.choice((0, 0, socket.MSG_MORE))
            if run.random.random() < 0.1:
                held.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, run.random.random() < 0.5)
            if last == run.total:
                held.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
                flags = 0
            return held.client.send(STREAM[first:last], flags)

        run.run(how, [1, 10, 100, 1448, 5000, 50_000])

    def test_what_is_written_behind_a_corked_byte_is_native(self, node, held):
        held.warm()
        natively(node, True)
        held.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        held.client.send(b"corked")
        natively(node, False)
        before = held.ends()[0].redirect_messages
        held.client.send(b"behind")
        held.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        assert read(held.server, 12) == b"corkedbehind"
        assert held.ends()[0].redirect_messages == before
        held.client.send(b"on")
        assert read(held.server, 2) == b"on"
        assert held.ends()[0].redirect_messages == before + 1

    def test_files_that_are_sent(self, node, held, tmp_path):
        source = tmp_path / "stream"
        source.write_bytes(STREAM)
        held.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        run = Exchange(node, held)
        with source.open("rb") as file:
            run.run(
                lambda first, last: os.sendfile(held.client.fileno(), file.fileno(), first, last - first),
                [1, 4096, 65536, 300_000],
            )

    def test_a_reader_that_looks_before_it_reads(self, node, held):
        run = Exchange(node, held)

        def how(first, last):
            with contextlib.suppress(BlockingIOError):
                run.compare(held.server.recv(run.random.choice((1, 5000, 1 << 20)), socket.MSG_PEEK), run.got)
            return held.client.send(STREAM[first:last])

        run.run(how, [1, 100, 4096, 65536])

    def test_urgent_data_is_passed_before_the_direction_redirects_again(self, node, held):
        held.warm()
        natively(node, True)
        assert held.client.send(b"before!", socket.MSG_OOB) == 7
        natively(node, False)
        assert read(held.server, 6) == b"before"
        before = held.ends()[0].redirect_messages
        held.client.send(b"after")
        assert read(held.server, 5) == b"after"
        assert held.ends()[0].redirect_messages == before
        held.client.send(b"on")
        assert read(held.server, 2) == b"on"
        assert held.ends()[0].redirect_messages == before + 1

    def test_acknowledgements_that_are_late_keep_no_direction_native(self, node, pods, held):
        held.warm()
        switches, at = held.ends()[0].switches, 0
        with dropping(pods[0], "tcp sport 6000"):
            for _ in range(6):
                for on, state in ((True, NATIVE), (False, REDIRECT)):
                    natively(node, on)
                    for size in (1, 1000):
                        assert held.client.send(STREAM[at : at + size]) == size
                        assert held.ends()[0].state == state
                        assert read(held.server, size) == STREAM[at : at + size]
                        at += size
        assert held.ends()[0].switches >= switches + 12

    def test_a_byte_that_is_not_read_keeps_its_direction_native(self, node, held):
        """However much of it is."""
        held.warm()
        for size in (2, 3000, 65536):
            natively(node, True)
            assert held.client.send(STREAM[:size]) == size
            natively(node, False)
            assert read(held.server, size - 1) == STREAM[: size - 1]
            assert held.client.send(b"behind") == 6
            assert held.ends()[0].state == NATIVE
            assert read(held.server, 7) == STREAM[size - 1 : size] + b"behind"
            held.warm()


class TestSeveralWriters:
    def test_each_ones_bytes_stay_in_order(self, node, held):
        """Each writes its own bytes, which count; TCP itself divides what two write at once where it likes."""
        held.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        held.warm()
        node.reset(acceleration=CAN, high_bytes=8192)
        held.client.setblocking(True)
        before, total = held.ends()[0], 8_000_000
        counting = bytes(range(128)) * 64

        def write(mark, seed):
            sizes, at = random.Random(seed), 0
            while at < total:
                size = min(sizes.randrange(1, 4096), total - at)
                piece = counting[at % 128 : at % 128 + size]
                assert held.client.send(bytes(byte | mark for byte in piece) if mark else piece) == size
                at += size

        writers = [threading.Thread(target=write, args=(mark, mark + 1)) for mark in (0, 128)]
        for writer in writers:
            writer.start()
        came = {0: bytearray(), 128: bytearray()}
        for _ in range(100_000):
            assert select.select([held.server], [], [], 5)[0]
            data = unread(held.server)
            came[0] += bytes(byte for byte in data if byte < 128)
            came[128] += bytes(byte & 127 for byte in data if byte >= 128)
            if all(len(one) == total for one in came.values()):
                break
        for writer in writers:
            writer.join(10)
        whole = (counting * (total // len(counting) + 1))[:total]
        assert came[0] == whole
        assert came[128] == whole
        end = held.ends()[0]
        print(end.redirect_bytes - before.redirect_bytes, end.switches - before.switches)
        assert 2 * total > end.redirect_bytes - before.redirect_bytes > total // 200
        assert end.switches - before.switches >= 10

    def test_bytes_that_a_sleeping_writer_adds_natively_are_read_before_what_it_writes_next(self, node, pods, held):
        """A blocking send sleeps in the middle of a native message; nobody is asked again for the rest of it."""
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


SHIFT = 4
RENUMBERING = (
    (
        "enrol.c",
        "\tif (!length)\n\t\treturn TC_NEXT;\n",
        f"""	if (!length)
		return TC_NEXT;
	if (length == sizeof(tuple.ipv4) && (own.local_port == 6000 || own.remote_port == 6000)) {{
		__u32 number = 0, offset = own.local_port == 6000 ? 38 : 42;

		if (bpf_skb_load_bytes(skb, offset, &number, 4))
			return TC_NEXT;
		number = swap32(swap32(number) + (own.local_port == 6000 ? {SHIFT} : -{SHIFT}));
		bpf_skb_store_bytes(skb, offset, &number, 4, 0);
	}}
""",
    ),
)
"""What arrives at port 6000 has other sequence numbers than it was sent with, and its acknowledgements fit."""


class TestNumbersThatAreChangedOnTheWay:
    @pytest.fixture(scope="class")
    @classmethod
    def loaded_node(cls, netlab):
        return netlab.node("renumbered", *RENUMBERING)

    def test_keep_that_direction_native(self, node, held):
        """By the numbers all is read when SHIFT bytes are not."""

        def redirecting():
            held.ping()
            return held.inserted() and held.ends()[1].state == REDIRECT

        until(redirecting, "the other direction redirects")
        for _ in range(3):
            assert held.client.send(b"abcdefgh") == 8
            assert read(held.server, 8 - SHIFT) == b"abcdefgh"[:-SHIFT]
            assert held.client.send(b"next") == 4
            assert read(held.server, 4 + SHIFT) == b"abcdefgh"[-SHIFT:] + b"next"
            held.ping()
        client, server = held.ends()
        assert client.redirect_messages == 0
        assert not client.flags & LAYOUT["END_NUMBERED"]
        assert server.flags & LAYOUT["END_NUMBERED"]
