"""A worker that does no work: it passes messages between the control process and the test.

``python -m tests.support.relay_worker --config FILE`` runs ztunnel's real parent and real control process with
such workers. Each listens at ``RUN_DIR/worker-N.sock`` (packets of msgpack): what the test sends goes to the
control process, what comes from there goes to the test, and so do the pods it was given, as `Given`.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import msgspec

from ambient.io import seqpacket
from ambient.io.seqpacket import PacketSocket
from ambient.node import messages as node
from ambient.settings import NodeSettings, read_settings
from ztunnel.core import messages

LENGTH = struct.Struct(">I")


class Given(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the worker holds, after each change."""

    pid: int
    pods: dict[str, tuple[str, ...]]
    snapshot: bool
    channels: int


FromWorker = Given | messages.Message


def run_worker(settings: NodeSettings, parent_fd: int, control_fd: int) -> int:
    known = node.PodPut | node.PodRemove | node.SnapshotSent | messages.ControlChannel
    parent: PacketSocket[Any] = PacketSocket(socket.socket(fileno=parent_fd), known)
    control = socket.socket(fileno=control_fd)
    run_dir = Path(settings.run_dir)
    number = next(n for n in range(8) if not _served(run_dir / f"worker-{n}.sock"))
    server = seqpacket.listen(run_dir / f"worker-{number}.sock")
    selector = selectors.DefaultSelector()
    selector.register(parent, selectors.EVENT_READ)
    selector.register(control, selectors.EVENT_READ)
    selector.register(server, selectors.EVENT_READ)
    stop = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(stop[1], b"x"))
    selector.register(stop[0], selectors.EVENT_READ)
    test: socket.socket | None = None
    pods: dict[str, tuple[str, ...]] = {}
    fds: dict[str, tuple[int, ...]] = {}
    asked: dict[bytes, None] = {}
    buffer = b""
    snapshot, channels = False, 1

    def tell(raw: bytes) -> None:
        if test is not None:
            test.send(raw)

    def tell_state() -> None:
        tell(msgspec.msgpack.encode(Given(pid=os.getpid(), pods=pods, snapshot=snapshot, channels=channels)))

    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                test, _ = server.accept()
                selector.register(test, selectors.EVENT_READ)
                tell_state()
            elif key.fd == stop[0]:
                return 0
            elif key.fileobj is parent:
                packet = parent.receive()
                if packet is None:
                    return 0
                match packet[0]:
                    case node.PodPut(pod=pod, fds=names):
                        seqpacket.close_all(fds.pop(pod.uid, ()))
                        pods[pod.uid], fds[pod.uid] = names, packet[1]
                        parent.send(node.Ack(uid=pod.uid, error="unloved" if pod.name == "unloved" else ""))
                    case node.PodRemove(uid=uid):
                        pods.pop(uid, None)
                        seqpacket.close_all(fds.pop(uid, ()))
                        parent.send(node.Ack(uid=uid))
                    case node.SnapshotSent():
                        snapshot = True
                    case messages.ControlChannel():
                        if control.fileno() >= 0:
                            selector.unregister(control)
                            control.close()
                        control, buffer = socket.socket(fileno=packet[1][0]), b""
                        selector.register(control, selectors.EVENT_READ)
                        channels += 1
                        for raw in asked:
                            control.sendall(LENGTH.pack(len(raw)) + raw)
                tell_state()
            elif key.fileobj is control:
                data = control.recv(65536)
                if not data:
                    selector.unregister(control)
                    control.close()
                    continue
                buffer += data
                while len(buffer) >= 4 and len(buffer) >= 4 + LENGTH.unpack(buffer[:4])[0]:
                    size = LENGTH.unpack(buffer[:4])[0]
                    tell(buffer[4 : 4 + size])
                    buffer = buffer[4 + size :]
            else:
                assert test is not None
                raw = test.recv(65536)
                if not raw:
                    selector.unregister(test)
                    test.close()
                    test = None
                    continue
                if isinstance(_decode(raw), messages.AskRoute | messages.AskVerdict | messages.AskCertificate):
                    asked[raw] = None
                if control.fileno() >= 0:
                    control.sendall(LENGTH.pack(len(raw)) + raw)


def _decode(raw: bytes) -> Any:
    return msgspec.msgpack.decode(raw, type=messages.Message)  # type: ignore[arg-type]


def _served(path: Path) -> bool:
    try:
        seqpacket.connect(path).close()
    except OSError:
        return False
    return True


def main() -> int:
    from ztunnel.io import logs
    from ztunnel.io.run import Parent, _run_control

    settings = read_settings(NodeSettings, Path(sys.argv[2]).read_text(), sys.argv[2])
    logs.install(settings.log_level, settings.log_format)
    return Parent(settings, run_worker, _run_control).run()


if __name__ == "__main__":
    sys.exit(main())
