"""Real processes and real descriptors: listeners outlive every process of the node."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from ambient.io import seqpacket
from ambient.node import messages as m
from ambient.node.children import Child, restart_delay_s, write_pid
from ambient.settings import NodeSettings
from tests.support.require import require

CHILDREN = Path(__file__).with_name("holder_children.py")
Packets = seqpacket.PacketSocket[m.Message]
_PAUSE = threading.Event()


def until(condition: Callable[[], object], within_s: float = 10.0) -> object:
    end = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, "did not come about in time"
        _PAUSE.wait(0.01)


class Node:
    """One holder with its children, in a directory of its own; the test is the agent that talks to it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config = run_dir / "node.json"
        settings = NodeSettings(node_name="n1", run_dir=str(run_dir), drain_s=1.0)
        self.config.write_bytes(msgspec.json.encode(settings))
        self.holders: list[subprocess.Popen[bytes]] = []
        self.agents: list[Packets] = []

    def start(self) -> subprocess.Popen[bytes]:
        argv = [sys.executable, str(CHILDREN), "holder", str(self.config)]
        self.holders.append(subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": os.getcwd()}))
        return self.holders[-1]

    def events(self, kind: str) -> list[dict[str, object]]:
        try:
            lines = (self.run_dir / "events").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def pid(self, role: str) -> int:
        def read() -> int:
            try:
                return int((self.run_dir / f"{role}.pid").read_text())
            except (FileNotFoundError, ValueError):
                return 0

        return int(until(read))  # type: ignore[call-overload]

    def agent(self, holds: tuple[str, ...] = ()) -> tuple[Packets, dict[str, tuple[int, ...]]]:
        """Connect as an agent; also what the holder has."""
        sock: list[socket.socket] = []

        def connect() -> bool:
            try:
                sock.append(seqpacket.connect(self.run_dir / "holder.sock"))
            except OSError:
                return False
            return True

        until(connect)
        sock[0].settimeout(10)
        packets = seqpacket.PacketSocket(sock[0], m.Message)
        packets.send(m.Hello(role="agent", pid=os.getpid(), holds=holds))
        self.agents.append(packets)
        had: dict[str, tuple[int, ...]] = {}
        while True:
            got = packets.receive()
            assert got is not None
            match got:
                case (m.SnapshotSent(), _):
                    return packets, had
                case (m.PodPut(pod=pod), fds):
                    had[pod.uid] = fds

    def stop(self) -> None:
        for packets in self.agents:
            packets.close()
        for holder in self.holders:
            if holder.poll() is None:
                holder.terminate()
                try:
                    holder.wait(10)
                except subprocess.TimeoutExpired:
                    holder.kill()
                    holder.wait()
        for role in ("agent", "ztunnel"):  # of a killed holder
            try:
                pid = int((self.run_dir / f"{role}.pid").read_text())
                if str(self.config).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except (OSError, ValueError):
                pass


@pytest.fixture
def node() -> Iterator[Node]:
    require("root")
    with tempfile.TemporaryDirectory(prefix="ambient-holder-") as directory:
        node = Node(Path(directory))
        node.start()
        try:
            yield node
        finally:
            node.stop()


def listening() -> tuple[socket.socket, int]:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    return sock, sock.getsockname()[1]


def pod(uid: str, name: str = "web") -> m.Pod:
    return m.Pod(
        uid=uid,
        workload_uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        service_account="default",
        trust_domain="cluster.local",
        addresses=("10.0.0.1",),
        netns_cookie=7,
        workload=1,
    )


def put(packets: Packets, what: m.Pod, listener: socket.socket) -> m.Ack:
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    packets.send(m.PodPut(pod=what, fds=(m.NETNS, "outbound4")), (netns, listener.fileno()))
    os.close(netns)
    return answer(packets)


def answer(packets: Packets) -> m.Ack:
    got = packets.receive()
    assert got is not None and isinstance(got[0], m.Ack)
    return got[0]


def served_by(port: int) -> int:
    """Connect; the process that accepted. The connection waits in the listener while nobody accepts."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        return int(connection.recv(16))


def test_ztunnel_gets_the_listeners_of_a_pod_and_loses_them_with_it(node: Node) -> None:
    packets, had = node.agent()
    assert had == {}
    listener, port = listening()
    assert put(packets, pod("u1"), listener) == m.Ack(uid="u1")
    listener.close()
    assert served_by(port) == node.pid("ztunnel")
    packets.send(m.PodRemove(uid="u1", drain_s=0))
    assert answer(packets) == m.Ack(uid="u1")
    with pytest.raises(ConnectionRefusedError):
        served_by(port)


def test_a_killed_ztunnel_is_back_within_a_second_with_the_same_listeners(node: Node) -> None:
    packets, _ = node.agent()
    listener, port = listening()
    put(packets, pod("u1"), listener)
    listener.close()
    old = node.pid("ztunnel")
    os.kill(old, signal.SIGKILL)
    killed = time.monotonic()
    new = served_by(port)  # connected while nobody accepts: it waits
    assert new != old and new == node.pid("ztunnel")
    assert time.monotonic() - killed < 1.5  # the interpreter's own start is in it
    packets.send(m.PodRemove(uid="u1", drain_s=0))
    assert answer(packets).error == ""


def test_a_killed_agent_is_back_within_a_second_and_finds_its_listeners(node: Node) -> None:
    packets, _ = node.agent()
    listener, port = listening()
    put(packets, pod("u1"), listener)
    listener.close()
    old = node.pid("agent")
    packets.close()
    until(lambda: node.events("agent"))
    os.kill(old, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(node.events("agent")) == 2)
    assert time.monotonic() - killed < 1.5
    assert node.pid("agent") != old
    _, had = node.agent()
    assert list(had) == ["u1"]
    returned = socket.socket(fileno=had["u1"][1])
    assert returned.getsockname()[1] == port
    returned.close()
    assert served_by(port) == node.pid("ztunnel")


def test_a_new_holder_adopts_the_processes_and_takes_the_listeners_back(node: Node) -> None:
    packets, _ = node.agent()
    listener, port = listening()
    put(packets, pod("u1"), listener)
    listener.close()
    before = node.pid("ztunnel"), node.pid("agent")
    packets.close()
    node.holders[0].kill()
    node.holders[0].wait()
    assert served_by(port) == before[0]  # without a holder
    node.start()
    packets, had = node.agent()
    assert list(had) == ["u1"]  # the snapshot waited for ztunnel's
    assert (node.pid("ztunnel"), node.pid("agent")) == before
    os.kill(before[0], signal.SIGKILL)
    assert served_by(port) not in before
    packets.send(m.PodRemove(uid="u1", drain_s=0))
    assert answer(packets).error == ""
    with pytest.raises(ConnectionRefusedError):
        for fd in had["u1"]:
            os.close(fd)
        served_by(port)


@pytest.mark.parametrize("in_cgroup", [False, True])
def test_a_stranger_with_the_same_number_and_arguments_is_not_adopted(tmp_path: Path, in_cgroup: bool) -> None:
    group = tmp_path / "group"
    group.mkdir()
    child = Child("ztunnel", (sys.executable, "60"), str(group) if in_cgroup else "", tmp_path / "ztunnel.pid")
    stranger = subprocess.Popen([sys.executable, "60"], executable="/bin/sleep")
    try:
        write_pid(child.pid_file, stranger.pid)
        until(lambda: b"\x0060\0" in Path(f"/proc/{stranger.pid}/cmdline").read_bytes())  # exec is a little later
        (group / "cgroup.procs").write_text("1\n")
        assert not child.adopt(0.0) and not child.running
        (group / "cgroup.procs").write_text(f"1\n{stranger.pid}\n")
        assert child.adopt(0.0) is in_cgroup
    finally:
        stranger.kill()
        stranger.wait()


def test_an_agent_that_outlived_the_holder_gives_its_descriptors_back(node: Node) -> None:
    listener, port = listening()
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    node.pid("holder")
    node.agent()[0].close()  # it listens
    sock = seqpacket.connect(node.run_dir / "holder.sock")
    packets = seqpacket.PacketSocket(sock, m.Message)
    packets.send(m.Hello(role="agent", pid=os.getpid(), holds=("u9",)))
    got = packets.receive()
    assert got is not None and got[0] == m.ReturnPods(uids=("u9",))
    packets.send(m.PodPut(pod=pod("u9"), fds=(m.NETNS, "outbound4")), (netns, listener.fileno()))
    listener.close()
    os.close(netns)
    replies = [packets.receive(), packets.receive()]
    assert {type(reply[0]) for reply in replies if reply} == {m.SnapshotSent, m.Ack}
    assert served_by(port) == node.pid("ztunnel")
    packets.close()


def test_an_upgrade_hands_over_without_a_refused_connection(node: Node) -> None:
    packets, _ = node.agent()
    listener, port = listening()
    put(packets, pod("u1"), listener)
    listener.close()
    old = node.pid("ztunnel")
    served: list[int] = [served_by(port)]
    node.holders[0].send_signal(signal.SIGHUP)
    until(lambda: served.append(served_by(port)) or len(set(served)) == 2)
    until(lambda: node.events("drained"))
    assert node.events("drained")[0]["pid"] == old
    served += [served_by(port) for _ in range(20)]
    assert set(served[-20:]) == {node.pid("ztunnel")}
    assert node.pid("ztunnel") != old


def test_a_refusal_of_ztunnel_reaches_the_agent(node: Node) -> None:
    packets, _ = node.agent()
    listener, _ = listening()
    with listener:
        assert put(packets, pod("u1", "odd"), listener).error == "too odd"


def test_a_ztunnel_that_does_not_answer_is_reported_in_time(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    packets, _ = node.agent()
    listener, _ = listening()
    with listener:
        assert "did not answer in time" in put(packets, pod("u1", "unanswered"), listener).error


def test_names_and_descriptors_that_do_not_match_are_refused(node: Node) -> None:
    packets, _ = node.agent()
    listener, _ = listening()
    with listener:
        for names in (("outbound4", m.NETNS), (m.NETNS, "outbound9"), (m.NETNS, m.NETNS)):
            packets.send(m.PodPut(pod=pod("u1"), fds=names), (listener.fileno(), listener.fileno()))
            assert answer(packets).error
        assert put(packets, pod("u1"), listener).error == ""


def test_garbage_ends_the_connection_and_not_the_holder(node: Node) -> None:
    node.agent()
    no_text = msgspec.msgpack.encode(m.Hello(role="agent", pid=1)).replace(b"agent", b"\xff\xfe\xfd\xfc\xfb")
    for raw in (
        b"\xff\xfe",
        b"\x80",
        msgspec.msgpack.encode({"type": "Hello"}),
        no_text,
        b"x" * (m.MESSAGE_BYTES_MAX + 1),
    ):
        sock = seqpacket.connect(node.run_dir / "holder.sock")
        sock.settimeout(5)
        sock.send(raw)
        assert sock.recv(10) == b""
        sock.close()
    packets, _ = node.agent()
    assert packets.fileno() >= 0 and node.holders[0].poll() is None


def test_a_second_holder_is_refused(node: Node) -> None:
    node.agent()
    second = node.start()
    assert second.wait(10) != 0
    assert node.holders[0].poll() is None


def test_sigterm_ends_the_agent_and_then_ztunnel_which_drains(node: Node) -> None:
    node.agent()
    until(lambda: node.events("snapshot") and node.events("agent"))
    agent, ztunnel = node.pid("agent"), node.pid("ztunnel")
    node.holders[0].terminate()
    assert node.holders[0].wait(10) == 0
    kinds = [json.loads(line)["event"] for line in (node.run_dir / "events").read_text().splitlines()]
    assert kinds.index("agent_ended") < kinds.index("drained")
    for pid in (agent, ztunnel):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_dead_child_is_collected(node: Node) -> None:
    until(lambda: node.events("agent"))
    old = node.pid("agent")
    os.kill(old, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{old}").exists())


def test_restarts_slow_down_only_after_repeated_quick_deaths() -> None:
    assert restart_delay_s(1) == 0.0
    delays = [restart_delay_s(n) for n in range(1, 12)]
    assert delays == sorted(delays) and delays[1] < 1.0 and delays[-1] == 15.0
