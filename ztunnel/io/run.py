"""ztunnel's parent: takes the pods' listeners from the holder, forks workers and, last, the control process.

It starts no thread and imports no grpc, so that forking it is safe at any time, also to replace a child that
died. It keeps a duplicate of every descriptor: for children that start later, and for a new holder that lost
them (ReturnPods). It outlives the holder, and knows nothing of what the sockets are for.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ambient.errors import AmbientError
from ambient.io import seqpacket
from ambient.io.secrecy import no_dumps
from ambient.io.seqpacket import PacketSocket
from ambient.node import messages as m
from ambient.settings import NodeSettings
from ztunnel.core.messages import ControlChannel, Draining, WorkerChannel
from ztunnel.io import logs
from ztunnel.io.child import Child, Pending
from ztunnel.io.descriptors import Descriptor, HeldPod
from ztunnel.io.holder_link import HolderLink

DRAIN_SPARE_S: Final = 1.0
"""Beyond drain_s, before a worker that does not end is killed."""
CONTROL_STOP_S: Final = 2.0

Worker = Callable[[NodeSettings, int, int], int]
ControlBody = Callable[[NodeSettings, int], int]
_log = logging.getLogger("ztunnel")


def workers_wanted(settings: NodeSettings, cores: int) -> int:
    """As configured, else a quarter of the cores, at least one and at most eight."""
    return settings.ztunnel_workers or max(1, min(8, cores // 4))


class Parent:
    """Construct, then `run`. ``worker`` and ``control`` are the bodies of the children."""

    def __init__(self, settings: NodeSettings, worker: Worker, control: ControlBody) -> None:
        self._settings = settings
        self._worker_body = worker
        self._control_body = control
        self._run_dir = Path(settings.run_dir)
        self._selector = selectors.DefaultSelector()
        count = workers_wanted(settings, os.cpu_count() or 1)
        self._workers = [Child(f"ztunnel-w{n}", n) for n in range(count)]
        self._control = Child("ztunnel-control", -1)
        self._pods: dict[str, HeldPod] = {}
        self._pending: dict[str, deque[Pending]] = {}
        self._holder = HolderLink(self._run_dir / "holder.sock", self._selector, self._pending.clear)
        self._snapshot = False
        self._signals: set[int] = set()
        self._deadline: float | None = None

    # --- life

    def run(self) -> int:
        """Until SIGTERM. Returns the exit code."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda n, _: self._signals.add(n))
        self._selector.register(wake_read, selectors.EVENT_READ, "wake")
        self._write_pid()
        # What was imported stays shared with the children: the collector must not write to it.
        gc.collect()
        gc.freeze()
        self._start_children(time.monotonic())
        while not self._turn(wake_read):
            pass
        self._remove_pid()
        return 0

    def _turn(self, wake_read: int) -> bool:
        for key, events in self._selector.select(self._timeout()):
            match key.data:
                case "wake":
                    try:
                        os.read(wake_read, 512)
                    except BlockingIOError:
                        pass
                case HolderLink():
                    self._holder_ready(events)
                case ("pidfd", Child() as child):
                    if child.running:
                        self._child_ended(child)
                case Child() as child:
                    self._child_ready(child, events)
        return self._attend(time.monotonic())

    def _timeout(self) -> float | None:
        times = [c.start_at for c in self._children() if not c.running and self._deadline is None]
        if self._holder.socket is None and self._deadline is None:
            times.append(self._holder.connect_at)
        if self._deadline is not None:
            times.append(self._deadline)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _attend(self, now: float) -> bool:
        """What signals and deadlines ask for. True when it is time to exit."""
        signals, self._signals = self._signals, set()
        if signals & {signal.SIGTERM, signal.SIGINT} and self._deadline is None:
            self._drain(now)
        if self._deadline is not None:
            self._watch_writes()
            return self._stopped(now)
        if self._holder.socket is None and self._holder.connect_at <= now:
            self._holder.connect(now, tuple(self._pods))
        self._start_children(now)
        self._watch_writes()
        return False

    def _children(self) -> list[Child]:
        return [*self._workers, self._control]

    def _drain(self, now: float) -> None:
        """The workers stop accepting and let connections finish; the control process answers them until the end."""
        _log.info("draining for at most %.1f s", self._settings.drain_s)
        self._deadline = now + self._settings.drain_s + DRAIN_SPARE_S
        self._control.send(Draining())
        for worker in self._workers:
            worker.signal(signal.SIGTERM)

    def _stopped(self, now: float) -> bool:
        workers = [w for w in self._workers if w.running]
        if workers:
            assert self._deadline is not None
            if now >= self._deadline:
                for worker in workers:
                    _log.warning("%s, process %d, does not end: killing it", worker.name, worker.pid)
                    worker.kill()
                self._deadline = now + DRAIN_SPARE_S
            return False
        if not self._control.running:
            return True
        assert self._deadline is not None
        if self._control.start_at != float("inf"):  # not told yet
            self._control.start_at = float("inf")
            self._control.signal(signal.SIGTERM)
            self._deadline = now + CONTROL_STOP_S
        elif now >= self._deadline:
            self._control.kill()
            self._deadline = now + CONTROL_STOP_S
        return False

    def _write_pid(self) -> None:
        """The holder writes it too, and during an upgrade decides whose it is: only a stale one is replaced."""
        path = self._run_dir / "ztunnel.pid"
        try:
            os.kill(int(path.read_text()), 0)
            return
        except (OSError, ValueError):
            pass
        aside = path.with_name(f".ztunnel.pid.{os.getpid()}")
        aside.write_text(f"{os.getpid()}\n")
        aside.replace(path)

    def _remove_pid(self) -> None:
        path = self._run_dir / "ztunnel.pid"
        try:
            if int(path.read_text()) == os.getpid():
                path.unlink()
        except (OSError, ValueError):
            pass

    # --- children

    def _start_children(self, now: float) -> None:
        """Workers first, the control process last: it imports what must not be forked."""
        for child in self._children():
            if not child.running and child.start_at <= now:
                try:
                    self._start(child, now)
                except OSError as error:
                    _log.error("cannot start %s: %s; again in 1 s", child.name, error)
                    child.start_at = now + 1.0

    def _start(self, child: Child, now: float) -> None:
        settings = self._settings
        if child is self._control:
            control = self._control_body
            child.start(lambda fd: control(settings, fd), now)
        else:
            worker = self._worker_body
            ours, theirs = socket.socketpair()
            stream = theirs.detach()
            child.stream = Descriptor(ours.detach())
            try:
                child.start(lambda fd: worker(settings, fd, stream), now, keep=[stream])
            finally:
                os.close(stream)
        assert child.socket is not None
        self._selector.register(child.pidfd, selectors.EVENT_READ, ("pidfd", child))
        self._selector.register(child.socket, selectors.EVENT_READ, child)
        _log.info("started %s, process %d", child.name, child.pid)
        if child is self._control:
            for worker_child in self._workers:
                self._connect_worker(worker_child)
        else:
            self._connect_worker(child)
        owed, child.owed = child.owed, {}
        for held in self._pods.values():
            self._send_put(child, held, owed.pop(held.pod.uid, []))
        if self._snapshot:
            child.send(m.SnapshotSent())
        for pendings in owed.values():
            self._excuse(child, pendings)

    def _connect_worker(self, worker: Child) -> None:
        """Give the control process the stream to a worker; a new pair if an earlier control process had it."""
        if not worker.running or not self._control.running:
            return
        if worker.stream is None:
            ours, theirs = socket.socketpair()
            worker.stream = Descriptor(ours.detach())
            worker.send(ControlChannel(), [Descriptor(theirs.detach())])
        self._control.send(WorkerChannel(number=worker.number, pid=worker.pid), [worker.stream])
        worker.stream = None

    def _child_ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        if child.socket is not None:
            self._selector.unregister(child.socket)
        pid, now = child.pid, time.monotonic()
        told = child.start_at == float("inf")
        code, pendings = child.ended(now)
        if self._deadline is not None:
            child.start_at = float("inf") if told else child.start_at
            self._excuse(child, pendings)
            return
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        _log.error("%s, process %d, ended %s; again in %.1f s", child.name, pid, how, max(0.0, child.start_at - now))
        for uid in [uid for uid in child.owed if uid not in self._pods]:
            self._excuse(child, child.owed.pop(uid))

    def _child_ready(self, child: Child, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            child.flush()
        if not events & selectors.EVENT_READ or child.socket is None:
            return
        try:
            packet = child.socket.receive()
        except BlockingIOError:
            return
        except (AmbientError, OSError) as error:
            _log.error("%s: %s: restarting it", child.name, error)
            child.kill()
            packet = None
        if packet is None:
            # Its death comes by the pidfd; until then this descriptor would be readable for ever.
            if child.socket is not None:
                self._selector.unregister(child.socket)
                child.socket.close()
                child.socket = None
                child.outbox.clear()
            return
        ack, fds = packet
        seqpacket.close_all(fds)
        queue = child.unacked.get(ack.uid)
        if not queue:
            return
        pendings = queue.popleft()
        if not queue:
            del child.unacked[ack.uid]
        if ack.error:
            _log.error("%s: pod %s: %s", child.name, ack.uid, ack.error)
        self._excuse(child, pendings, ack.error and f"{child.name}: {ack.error}")

    def _excuse(self, child: Child, pendings: list[Pending], error: str = "") -> None:
        for pending in pendings:
            pending.waiting.discard(child)
            if error:
                pending.errors.append(error)
            self._answer_holder(pending.uid)

    def _watch_writes(self) -> None:
        for child in self._children():
            if child.socket is not None:
                self._watch(child.socket, child, bool(child.outbox))
        if self._holder.socket is not None:
            self._watch(self._holder.socket, self._holder, bool(self._holder.outbox))

    def _watch(self, sock: PacketSocket[Any], data: object, write: bool) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        if self._selector.get_key(sock).events != events:
            self._selector.modify(sock, events, data)

    # --- the holder

    def _holder_ready(self, events: int) -> None:
        packet = self._holder.ready(events)
        if packet is None:
            return
        message, descriptors = packet
        match message:
            case m.PodPut():
                self._put(message, descriptors)
            case m.PodRemove():
                self._remove(message)
            case m.SnapshotSent():
                self._snapshot = True
                for child in self._children():
                    child.send(message)
            case m.ReturnPods(uids=uids):
                for uid in uids:
                    self._return(uid)

    # --- pods

    def _put(self, put: m.PodPut, descriptors: list[Descriptor]) -> None:
        uid = put.pod.uid
        pending = Pending(uid)
        self._pending.setdefault(uid, deque()).append(pending)
        error = _unacceptable(put)
        if error:
            pending.errors.append(error)
            self._answer_holder(uid)
            return
        held = HeldPod(put.pod, dict(zip(put.fds, descriptors, strict=True)))
        known = self._pods.get(uid)
        if known is not None and held.same_as(known):
            self._answer_holder(uid)  # a snapshot tells again what is here already
            return
        self._pods[uid] = held
        for child in self._children():
            pending.waiting.add(child)
            if child.running:
                self._send_put(child, held, [pending])
            else:
                child.owed.setdefault(uid, []).append(pending)

    def _send_put(self, child: Child, held: HeldPod, pendings: list[Pending]) -> None:
        part = held.for_control() if child is self._control else held.for_worker()
        child.send(m.PodPut(pod=held.pod, fds=tuple(part)), part.values())
        child.unacked.setdefault(held.pod.uid, deque()).append(pendings)

    def _remove(self, remove: m.PodRemove) -> None:
        pending = Pending(remove.uid)
        self._pending.setdefault(remove.uid, deque()).append(pending)
        if self._pods.pop(remove.uid, None) is not None:
            for child in self._children():
                if child.running:
                    pending.waiting.add(child)
                    child.send(remove)
                    child.unacked.setdefault(remove.uid, deque()).append([pending])
                self._excuse(child, child.owed.pop(remove.uid, []))
        self._answer_holder(remove.uid)

    def _answer_holder(self, uid: str) -> None:
        """Acknowledge, in the order they came, what nobody waits for any more."""
        queue = self._pending.get(uid)
        while queue and not queue[0].waiting:
            pending = queue.popleft()
            self._holder.tell(m.Ack(uid=uid, error="; ".join(pending.errors)[:1000]))
        if not queue:
            self._pending.pop(uid, None)

    def _return(self, uid: str) -> None:
        held = self._pods.get(uid)
        if held is not None:
            descriptors = tuple(held.descriptors.values())
            self._holder.tell(m.PodPut(pod=held.pod, fds=tuple(held.descriptors)), descriptors)


def _unacceptable(put: m.PodPut) -> str:
    if not put.fds or put.fds[0] != m.NETNS or len(set(put.fds)) != len(put.fds):
        return "the first descriptor must be the network namespace, and no name may come twice"
    unknown = set(put.fds[1:]) - set(m.LISTENERS)
    return f"unknown listeners: {', '.join(sorted(unknown))}" if unknown else ""


def run_parent(settings: NodeSettings) -> int:
    """The whole life of ztunnel. Returns its exit code."""
    no_dumps()
    logs.install(settings.log_level, settings.log_format)
    # Imported here once, so that a worker that replaces a dead one starts in milliseconds.
    from ztunnel.io.worker import run_worker

    return Parent(settings, run_worker, _run_control).run()


def _run_control(settings: NodeSettings, parent_fd: int) -> int:
    """In the forked child: only here are grpc and its threads allowed."""
    from ztunnel.io.control import run_control

    return run_control(settings, parent_fd)
