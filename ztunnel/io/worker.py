"""One worker process: an event loop, the pods it was given, the tunnels between them and the rest.

It holds no World, no keys on disk and no threads. Descriptors and pods come from the parent over a packet
socket, decisions and certificates from the control process over a stream; events and counters go back there.
"""

from __future__ import annotations

import gc
import resource
import signal
import socket
import sys
import time
import traceback
from typing import Final, Protocol

from ambient.datapath.values import Admission
from ambient.errors import AmbientError, LayoutMismatch, PeerFault
from ambient.io import seqpacket
from ambient.io.bpf_maps import Maps
from ambient.io.logs import one_line
from ambient.node import messages as node
from ambient.settings import NodeSettings
from ztunnel.core.hbone import Authorities, Requests
from ztunnel.core.messages import ORPHAN_S, Connections, ControlChannel, Events
from ztunnel.core.output import BufferPool
from ztunnel.core.pool import Pool
from ztunnel.io.client_tunnel import ClientTunnel
from ztunnel.io.ledger import Ledger
from ztunnel.io.link import Link
from ztunnel.io.pods import PodState
from ztunnel.io.relay import Relay
from ztunnel.io.server_tunnel import Places
from ztunnel.io.sockets import Expiring, Namespaces, Socket
from ztunnel.io.tunnel import Tunnel
from ztunnel.io.turns import Timer, Turns

TICK_S: Final = 1.0
UNREADY_S: Final = 3.0
"""How long a pod's connections wait in its listeners for the first certificate before they are accepted anyway."""
_DRAIN_TICK_S: Final = 0.1
_SOON_S: Final = 0.05
_SCRATCH_BYTES: Final = 256 * 1024
_RELAYS_OF_POD_MIN: Final = 64
_LEVELS: Final = ("error", "warn", "info", "debug", "trace")
_DEBUG: Final = 3


class Redirect(Protocol):
    """What the kernel recorded of a captured connection; an empty endpoint is none."""

    @property
    def original(self) -> str: ...
    @property
    def original_port(self) -> int: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def endpoint_port(self) -> int: ...
    @property
    def client(self) -> str: ...
    @property
    def client_port(self) -> int: ...


class Kernel(Protocol):
    """The kernel maps as a worker uses them; `ambient.io.bpf_maps.Maps` is one. Raises AmbientError."""

    def redirect_of(self, cookie: int) -> Redirect | None: ...

    def authorize_delivery(self, admission: Admission) -> None: ...

    def withdraw_delivery(self, admission: Admission) -> None: ...


class LazyMaps:
    """The pinned maps, opened when first needed: until then captured connections are closed, none delivered."""

    def __init__(self, bpffs_dir: str) -> None:
        self._directory = bpffs_dir
        self._maps: Maps | None = None

    def _open(self) -> Maps:
        if self._maps is None:
            self._maps = Maps.open(self._directory)
        return self._maps

    def redirect_of(self, cookie: int) -> Redirect | None:
        try:
            return self._open().redirect_of(cookie)
        except LayoutMismatch:
            return None

    def authorize_delivery(self, admission: Admission) -> None:
        self._open().authorize_delivery(admission)

    def withdraw_delivery(self, admission: Admission) -> None:
        self._open().withdraw_delivery(admission)


class Worker:
    """Everything of one process. Construct, `attach_parent` and ``link.attach``, then `run`."""

    def __init__(self, settings: NodeSettings, kernel: Kernel) -> None:
        self.settings = settings
        self.kernel = kernel
        self.turns = turns = Turns(self._flush, self.fault)
        self.now = turns.now
        self.add_reader = turns.add_reader
        self.pause_reader = turns.pause_reader
        self.remove_reader = turns.remove_reader
        self.add_writer = turns.add_writer
        self.remove_writer = turns.remove_writer
        self.forget = turns.forget
        self.later = turns.later
        self.soon = turns.soon
        self.buffers = BufferPool()
        self.ciphertext = memoryview(bytearray(_SCRATCH_BYTES))
        """Scratch of the running callback only."""
        self.plaintext = memoryview(bytearray(_SCRATCH_BYTES + 2 * 16384))
        self.namespaces = Namespaces()
        self.requests = Requests()
        self.authorities = Authorities()
        self.pool: Pool[ClientTunnel] = Pool()
        self.pods: dict[str, PodState] = {}
        self.tunnels: set[Tunnel] = set()
        self.places = Places()
        self.relays_of_pod = max(_RELAYS_OF_POD_MIN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        """Connections of one pod: with two descriptors each they are half of what this process may have."""
        self.delivering: set[tuple[str, int]] = set()
        """Addresses our deliveries come from: one that comes back to a capture listener is a loop."""
        self.link = Link(self)
        self.ledger = Ledger(self._send_events, self._flush_soon)
        self._flush_pending = False
        self._flushing: list[Tunnel] = []
        self._deadlines: dict[Expiring, float] = {}
        self._parent: seqpacket.PacketSocket[node.PodPut] | None = None
        self._parent_fd = -1
        self._acks: list[node.Ack] = []
        self._level = 2
        self.set_level(settings.log_level)
        self._stopping = False
        self._next_tick: Timer | None = None

    # --- services for the parts ----------------------------------------------------------------------------

    def flush_later(self, tunnel: Tunnel) -> None:
        """Flush at the end of this turn of the loop: one TLS write for all that became readable in it."""
        self._flushing.append(tunnel)

    def _flush(self) -> None:
        if not self._flushing:
            return
        tunnels, self._flushing = self._flushing, []
        for tunnel in tunnels:
            if tunnel.scheduled:
                try:
                    tunnel.flush()
                except Exception as error:  # one tunnel's bug must not keep the others' bytes
                    self.count("tunnel_faults")
                    self.log("error", f"tunnel to {tunnel.remote[0]}: {type(error).__name__}: {error}")
                    tunnel.close("internal fault", "-")

    def expire(self, thing: Expiring, after_s: float) -> None:
        """Call ``thing.expired()`` after (about) so long, unless `keep` is called before."""
        self._deadlines[thing] = self.now() + after_s

    def keep(self, thing: Expiring) -> None:
        self._deadlines.pop(thing, None)

    def count(self, name: str, by: int = 1) -> None:
        self.ledger.count(name, by)

    def log(self, level: str, text: str) -> None:
        """One line on stderr, which the parent keeps."""
        if _LEVELS.index(level) <= self._level:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            sys.stderr.write(f"{stamp}\t{level}\tworker\t{one_line(text)}\n")

    def set_level(self, level: str) -> None:
        """An unknown level changes nothing."""
        if level in _LEVELS:
            self._level = _LEVELS.index(level)
            self.ledger.tell_openings = self._level >= _DEBUG

    def connections(self, number: int) -> Connections:
        """What is open, for the control process."""
        tunnels = tuple(
            {
                "local": f"{tunnel.local[0]}:{tunnel.local[1]}",
                "remote": f"{tunnel.remote[0]}:{tunnel.remote[1]}",
                "peer": str(tunnel.peer or ""),
                "pod": tunnel.pod.pod.uid,
                "role": tunnel.role.value,
                "streams": len(tunnel.connection.streams) if tunnel.connection is not None else 0,
            }
            for tunnel in list(self.tunnels)[:4096]
        )
        return Connections(number=number, rows=self.ledger.rows(self.now())[:65536], tunnels=tunnels)

    def _send_events(self, events: Events) -> None:
        self.link.send(events)

    def _flush_soon(self) -> None:
        if not self._flush_pending:
            self._flush_pending = True
            self.later(_SOON_S, self._flush_ledger)

    def _flush_ledger(self) -> None:
        self._flush_pending = False
        self.ledger.flush()

    # --- time ----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self.now()
        if self._next_tick is not None:
            self._next_tick.cancel()
        self._next_tick = self.later(_DRAIN_TICK_S if self._stopping else TICK_S, self._tick)
        for thing in [thing for thing, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[thing]
            thing.expired()
        for tunnel in list(self.tunnels):
            tunnel.tick(now)
        for idle in self.pool.take_idle(now):
            idle.shut("idle")
        self.link.tick(now)
        for uid, pod in list(self.pods.items()):
            if pod.tick(now):
                self._forget(uid)
        self.ledger.tick(now)
        if self._stopping and not self.pods:
            self.turns.stop(0)

    # --- pods ----------------------------------------------------------------------------------------------

    def put_pod(self, pod: node.Pod, fds: dict[str, int]) -> None:
        """A pod was enrolled, or came again with other listeners; owns the descriptors from now on."""
        known = self.pods.get(pod.uid)
        if known is not None and known.renew(pod, fds):
            return
        state = PodState(self, pod, fds)
        if known is not None:
            known.close("the pod was enrolled again as somebody else, or in another sandbox")
        self.pods[pod.uid] = state
        self.link.want(state.identity)
        if self._stopping:
            state.begin_drain(self.now(), 0)
        else:
            # A worker that just began leaves new connections to those before it while it has no certificates.
            self.link.credential(state.identity, lambda credential: state.start())
            self.later(UNREADY_S, state.start)

    def remove_pod(self, uid: str, drain_s: float) -> None:
        pod = self.pods.get(uid)
        if pod is None:
            return
        pod.begin_drain(self.now(), drain_s)
        if drain_s <= 0:
            pod.close("the pod is gone")
            self._forget(uid)

    def _forget(self, uid: str) -> None:
        pod = self.pods.pop(uid)
        self.link.decisions.forget_pod(uid)
        if not any(other.identity == pod.identity for other in self.pods.values()):
            self.link.unwant(pod.identity)

    # --- the parent ----------------------------------------------------------------------------------------

    def attach_parent(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._parent = seqpacket.PacketSocket(sock, node.Message | ControlChannel)
        self._parent_fd = sock.fileno()
        self.add_reader(self._parent_fd, self._parent_readable)

    def _parent_readable(self) -> None:
        parent = self._parent
        if parent is None:
            return
        try:
            packet = parent.receive()
        except BlockingIOError:
            return
        except PeerFault as fault:
            self.count("parent_messages_refused")
            self.log("error", f"the parent sent what is no message: {fault}")
            return
        except OSError as error:
            self.log("error", f"the parent: {error}")
            packet = None
        if packet is None:
            self.remove_reader(self._parent_fd)
            self._parent = None
            self.log("warn", "the parent is gone; serving on until the next ztunnel does")
            self.later(ORPHAN_S, lambda: self.stop(self.settings.drain_s))
            return
        message, fds = packet
        self._handle(message, fds)

    def _handle(self, message: object, fds: tuple[int, ...]) -> None:
        match message:
            case node.PodPut(pod=pod, fds=names):
                error = ""
                try:
                    self.put_pod(pod, dict(zip(names, fds, strict=True)))
                except (AmbientError, OSError, ValueError) as fault:
                    error = f"pod {pod.namespace}/{pod.name}: {fault}"
                    self.log("error", error)
                    if pod.uid not in self.pods:
                        seqpacket.close_all(fds)
                self._acknowledge(pod.uid, error)
            case node.PodRemove(uid=uid, drain_s=drain_s):
                seqpacket.close_all(fds)
                self.remove_pod(uid, drain_s)
                self._acknowledge(uid, "")
            case ControlChannel() if len(fds) == 1:
                self.link.attach(Socket(fileno=fds[0]))
            case _:
                seqpacket.close_all(fds)

    def _acknowledge(self, uid: str, error: str) -> None:
        self._acks.append(node.Ack(uid=uid, error=error))
        if len(self._acks) == 1:
            self._send_acks()

    def _send_acks(self) -> None:
        self.remove_writer(self._parent_fd)
        parent = self._parent
        while self._acks and parent is not None:
            try:
                parent.send(self._acks[0])  # type: ignore[arg-type]
            except BlockingIOError:
                self.add_writer(self._parent_fd, self._send_acks)
                return
            except OSError:
                self._acks.clear()
                return
            self._acks.pop(0)

    def fault(self, error: BaseException) -> None:
        """A callback raised what nobody expected: a bug. It costs the connection or tunnel it happened in."""
        self.count("faults")
        self.log("error", "".join(traceback.format_exception(error)))
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        for thing in reversed(frames):
            if isinstance(thing, Relay):
                thing.abort("internal fault")
                return
            if isinstance(thing, Tunnel):
                thing.close("internal fault", "-")
                return

    # --- life ----------------------------------------------------------------------------------------------

    def stop(self, grace_s: float) -> None:
        """Drain: accept nothing, let connections finish for ``grace_s``, then end."""
        self._stopping = True
        now = self.now()
        for pod in self.pods.values():
            pod.begin_drain(now, grace_s)
        self.later(_DRAIN_TICK_S, self._tick)

    def run(self) -> int:
        """Until `stop` has drained. Returns the exit status."""
        self._tick()
        status = self.turns.run()
        self.ledger.flush()
        self.link.detach()
        return status


def run_worker(settings: NodeSettings, parent_fd: int, control_fd: int, kernel: Kernel | None = None) -> int:
    """Run as one worker until SIGTERM and its drain, or the parent's end; returns the exit status.

    ``parent_fd``: SOCK_SEQPACKET, node messages with descriptors. ``control_fd``: the stream to the control
    process, or -1 if it comes later (ControlChannel). Call in a process of its own without threads.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)

    worker = Worker(settings, kernel or LazyMaps(settings.bpffs_dir))
    worker.turns.on_signal(signal.SIGTERM, lambda: worker.stop(settings.drain_s))
    worker.turns.on_signal(signal.SIGINT, lambda: None)
    worker.attach_parent(socket.socket(fileno=parent_fd))
    if control_fd >= 0:
        worker.link.attach(Socket(fileno=control_fd))
    return worker.run()
