"""Two pods in network namespaces, a worker process for each, and the control process's answers.

The workers are the product's, fed by the product's messages; only the kernel maps are replaced (worker_main).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from ambient.io import netns, seqpacket
from ambient.node import messages as node
from tests.ztunnel.authority import Authority
from ztunnel.core import messages as m

ROOT = Path(__file__).resolve().parents[2]
Socket = socket.socket
_numbers = itertools.count(1)


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> Any:
    """Poll ``condition`` until it is true and return it; fail naming ``what``."""
    end = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        pause.wait(0.01)


class Space:
    """A network namespace of a pod with one IPv4 and one IPv6 address."""

    def __init__(self, name: str, ip4: str, ip6: str) -> None:
        self.name = name
        self.ip4 = ip4
        self.ip6 = ip6
        self.fd = netns.open_netns(f"/run/netns/{name}")
        self.sockets: list[Socket] = []

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Socket:
        return netns.create_socket(self.fd, family, kind)

    def listen(self, ip: str, port: int, device: str = "", backlog: int = 4096) -> Socket:
        sock = self.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in ip:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sock.bind((ip, port))
        sock.listen(backlog)
        self.sockets.append(sock)
        return sock

    def connect(self, ip: str, port: int, timeout_s: float = 20.0) -> Socket:
        sock = self.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        sock.settimeout(timeout_s)
        try:
            sock.connect((ip, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def run(self, *command: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", "netns", "exec", self.name, *command], text=True, **kwargs)

    def start(self, *command: str, **kwargs: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **kwargs)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        os.close(self.fd)


@contextlib.contextmanager
def two_spaces() -> Iterator[tuple[Space, Space]]:
    """Two namespaces joined by a veth; gone afterwards."""
    prefix = f"tunnel{os.getpid()}n{next(_numbers)}"
    names = (f"{prefix}a", f"{prefix}b")
    ip = shutil.which("ip") or "/sbin/ip"

    def do(*args: str) -> None:
        subprocess.run([ip, *args], check=True, capture_output=True)

    try:
        for name in names:
            do("netns", "add", name)
        do("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for index, name in enumerate(names, 1):
            do("-n", name, "link", "set", "lo", "up")
            do("-n", name, "addr", "add", f"10.77.0.{index}/24", "dev", "eth0")
            do("-n", name, "addr", "add", f"fd77::{index}/64", "dev", "eth0", "nodad")
            do("-n", name, "link", "set", "eth0", "up")
        spaces = [Space(name, f"10.77.0.{index}", f"fd77::{index}") for index, name in enumerate(names, 1)]
        try:
            yield spaces[0], spaces[1]
        finally:
            for space in spaces:
                space.close()
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True)


class Control:
    """The control process of one worker: answers from tables, keeps what it is told."""

    def __init__(self, sock: socket.socket, authority: Authority) -> None:
        self.authority = authority
        self.routes: dict[tuple[str, int], m.Route] = {}
        self.verdict: Callable[[m.AskVerdict], m.Verdict | None] = allow_all
        self.certificates: dict[str, m.Certificate] = {}
        self.issue = True
        self.asked: list[m.Message] = []
        self.events: list[m.ConnectionEvent] = []
        self.keep_events = True
        self.event_count = 0
        self.counters: dict[str, int] = {}
        self.connections: m.Connections | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(m.Message)
        self._lock = threading.Lock()
        self.attach(sock)

    def attach(self, sock: socket.socket) -> None:
        self._sock = sock
        threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def send(self, message: m.Message) -> None:
        raw = self._encoder.encode(message)
        with self._lock:
            self._sock.sendall(struct.pack(">I", len(raw)) + raw)

    def die(self) -> None:
        """As the control process does when it is killed."""
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _serve(self, sock: socket.socket) -> None:
        buffer = bytearray()
        while True:
            try:
                data = sock.recv(1 << 20)
            except OSError:
                return
            if not data:
                return
            buffer += data
            while len(buffer) >= 4:
                length = struct.unpack_from(">I", buffer)[0]
                if len(buffer) < 4 + length:
                    break
                message = self._decoder.decode(bytes(buffer[4 : 4 + length]))
                del buffer[: 4 + length]
                with contextlib.suppress(OSError):
                    self._answer(message)

    def _answer(self, message: m.Message) -> None:
        if not isinstance(message, m.Events):
            self.asked.append(message)
        match message:
            case m.AskRoute(source=source, ip=ip, port=port):
                route = self.routes.get((ip, port))
                if route is not None:
                    self.send(msgspec.structs.replace(route, source=source, ip=ip, port=port))
            case m.AskVerdict():
                verdict = self.verdict(message)
                if verdict is not None:
                    self.send(verdict)
            case m.AskCertificate(identity=identity):
                if self.issue:
                    known = self.certificates.get(identity)
                    self.send(known if known is not None else self.authority.certificate(identity))
            case m.Events(events=events, counters=counters):
                self.event_count += len(events)
                if self.keep_events:
                    self.events.extend(events)
                for name, by in counters.items():
                    self.counters[name] = self.counters.get(name, 0) + by
            case m.Connections():
                self.connections = message


def allow_all(question: m.AskVerdict) -> m.Verdict:
    return verdict_for(question, allow=True)


def verdict_for(
    question: m.AskVerdict, *, allow: bool, generation: int = 1, by_ip: bool = False, **more: str
) -> m.Verdict:
    return m.Verdict(
        destination=question.destination,
        destination_ip=question.destination_ip,
        port=question.port,
        identity=question.identity,
        source_ip=question.source_ip if by_ip else "",
        generation=generation,
        allow=allow,
        **more,
    )


class WorkerProcess:
    """One worker with its control; ``put`` gives it a pod."""

    def __init__(
        self,
        authority: Authority,
        *,
        original: tuple[str, int] = ("0.0.0.0", 0),
        client: str = "0.0.0.0",
        settings: dict[str, Any] | None = None,
    ) -> None:
        parent, parent_theirs = seqpacket.pair()
        control, control_theirs = socket.socketpair()
        self.parent: seqpacket.PacketSocket[Any] = seqpacket.PacketSocket(parent, node.Message | m.ControlChannel)
        parent.settimeout(10)
        self.control = Control(control, authority)
        arguments = [str(parent_theirs.fileno()), str(control_theirs.fileno()), original[0], str(original[1]), client]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ztunnel.worker_main", *arguments, json.dumps(settings or {})],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=(parent_theirs.fileno(), control_theirs.fileno()),
        )
        parent_theirs.close()
        control_theirs.close()

    def put(self, pod: node.Pod, space: Space, listeners: dict[str, socket.socket]) -> node.Ack:
        fds = [space.fd, *(sock.fileno() for sock in listeners.values())]
        self.parent.send(node.PodPut(pod=pod, fds=(node.NETNS, *listeners)), fds)
        return self._ack()

    def remove(self, uid: str, drain_s: float) -> node.Ack:
        self.parent.send(node.PodRemove(uid=uid, drain_s=drain_s))
        return self._ack()

    def _ack(self) -> node.Ack:
        packet = self.parent.receive()
        assert packet is not None and isinstance(packet[0], node.Ack)
        return packet[0]

    def new_control(self) -> None:
        """A restarted control process."""
        ours, theirs = socket.socketpair()
        self.control.attach(ours)
        self.parent.send(m.ControlChannel(), [theirs.fileno()])
        theirs.close()

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.parent.close()
        with contextlib.suppress(OSError):
            self.control.die()


def pod(name: str, space: Space, account: str = "") -> node.Pod:
    return node.Pod(
        uid=f"uid-{name}",
        workload_uid=f"Kubernetes//Pod/shop/{name}",
        name=name,
        namespace="shop",
        service_account=account or name,
        trust_domain="cluster.local",
        addresses=(space.ip4, space.ip6),
        netns_cookie=0,
        workload=1,
    )


def spiffe(account: str, domain: str = "cluster.local") -> str:
    return f"spiffe://{domain}/ns/shop/sa/{account}"


class Mesh:
    """Client pod a and server pod b, a worker each; whatever a dials is routed to b's ``port``."""

    def __init__(
        self, a: Space, b: Space, *, port: int = 8080, ipv6: bool = False, settings: dict[str, Any] | None = None
    ):
        self.a, self.b, self.port = a, b, port
        self.authority = Authority()
        self.ip = b.ip6 if ipv6 else b.ip4
        source_ip = a.ip6 if ipv6 else a.ip4
        self.vip = ("fd00:99::1" if ipv6 else "10.99.0.1", 80)
        self.client = WorkerProcess(self.authority, original=self.vip, client=source_ip, settings=settings)
        self.server = WorkerProcess(self.authority, settings=settings)
        self.set_route()
        self.pod_a, self.pod_b = pod("a", a), pod("b", b)
        loopback = "::1" if ipv6 else "127.0.0.1"
        suffix = "6" if ipv6 else "4"
        self.entrance = (loopback, 15001)
        assert not self.client.put(self.pod_a, a, {f"outbound{suffix}": a.listen(loopback, 15001)}).error
        self.hbone = b.listen("::" if ipv6 else "0.0.0.0", 15008)
        assert not self.server.put(self.pod_b, b, {f"hbone{suffix}": self.hbone}).error

    def route(self, **changes: Any) -> m.Route:
        authority = f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"
        hop = m.Hop(
            ip=self.ip,
            port=15008,
            authority=authority,
            identities=(spiffe("b"),),
            destination="Kubernetes//Pod/shop/b",
            endpoint=authority,
        )
        route = m.Route(
            source="uid-a",
            ip=self.vip[0],
            port=self.vip[1],
            generation=1,
            kind="hbone",
            hops=(hop,),
            service="shop/b.shop.svc.cluster.local",
            identity=spiffe("a"),
            baggage="k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=a,service.name=a",
        )
        return msgspec.structs.replace(route, **changes)

    def set_route(self, **changes: Any) -> None:
        self.client.control.routes[self.vip] = self.route(**changes)

    def connect(self) -> Socket:
        """What the application of pod a does, after the hook rewrote it."""
        return self.a.connect(*self.entrance)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@contextlib.contextmanager
def mesh(**options: Any) -> Iterator[Mesh]:
    with two_spaces() as (a, b):
        it = Mesh(a, b, **options)
        try:
            yield it
        finally:
            it.close()
