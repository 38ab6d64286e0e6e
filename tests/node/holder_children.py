"""Processes for the holder's tests: a holder, a small ztunnel that serves what it is given, an idle agent."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

import msgspec

from ambient.io import seqpacket
from ambient.node import messages as m
from ambient.node.holder import Holder
from ambient.settings import NodeSettings


def log(run_dir: Path, **event: object) -> None:
    with open(run_dir / "events", "a") as events:
        events.write(json.dumps(event | {"pid": os.getpid()}) + "\n")


class Ztunnel:
    """Accepts on every TCP listener and answers with its process id; reconnects to a new holder."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.held: dict[str, tuple[m.PodPut, tuple[int, ...]]] = {}
        self.selector = selectors.DefaultSelector()
        self.packets: seqpacket.PacketSocket[m.Message] | None = None
        self.draining = False

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.drain)
        while not self.draining:
            if self.packets is None:
                self.connect()
            for key, _ in self.selector.select(0.02):
                if key.data == "holder":
                    self.receive()
                elif key.fd in self.selector.get_map():
                    self.accept(key.fd)
        log(self.run_dir, event="drained")

    def drain(self, *_: object) -> None:
        self.draining = True

    def connect(self) -> None:
        try:
            self.packets = seqpacket.PacketSocket(seqpacket.connect(self.run_dir / "holder.sock"), m.Message)
        except OSError:
            return
        self.packets.send(m.Hello(role="ztunnel", pid=os.getpid(), holds=tuple(self.held)))
        self.selector.register(self.packets.socket, selectors.EVENT_READ, "holder")

    def accept(self, fd: int) -> None:
        with socket.socket(fileno=os.dup(fd)) as listener:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:  # shut down: the pod leaves the mesh
                self.selector.unregister(fd)
                return
        connection.sendall(str(os.getpid()).encode())
        connection.close()

    def forget(self, uid: str) -> None:
        _, fds = self.held.pop(uid, (None, ()))
        for fd in fds:
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
            os.close(fd)

    def receive(self) -> None:
        assert self.packets is not None
        got = self.packets.receive()
        if got is None:
            self.selector.unregister(self.packets.socket)
            self.packets.close()
            self.packets = None
            return
        message, fds = got
        match message:
            case m.PodPut(pod=pod):
                if pod.name == "unanswered":
                    return
                self.forget(pod.uid)
                self.held[pod.uid] = (message, fds)
                for name, fd in zip(message.fds, fds, strict=True):
                    if name.startswith(("outbound", "hbone", "plaintext")):
                        os.set_blocking(fd, False)
                        self.selector.register(fd, selectors.EVENT_READ, name)
                log(self.run_dir, event="put", uid=pod.uid)
                self.packets.send(m.Ack(uid=pod.uid, error="too odd" if pod.name == "odd" else ""))
            case m.PodRemove(uid=uid):
                self.forget(uid)
                log(self.run_dir, event="remove", uid=uid)
                self.packets.send(m.Ack(uid=uid))
            case m.ReturnPods(uids=uids):
                for uid in uids:
                    self.packets.send(*self.held[uid])
            case m.SnapshotSent():
                log(self.run_dir, event="snapshot")


def agent(run_dir: Path) -> None:
    log(run_dir, event="agent")
    signal.sigwait({signal.SIGTERM})
    log(run_dir, event="agent_ended")


if __name__ == "__main__":
    role, config = sys.argv[1], sys.argv[2]
    settings = msgspec.json.decode(Path(config).read_bytes(), type=NodeSettings)
    directory = Path(settings.run_dir)
    if role == "holder":
        script = os.path.abspath(__file__)
        argv = [(sys.executable, script, name, config) for name in ("agent", "ztunnel")]
        if len(sys.argv) > 3:  # with the real agent
            argv[0] = (sys.executable, "-m", "ambient.node.agent", "--config", config)
        sys.exit(Holder(settings, argv[0], argv[1]).run())
    if role == "agent":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        agent(directory)
    else:
        Ztunnel(directory).run()
