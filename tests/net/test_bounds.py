"""What a receiver that does not read can be made to hold by redirection, and what a limit on its memory does.

A redirected message is a `struct sk_msg` in the receiver's queue, about 712 bytes that no cgroup is charged for, and
its bytes, which are charged to the receiver. Both are measured: the bytes by sk_rmem_alloc (inet_diag's SKMEMINFO), the
objects by the slab cache they come from. The last tests take the bounds out of the programs: then these checks fail.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from dataclasses import dataclass

import pytest

from ambient.datapath.layout import LAYOUT
from ambient.io import sock_diag
from tests.support.limited import Limited, LimitedPod, limited, objects, slab_bytes
from tests.support.netlab import Node, Pod, until
from tests.support.redirect import REDIRECT, Duplex, Held, read

pytestmark = [pytest.mark.net, pytest.mark.bpf]

SO_RCVBUFFORCE = 33
CONNECTIONS = 16
HIGH = LAYOUT["REDIRECT_HIGH_BYTES"]
MESSAGES = LAYOUT["REDIRECT_MESSAGES"] + 1
SK_MSG_CACHE = "kmalloc-1k"
"""Where `struct sk_msg` is allocated. That the objects are found there is asserted too."""
TOLERANCE = 1.2
SENDS = {1: 1_000_000, 4096: 3_000, 65536: 300}
"""Message size -> sends of it without an end: more than TCP alone takes, and no danger to this machine."""


def rmem(pod: Pod, port: int) -> list[int]:
    """sk_rmem_alloc of a pod's sockets at a port, as inet_diag tells it."""
    with sock_diag.open_diag(pod.fd) as diag:
        return [found.held for found in sock_diag.dump(diag) if found.local_port == port]


class Idle:
    """Connections that redirect and whose receivers read no more, with buffers so large that HIGH is its own limit."""

    PORT = 6000

    def __init__(self, node: Node, pods: tuple[Pod, Pod], count: int = CONNECTIONS) -> None:
        self.server = pods[1]
        self.held: list[Held] = []
        try:
            for _ in range(count):
                self.held.append(Held(node, *pods, port=self.PORT))
                self.held[-1].server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, HIGH)
                self.held[-1].warm()
            until(lambda: not any(rmem(self.server, self.PORT)), "nothing is unread")
        except BaseException:
            self.close()
            raise
        self.before = [one.ends()[0] for one in self.held]
        self.sent = [0] * count

    def close(self) -> None:
        for one in self.held:
            one.close()

    def send(self, size: int, sends: int, *, redirected_only: bool) -> tuple[int, int]:
        """Up to so many messages on each connection; how many senders were told EAGAIN, how many ENOMEM."""
        message, again, no_memory = bytes(size), 0, 0
        for index, one in enumerate(self.held):
            for _ in range(sends):
                try:
                    self.sent[index] += one.client.send(message)
                except OSError as error:
                    assert error.errno in (errno.EAGAIN, errno.ENOMEM), error
                    again += error.errno == errno.EAGAIN
                    no_memory += error.errno == errno.ENOMEM
                    break
                if redirected_only and one.ends()[0].state != REDIRECT:
                    break
        return again, no_memory

    def redirected(self) -> list[tuple[int, int]]:
        """(messages, bytes) redirected by each sender since the connections stood."""
        ends = [one.ends()[0] for one in self.held]
        return [
            (end.redirect_messages - old.redirect_messages, end.redirect_bytes - old.redirect_bytes)
            for end, old in zip(ends, self.before, strict=True)
        ]


@dataclass
class Measured:
    """Of receivers that read nothing while their senders sent whatever was taken."""

    messages: int
    """Redirected to all of them."""
    objects: int
    """Of the cache, that came about meanwhile."""
    slab: int
    """Bytes of all slabs, whoever took them: told, and not judged."""
    rmem: list[int]


def measure(idle: Idle, size: int, sends: int) -> Measured:
    """Send until each direction goes native, and look."""
    before, slab = objects(SK_MSG_CACHE), slab_bytes()
    idle.send(size, sends, redirected_only=True)
    return Measured(
        messages=sum(messages for messages, _ in idle.redirected()),
        objects=objects(SK_MSG_CACHE) - before,
        slab=slab_bytes() - slab,
        rmem=rmem(idle.server, idle.PORT),
    )


def check(found: Measured, size: int, count: int) -> None:
    """The bound of ARCHITECTURE, "Bounds"."""
    high = HIGH + size
    assert max(found.rmem) <= high * TOLERANCE, f"sk_rmem_alloc: {max(found.rmem)} bytes, the bound is {high}"
    assert found.objects <= count * MESSAGES * TOLERANCE, f"slab: {found.objects} objects for {count} receivers"


class TestAnIdleReceiver:
    @pytest.mark.parametrize("size", [1, 4096, 65536])
    def test_holds_no_more_than_the_bound_and_its_sender_goes_on_when_it_reads(self, node, pods, size, record_property):
        idle = Idle(node, pods)
        try:
            found = measure(idle, size, SENDS[size])
            said = (
                f"{CONNECTIONS} idle receivers, messages of {size}: {found.messages} redirected, "
                f"{found.objects} {SK_MSG_CACHE} objects and {found.slab} bytes of slab more, "
                f"at most {max(found.rmem)} bytes of sk_rmem_alloc"
            )
            print(said)
            record_property("idle", said)
            check(found, size, CONNECTIONS)
            if found.messages > 1000:
                assert found.objects > found.messages * 0.8, "this is the cache the messages come from"
            # What follows is TCP's: it takes what the receiver's buffer and its own have room for, and says EAGAIN.
            redirected = idle.redirected()
            assert idle.send(size, SENDS[size], redirected_only=False) == (CONNECTIONS, 0)
            assert idle.redirected() == redirected
            room = 2 * HIGH  # what TCP charges for what SO_RCVBUF said
            assert max(rmem(idle.server, idle.PORT)) <= (HIGH + size + room) * TOLERANCE
            for one, sent in zip(idle.held, idle.sent, strict=True):
                assert read(one.server, sent) == bytes(sent)
                assert select.select([], [one.client], [], 5)[1], "the sender is told that there is room again"
                one.warm()
        finally:
            idle.close()


@pytest.fixture
def memcg(pods):
    found: list[Limited | LimitedPod] = []

    def make(limit: int) -> Limited | LimitedPod:
        found.append(limited(limit, pods[1].cgroup))
        return found[-1]

    yield make
    for one in found:
        until(one.close, "no process is in the memory cgroup")


LIMIT = 1 << 20
"""Of all receivers together: less than two of them could hold."""


def exchange(held: list[Held], total: int, size: int, limit_s: float = 40.0) -> int:
    """Every client sends ``total`` bytes while the servers read; how often a sender was told ENOMEM.

    Every byte is checked.
    """
    pattern = bytes(range(251)) * (1 + (total + size) // 251)
    sent, got, no_memory = [0] * len(held), [0] * len(held), 0
    deadline = time.monotonic() + limit_s
    while min(got) < total:
        assert time.monotonic() < deadline, f"{got} of {total} bytes within {limit_s} s, {sent} sent"
        for index, one in enumerate(held):
            while sent[index] < total:
                try:
                    sent[index] += one.client.send(pattern[sent[index] : min(total, sent[index] + size)])
                except OSError as error:
                    assert error.errno in (errno.EAGAIN, errno.ENOMEM), error
                    no_memory += error.errno == errno.ENOMEM
                    break
        ready = select.select([one.server for one in held], [], [], 0.2)[0]
        for index, one in enumerate(held):
            if one.server in ready:
                data = one.server.recv(1 << 17)
                assert data == pattern[got[index] : got[index] + len(data)]
                got[index] += len(data)
    return no_memory


@pytest.fixture
def limited_connections(node, pods, memcg):
    """Call it for redirecting connections whose servers' sockets belong to a limited cgroup."""
    held: list[Held] = []

    def make(count: int, limit: int = LIMIT) -> tuple[Limited | LimitedPod, list[Held]]:
        group = memcg(limit)
        with group.inside():
            for _ in range(count):
                held.append(Held(node, *pods))
        for one in held:
            one.warm()
        return group, held

    yield make
    for one in held:
        one.close()


class TestAMemoryLimitOfTheReceiver:
    """memory.kmem.tcp.limit_in_bytes of cgroup v1, memory.max of v2. A charge that fails is ENOMEM for whoever
    redirects; with v2 the kernel first looks for a process of the receiver's pod to kill."""

    @pytest.mark.parametrize("size", [1, 4096, 65536])
    def test_an_idle_receiver_gives_its_sender_eagain_and_no_enomem(
        self, node, limited_connections, size, record_property
    ):
        group, held = limited_connections(8)
        counted, no_memory, sent = node.counted(), 0, [0] * 8
        message = bytes(size)
        for _ in range(3):
            for index, one in enumerate(held):
                for _ in range(SENDS[size]):
                    try:
                        sent[index] += one.client.send(message)
                    except OSError as error:
                        no_memory += error.errno == errno.ENOMEM
                        break
                else:
                    raise AssertionError(f"{sent[index]} bytes went to a receiver that reads nothing")
        redirected = sum(one.ends()[0].redirect_bytes for one in held)
        said = (
            f"limit {LIMIT}, idle, messages of {size}: ENOMEM {no_memory}, redirected {redirected} of {sum(sent)} "
            f"bytes, at most {group.said('max_usage_in_bytes')} charged, "
            f"{counted('redirect_pressed')} messages native for it"
        )
        print(said)
        record_property("limited", said)
        assert no_memory == 0
        if size > 1:
            assert redirected > LIMIT // 4
            assert counted("redirect_pressed") > 0
        for one, count in zip(held, sent, strict=True):
            assert read(one.server, count, 30) == bytes(count)

    @pytest.mark.parametrize(("size", "limit"), [(4096, 2 * LIMIT), (65536, 4 * LIMIT)])
    def test_a_reading_one_gets_every_byte_and_its_sender_no_enomem(
        self, node, limited_connections, size, limit, record_property
    ):
        """With a limit so small that TCP itself drops what arrives, it waits for its timers: no use to measure that."""
        _, held = limited_connections(8, limit)
        counted = node.counted()
        no_memory = exchange(held, 2_000_000, size)
        redirected = sum(one.ends()[0].redirect_bytes for one in held)
        said = (
            f"limit {limit}, reading, messages of {size}: ENOMEM {no_memory}, redirected {redirected} of 16000000 "
            f"bytes, {counted('redirect_pressed')} messages native for it"
        )
        print(said)
        record_property("limited", said)
        assert no_memory == 0
        assert redirected > 0

    def test_senders_in_parallel_share_it_without_enomem(self, node, pods, memcg, duplex_binary, record_property):
        """Both directions at once, on all processors: between looking and charging another sender may take the rest."""
        group = memcg(4 * LIMIT)
        if isinstance(group, LimitedPod):
            # What a program sends itself counts too, and with less the kernel kills it for that, in a mesh or not.
            group.limit(32 * LIMIT)
        duplex = Duplex(node, pods[0], pods[1], duplex_binary, server_enters=group.enter)
        counted = node.counted()
        try:
            done = duplex.run(flows=32, total=2_000_000, pause_us=500)
        finally:
            duplex.close()
        no_memory = done.client["enomem"] + done.server["enomem"]
        said = (
            f"limit {4 * LIMIT}, 32 connections both ways: ENOMEM {no_memory}, redirected {done.redirected} and native "
            f"{done.native} bytes, {counted('redirect_pressed')} messages native for it"
        )
        print(said)
        record_property("limited", said)
        assert no_memory == 0
        assert done.redirected > 1_000_000
        if isinstance(group, Limited):
            assert counted("redirect_pressed") > 0


UNBOUNDED = (
    ("include/decide.h", "\treturn high < 2 * rcvbuf ? high : 2 * rcvbuf;", "\treturn high > rcvbuf ? ~0u : ~0u;"),
    ("include/layout.h", "#define REDIRECT_MESSAGES 256\n", "#define REDIRECT_MESSAGES 1073741824\n"),
    ("sk_msg.c", "\t\tseen.pressed = sock_pressed(peer->sock, seen.size);", "\t\tseen.pressed = 0;"),
)


class TestWithoutTheBounds:
    """The same programs without HIGH, without the limit of messages, and without a look at memory pressure."""

    @pytest.fixture(scope="class")
    @classmethod
    def loaded_node(cls, netlab):
        return netlab.node("unbounded", *UNBOUNDED)

    @pytest.mark.parametrize(("size", "sends", "what"), [(1, 4000, "slab"), (65536, 100, "sk_rmem_alloc")])
    def test_an_idle_receiver_holds_more_than_the_bound(self, node, pods, size, sends, what):
        idle = Idle(node, pods, 4)
        try:
            found = measure(idle, size, sends)
            with pytest.raises(AssertionError, match=what):
                check(found, size, 4)
        finally:
            idle.close()

    def test_senders_see_enomem(self, limited_connections):
        no_memory = 0
        _, held = limited_connections(2)
        for one in held:
            with pytest.raises(OSError) as caught:
                for _ in range(1000):
                    one.client.send(bytes(65536))
            no_memory += caught.value.errno == errno.ENOMEM
        assert no_memory > 0
