"""The worker's end of the stream to the control process: questions out, decisions and certificates in.

Answers are cached (`ztunnel.core.decisions`). When the control process is gone, what is cached goes on to be
used; questions wait, up to HOLD_S, for a new stream (`attach`), where everything is asked again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from ambient.errors import AmbientError
from ztunnel.core import messages as m
from ztunnel.core.decisions import Decision, Decisions, Holder, VerdictKey, Waiting
from ztunnel.io.sockets import Socket
from ztunnel.io.tls import Credential

_LENGTH: Final = struct.Struct(">I")
_OUT_BYTES_MAX: Final = 16 * 1024 * 1024
_READ_BYTES: Final = 256 * 1024
ANSWER_S: Final = m.HOLD_S + 2.0
"""A little longer than the control process holds a question: its reason is better than ours."""
REFUSED_S: Final = 5.0
"""Before a certificate that could not be loaded is asked for again: descriptors or memory may be there by then."""


class LinkOwner(Protocol):
    """What the link needs of the worker."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> object: ...

    def remove_reader(self, fd: int, /) -> object: ...

    def add_writer(self, fd: int, callback: Callable[[], None], /) -> object: ...

    def remove_writer(self, fd: int, /) -> object: ...

    def now(self) -> float: ...

    def count(self, name: str, by: int = 1) -> None: ...

    def log(self, level: str, text: str) -> None: ...

    def set_level(self, level: str) -> None: ...

    def connections(self, number: int) -> m.Connections: ...


class Link:
    """Ask with `route`, `verdict` and `credential`; callbacks may be called at once."""

    def __init__(self, owner: LinkOwner) -> None:
        self._owner = owner
        self._sock: Socket | None = None
        self._fd = -1
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(m.Message)
        self._in = bytearray()
        self._out = bytearray()
        self._writing = False
        self.decisions = Decisions()
        self._routes: Waiting[m.Route] = Waiting()
        self._verdicts: Waiting[Decision] = Waiting()
        self._certificates: Waiting[Credential] = Waiting()
        self._credentials: dict[str, Credential] = {}
        self._wanted: set[str] = set()
        self._refused: dict[str, float] = {}
        """Identities whose certificate could not be loaded, and when to ask again."""

    # --- questions -----------------------------------------------------------------------------------------

    def route(self, source: str, ip: str, port: int, callback: Callable[[m.Route | None], None]) -> None:
        """None after HOLD_S without an answer."""
        key = (source, ip, port)
        known = self.decisions.route(key)
        if known is not None:
            callback(known)
        elif self._routes.join(key, self._owner.now() + ANSWER_S, callback):
            self.send(m.AskRoute(source=source, ip=ip, port=port))

    def verdict(self, key: VerdictKey, source_ip: str, callback: Callable[[Decision | None], None]) -> None:
        """None after HOLD_S without an answer."""
        known = self.decisions.verdict(key, source_ip)
        if known is not None:
            callback(known)
        elif self._verdicts.join((*key, source_ip), self._owner.now() + ANSWER_S, callback):
            self._ask_verdict(key, source_ip)

    def _ask_verdict(self, key: VerdictKey, source_ip: str) -> None:
        destination, destination_ip, port, identity = key
        self.send(
            m.AskVerdict(
                destination=destination,
                destination_ip=destination_ip,
                port=port,
                identity=identity,
                source_ip=source_ip,
            )
        )

    def credential(self, identity: str, callback: Callable[[Credential | None], None]) -> None:
        """The identity's certificate as contexts; None if there is none within HOLD_S."""
        known = self._credentials.get(identity)
        if known is not None:
            callback(known)
            return
        self._certificates.join((identity,), self._owner.now() + ANSWER_S, callback)
        self.want(identity)

    def want(self, identity: str) -> None:
        """Ask for the certificate now, to have it when it is needed."""
        if identity not in self._wanted:
            self._wanted.add(identity)
            self.send(m.AskCertificate(identity=identity))

    def unwant(self, identity: str) -> None:
        """No pod here has this identity any more."""
        self._wanted.discard(identity)
        self._credentials.pop(identity, None)

    def tick(self, now: float) -> None:
        self._routes.expire(now)
        self._verdicts.expire(now)
        self._certificates.expire(now)
        for identity in [identity for identity, due in self._refused.items() if due <= now]:
            del self._refused[identity]
            if identity in self._wanted:
                self.send(m.AskCertificate(identity=identity))
        decisions = self.decisions
        if decisions.forgotten_routes or decisions.forgotten_verdicts:
            routes, verdicts = decisions.take_forgotten(self._routes, self._verdicts)
            self.send(m.Forget(routes=routes, verdicts=verdicts))

    # --- the stream ----------------------------------------------------------------------------------------

    def attach(self, sock: Socket) -> None:
        """A (new) stream. Whatever was cached or is open is asked again if there was one before."""
        first = self._fd < 0 and not self._wanted and not self._routes.keys()
        self.detach()
        sock.setblocking(False)
        self._sock, self._fd = sock, sock.fileno()
        self._in.clear()
        self._out.clear()
        self._owner.add_reader(self._fd, self._readable)
        if not first:
            self._ask_again()

    def detach(self) -> None:
        if self._sock is None:
            return
        self._owner.remove_reader(self._fd)
        if self._writing:
            self._owner.remove_writer(self._fd)
            self._writing = False
        self._sock.close()
        self._sock, self._fd = None, -1

    @property
    def attached(self) -> bool:
        return self._sock is not None

    def _ask_again(self) -> None:
        for question in self.decisions.start_again():
            self.send(question)
        for source, ip, port in self._routes.keys():  # noqa: SIM118 - not a mapping
            self.send(m.AskRoute(source=str(source), ip=str(ip), port=int(str(port))))
        for destination, destination_ip, port, identity, source_ip in self._verdicts.keys():  # noqa: SIM118
            key = (str(destination), str(destination_ip), int(str(port)), str(identity))
            self._ask_verdict(key, str(source_ip))
        for wanted in self._wanted:
            self.send(m.AskCertificate(identity=wanted))

    def send(self, message: m.Message) -> None:
        """Without a stream, or far behind, events are lost and counted; questions are asked again on `attach`."""
        if self._sock is None or len(self._out) > _OUT_BYTES_MAX:
            if isinstance(message, m.Events):
                self._owner.count("events_lost", len(message.events))
            return
        raw = self._encoder.encode(message)
        self._out += _LENGTH.pack(len(raw)) + raw
        if not self._writing:
            self._write()

    def _write(self) -> None:
        if self._sock is None:
            return
        try:
            sent = self._sock.send(self._out)
            del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._lost()
            return
        if bool(self._out) != self._writing:
            self._writing = bool(self._out)
            if self._writing:
                self._owner.add_writer(self._fd, self._write)
            else:
                self._owner.remove_writer(self._fd)

    def _lost(self) -> None:
        self._owner.log("warn", "the control process is gone; serving what is cached until it is back")
        self.detach()

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        self._in += data
        at = 0
        while len(self._in) - at >= 4:
            (length,) = _LENGTH.unpack_from(self._in, at)
            if length > m.MESSAGE_BYTES_MAX:
                self._owner.log("error", f"the control process sent a message of {length} bytes")
                self._lost()
                return
            if len(self._in) - at - 4 < length:
                break
            raw = bytes(self._in[at + 4 : at + 4 + length])
            at += 4 + length
            self._handle(raw)
            if self._sock is None:
                return
        del self._in[:at]

    def _handle(self, raw: bytes) -> None:
        try:
            message = self._decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._owner.count("control_messages_refused")
            self._owner.log("error", f"a message of the control process does not decode: {error}")
            return
        match message:
            case m.Route():
                key = (message.source, message.ip, message.port)
                if key in self._routes or self.decisions.keeps(message):
                    self._routes.answer(key, self.decisions.put_route(message))
            case m.Verdict():
                self._put_verdict(message)
            case m.Certificate():
                self._put_certificate(message)
            case m.AskConnections(number=number):
                self.send(self._owner.connections(number))
            case m.LogLevel(level=level):
                self._owner.set_level(level)
            case m.Synced():
                self._ask_again()
            case _:
                self._owner.count("control_messages_refused")

    def _put_verdict(self, verdict: m.Verdict) -> None:
        key = (verdict.destination, verdict.destination_ip, verdict.port, verdict.identity)
        waiting: list[tuple[object, ...]]
        if verdict.source_ip:
            exact = (*key, verdict.source_ip)
            waiting = [exact] if exact in self._verdicts else []
        else:
            waiting = [known for known in self._verdicts.keys() if known[:4] == key]  # noqa: SIM118
        if not waiting and not self.decisions.keeps(verdict):
            return
        decision, orphans = self.decisions.put_verdict(verdict)
        for known in waiting:
            if not decision.asked_ip:
                decision.asked_ip = str(known[4])
            self._verdicts.answer(known, decision)
        for holder, source_ip in orphans:
            self._ask_for(key, source_ip, holder)

    def _ask_for(self, key: VerdictKey, source_ip: str, holder: Holder) -> None:
        """A connection whose verdict now depends on its address: it stays only if that one allows it."""

        def answered(decision: Decision | None) -> None:
            if holder.done:
                return  # it would be held, and its verdict with it, for ever
            if not self.decisions.hold(key, source_ip, holder):
                destination, destination_ip, port, identity = key
                holder.lost_right(
                    decision.verdict
                    if decision is not None
                    else m.Verdict(
                        destination=destination,
                        destination_ip=destination_ip,
                        port=port,
                        identity=identity,
                        source_ip=source_ip,
                        generation=0,
                        allow=False,
                        reason="not_synced",
                    )
                )

        self.verdict(key, source_ip, answered)

    def _put_certificate(self, message: m.Certificate) -> None:
        if message.error:
            self._owner.log("warn", f"no certificate for {message.identity}: {message.error}")
            return
        if message.identity not in self._wanted:
            return
        try:
            credential = Credential(message)
        except (AmbientError, ValueError) as error:
            self._refused[message.identity] = self._owner.now() + REFUSED_S
            self._owner.count("certificates_refused")
            self._owner.log("error", str(error))
            return
        self._refused.pop(message.identity, None)
        self._credentials[message.identity] = credential
        self._certificates.answer((message.identity,), credential)
