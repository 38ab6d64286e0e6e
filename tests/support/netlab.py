"""Nodes and pods out of namespaces, cgroups and the real, loaded programs; no process of the mesh.

    lab/NODE/{kubepods/POD, kubelet, ztunnel, agent}        cgroups, as in a cluster
    one namespace per node with a bridge, one per pod       held by descriptors only

Whatever the test process holds dies with it: namespaces, interfaces, puppets. Cgroups and pins carry its pid in
their names, and the next run removes those whose process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ambient.datapath.layout import LAYOUT
from ambient.datapath.values import EnrolledValue, SettingsValue, WorkloadValue, network_range
from ambient.io import bpf_links, cgroup, netns
from ambient.io.bpf_maps import Maps
from tests.support import changed
from tests.support.changed import Change

SO_COOKIE = 57
_CLIENTS = Path(__file__).resolve().parents[1] / "net" / "clients"
_PREFIX = "ambient-test-"


def until(condition: Callable[[], bool], what: str, limit_s: float = 5.0) -> None:
    """Wait for a condition; AssertionError naming it when it does not come true."""
    deadline = time.monotonic() + limit_s
    pause = itertools.chain((0.0, 0.001, 0.005), itertools.repeat(0.02))
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        signal.sigtimedwait([], next(pause))


def run_ip(fd: int, *commands: str) -> None:
    """Run ip(8) commands in a namespace."""
    text = "\n".join(commands)
    done = netns.run_in_netns(
        fd, lambda: subprocess.run(["ip", "-batch", "-"], input=text, text=True, capture_output=True)
    )
    assert done.returncode == 0, f"ip: {done.stderr} in\n{text}"


def new_netns() -> int:
    """A descriptor of a fresh namespace; loopback is up."""
    own: list[int] = []
    home = netns.open_own()

    def make() -> None:
        assert netns._libc.unshare(netns.CLONE_NEWNET) == 0
        own.append(netns.open_own())

    netns.run_in_netns(home, make)
    os.close(home)
    run_ip(own[0], "link set lo up")
    return own[0]


class Puppet:
    """A C process in a namespace and a cgroup; see clients/puppet.c. Refused calls raise OSError."""

    def __init__(self, binary: Path, fd: int, group: Path) -> None:
        self._slots = itertools.count()

        def place() -> None:
            cgroup.move(0, group)
            netns._enter(fd)

        self.process = subprocess.Popen(
            [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, preexec_fn=place
        )

    def begin(self, *words: object) -> None:
        """Send a command whose answer is read later, by `answer`."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the puppet died: {self.process.wait(5)}"
        kind, _, rest = line.strip().partition(" ")
        if kind == "err":
            raise OSError(int(rest), os.strerror(int(rest)))
        return rest.split()

    def call(self, *words: object) -> list[str]:
        self.begin(*words)
        return self.answer()

    def tcp(self, family: int = socket.AF_INET) -> int:
        slot = next(self._slots)
        self.call("tcp", slot, int(family))
        return slot

    def udp(self, family: int = socket.AF_INET) -> int:
        slot = next(self._slots)
        self.call("udp", slot, int(family))
        return slot

    def connect(self, ip: str, port: int) -> int:
        """A new TCP socket, connected."""
        slot = self.tcp(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.call("connect", slot, ip, port)
        return slot

    def listen(self, ip: str, port: int = 80) -> int:
        slot = self.tcp(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.call("option", slot, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.call("bind", slot, ip, port)
        self.call("listen", slot, 64)
        return slot

    def accept(self, listener: int) -> tuple[int, tuple[str, int]]:
        slot = next(self._slots)
        ip, port = self.call("accept", listener, slot)
        return slot, (ip, int(port))

    def name(self, slot: int) -> tuple[str, int]:
        ip, port = self.call("name", slot)
        return ip, int(port)

    def peer(self, slot: int) -> tuple[str, int]:
        ip, port = self.call("peer", slot)
        return ip, int(port)

    def close(self, slot: int) -> None:
        self.call("close", slot)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Pod:
    """A namespace with an address of each family and a cgroup below kubepods."""

    def __init__(self, node: Node, name: str, number: int, families: tuple[int, ...] = (4, 6)) -> None:
        self.node = node
        self.name = name
        self.number = number
        self.workload = number
        self.ip4 = f"10.{node.number}.{number // 200}.{1 + number % 200}" if 4 in families else ""
        self.ip6 = f"fd00:{node.number}::{number}" if 6 in families else ""
        self.fd = new_netns()
        self.cookie = netns.netns_cookie(self.fd)
        self.cgroup = cgroup.create(node.cgroup / "kubepods" / name)
        self.listeners: dict[str, socket.socket] = {}
        self.puppets: list[Puppet] = []
        own = f"/proc/{os.getpid()}/fd/{self.fd}"
        run_ip(
            node.fd,
            f"link add v{number} type veth peer name eth0 netns {own}",
            f"link set v{number} master br0 up",
        )
        commands = ["link set eth0 up"]
        if self.ip4:
            commands += [f"addr add {self.ip4}/16 dev eth0", f"route add default via 10.{node.number}.0.254"]
        if self.ip6:
            commands += [
                f"addr add {self.ip6}/64 dev eth0 nodad",
                f"route add default via fd00:{node.number}::ffff",
            ]
        run_ip(self.fd, *commands)

    @property
    def addresses(self) -> list[str]:
        return [address for address in (self.ip4, self.ip6) if address]

    def puppet(self) -> Puppet:
        """An application of the pod."""
        return self.node.puppet(self.fd, self.cgroup, self.puppets)

    def listener(self, ip: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of the pod's namespace made by the agent."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with self.node.member("agent"):
            sock = netns.create_socket(self.fd, family, kind)
        sock.settimeout(5)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
        return sock

    def enrol(
        self,
        *,
        flows_max: int = LAYOUT["FLOWS_SHARE_DEFAULT"],
        flags: int = 0,
        generation: int = 1,
        identity: int = 0,
        workload_flags: int = 0,
    ) -> None:
        """What the agent does, in its order. Without acceleration in the flags everything goes to ztunnel."""
        with self.node.member("agent"):
            self._listen(generation, workload_flags)
        bpf_links.attach_sk_lookup(self.node.bpffs_dir, self.fd, self.name)
        value = EnrolledValue(self.ip4, self.ip6, self.workload, flows_max=flows_max, flags=flags, identity=identity)
        self.node.maps.put_enrolled(self.cookie, value)

    def _listen(self, generation: int, workload_flags: int) -> None:
        maps = self.node.maps
        for family, loopback, address, anywhere in (
            (4, "127.0.0.1", self.ip4, "0.0.0.0"),
            (6, "::1", self.ip6, "::"),
        ):
            if not address:
                continue
            self.listeners[f"outbound{family}"] = self.listener(loopback, 15001)
            self.listeners[f"plaintext{family}"] = self.listener(loopback, 15006)
            self.listeners[f"hbone{family}"] = self.listener(anywhere, 15008)
            self.listeners[f"dns_tcp{family}"] = self.listener(loopback, 15053)
            self.listeners[f"dns_udp{family}"] = self.listener(loopback, 15053, socket.SOCK_DGRAM)
            plaintext, hbone = self.listeners[f"plaintext{family}"], self.listeners[f"hbone{family}"]
            maps.listeners.put(address, LAYOUT["LISTENER_INBOUND_PLAINTEXT"], plaintext.fileno())
            maps.listeners.put(address, LAYOUT["LISTENER_HBONE"], hbone.fileno())
            local = LAYOUT["WORKLOAD_LOCAL"] | LAYOUT["WORKLOAD_ENROLLED"]
            maps.workloads[address] = WorkloadValue(self.workload, local | workload_flags, generation)

    def leave(self) -> None:
        """Un-enrol."""
        maps = self.node.maps
        maps.enrolled.delete(self.cookie)
        bpf_links.detach_sk_lookup(self.node.bpffs_dir, self.name)
        for address in self.addresses:
            maps.workloads.delete(address)
            for kind in ("LISTENER_INBOUND_PLAINTEXT", "LISTENER_HBONE"):
                maps.listeners.delete(address, LAYOUT[kind])
        for sock in self.listeners.values():
            sock.close()
        self.listeners.clear()

    def ztunnel_accept(self, listener: str = "outbound4") -> tuple[socket.socket, int]:
        """What ztunnel does first: accept, and the cookie of what was accepted."""
        sock, _ = self.listeners[listener].accept()
        sock.settimeout(5)
        return sock, int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)

    def ztunnel_socket(self, family: int = socket.AF_INET) -> socket.socket:
        """A socket of ztunnel in the pod's namespace, bound to the pod's address as for a delivery."""
        with self.node.member("ztunnel"):
            sock = netns.create_socket(self.fd, family, socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.bind((self.ip6 if family == socket.AF_INET6 else self.ip4, 0))
        return sock

    def close(self) -> None:
        for puppet in self.puppets:
            puppet.kill()
        self.leave()
        until(lambda: not cgroup.processes(self.cgroup), f"no process left in {self.cgroup}")
        cgroup.remove(self.cgroup)
        run_ip(self.node.fd, f"link del v{self.number}")
        os.close(self.fd)


class Node:
    """A namespace with a bridge, cgroups, and the programs loaded into them."""

    def __init__(self, lab: Lab, name: str, number: int, changes: Sequence[Change] = ()) -> None:
        self.lab = lab
        self.number = number
        self.sources = changed.copy(lab.scratch / f"bpf-{name}", changes) if changes else None
        self.cgroup = cgroup.create(lab.cgroup / name)
        for part in ("kubepods", "kubelet", "ztunnel", "agent"):
            cgroup.create(self.cgroup / part)
        self.bpffs_dir = Path("/sys/fs/bpf") / f"{_PREFIX}{os.getpid()}-{name}"
        self.ip4 = f"10.{number}.0.254"
        self.ip6 = f"fd00:{number}::ffff"
        self.fd = new_netns()
        run_ip(
            self.fd,
            "link add br0 type bridge",
            "link set br0 up",
            f"addr add {self.ip4}/16 dev br0",
            f"addr add {self.ip6}/64 dev br0 nodad",
        )
        self.puppets: list[Puppet] = []
        self.loader_said = self.load()
        with changed.limits_of(self.sources):
            self.maps = Maps.open(self.bpffs_dir)
        self._numbers = itertools.count(1)
        self.reset()

    def load(self, *extra: str) -> str:
        """Run the loader process."""
        module = ["tests.support.changed", str(self.sources)] if self.sources else ["ambient.io.bpf_load"]
        command = [sys.executable, "-m", *module, "--bpffs-dir", str(self.bpffs_dir)]
        command += ["--node-cgroup", str(self.cgroup), "--pods-cgroup", str(self.cgroup / "kubepods"), *extra]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reset(self, **changes: object) -> None:
        """Write the settings: capture, complete, this lab's cgroups and ranges; ``changes`` on top."""
        values: dict[str, object] = {
            "generation": 1,
            # No agent runs here: it counts as heard of for as long as any test takes.
            "heartbeat_ns": time.monotonic_ns() + 3600 * 10**9,
            "exempt_cgroups": (
                cgroup.cgroup_id(self.cgroup / "ztunnel"),
                cgroup.cgroup_id(self.cgroup / "agent"),
            ),
            "kubelet_cgroups": (cgroup.cgroup_id(self.cgroup / "kubelet"),),
            "cluster_ranges": (network_range("10.96.0.0/12"), network_range("fd00:96::/112")),
            "complete": 1,
        }
        self.maps.settings = SettingsValue(**(values | changes))  # type: ignore[arg-type]

    def beat(self) -> None:
        """The agent's sign of life, for tests that take seconds: without one verdicts count for AGENT_SILENT_S."""
        have = self.maps.settings
        assert have is not None
        self.maps.settings = dataclasses.replace(have, heartbeat_ns=time.monotonic_ns())

    @contextlib.contextmanager
    def member(self, part: str) -> Iterator[None]:
        """The test process is in a cgroup of the node: sockets made now belong there for life."""
        home, target = cgroup.of_pid(os.getpid()), self.cgroup / part
        if home == target:  # nested: moving a process waits for all CPUs
            yield
            return
        cgroup.move(0, target)
        try:
            yield
        finally:
            cgroup.move(0, home)

    def pod(self, name: str = "", families: tuple[int, ...] = (4, 6)) -> Pod:
        number = next(self._numbers)
        return Pod(self, name or f"pod-{number}", number, families)

    def puppet(self, fd: int, group: Path, owned: list[Puppet]) -> Puppet:
        puppet = Puppet(self.lab.binary, fd, group)
        owned.append(puppet)
        return puppet

    def process(self, part: str) -> Puppet:
        """A process in the node's namespace and one of its cgroups (``kubelet``, ``.`` for none)."""
        return self.puppet(self.fd, self.cgroup / part, self.puppets)

    def leftovers(self) -> dict[str, list[object]]:
        """Per-flow entries in the kernel."""
        maps = self.maps
        found = {
            "redirects": maps.redirects,
            "authorized": maps.authorized,
            "origins": maps.origins,
            "flows": maps.flows,
        }
        return {name: table.items() for name, table in found.items() if len(table)}  # type: ignore[attr-defined]

    def counted(self) -> Callable[[str], int]:
        """A function: how often a reason was counted since now."""
        before = self.maps.counters()
        return lambda reason: self.maps.counters()[reason] - before[reason]

    def close(self) -> None:
        for puppet in self.puppets:
            puppet.kill()
        self.maps.close()
        bpf_links.unload(self.bpffs_dir)
        os.close(self.fd)
        cgroup.remove(self.cgroup)


class Lab:
    """Everything of one test session."""

    def __init__(self, scratch: Path) -> None:
        sweep()
        self.scratch = scratch
        self.cgroup = cgroup.create(cgroup.mount_point() / f"{_PREFIX}{os.getpid()}")
        self.binary = scratch / "puppet"
        subprocess.run(["gcc", "-Wall", "-Werror", "-O1", "-o", self.binary, _CLIENTS / "puppet.c"], check=True)
        self.nodes: list[Node] = []

    def node(self, name: str, *changes: Change) -> Node:
        """Another node; with ``changes`` its programs are changed so."""
        node = Node(self, name, len(self.nodes) + 1, changes)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        cgroup.remove(self.cgroup)


def sweep() -> None:
    """Remove what crashed sessions left: cgroups and pins named after processes that are gone."""
    for path in [*cgroup.mount_point().glob(f"{_PREFIX}*"), *Path("/sys/fs/bpf").glob(f"{_PREFIX}*")]:
        match = re.fullmatch(rf"{_PREFIX}(\d+)(-.*)?", path.name)
        if match is None or Path(f"/proc/{match[1]}").exists():
            continue
        if path.is_relative_to("/sys/fs/bpf"):
            bpf_links.unload(path)
        else:
            cgroup.kill(path)
            until(lambda path=path: cgroup.remove(path), f"{path} is empty")
