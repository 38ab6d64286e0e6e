"""The certificates of this node's pods: fetched ahead, renewed at half life, given to the workers that asked.

Only identities of enrolled pods of this node are ever asked for. Keys are made here, once for each certificate,
and are nowhere but in the memory of this process and of the workers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509

from ambient.errors import AmbientError
from ambient.io.ca_client import key_pem, make_csr, make_key, trust_bundle
from ambient.node.messages import Pod
from ambient.settings import NodeSettings
from ztunnel.core.local import identity_of
from ztunnel.core.messages import Certificate, Message
from ztunnel.core.renewal import Priority, Renewals
from ztunnel.core.state import UNKNOWN_HOLD_S

ROOTS_POLL_S: Final = 2.0
"""How often the root bundle's file is looked at for a change."""
WAITING_MAX: Final = 4096

Create = Callable[[NodeSettings, str, str, int], Awaitable[tuple[str, ...]]]
Send = Callable[[int, Message], None]
_log = logging.getLogger("ztunnel.certificates")


@dataclass(slots=True)
class _Held:
    message: Certificate
    chain: tuple[str, ...]
    serial: int


@dataclass(slots=True)
class _Wanted:
    """An identity of local pods."""

    pods: set[str] = field(default_factory=set)
    held: _Held | None = None
    error: str = ""
    fetch: asyncio.Task[None] | None = None


class Certificates:
    """``send`` gives a message to a worker; ``create`` asks the CA."""

    def __init__(self, settings: NodeSettings, create: Create, send: Send) -> None:
        self._settings = settings
        self._create = create
        self._send = send
        self._renewals = Renewals()
        self._wanted: dict[str, _Wanted] = {}
        self._interested: dict[str, set[int]] = {}
        self._early: list[tuple[float, int, str]] = []
        self._generation = 0
        self._changed = asyncio.Event()
        self.counters: dict[str, int] = {}

    def put_pod(self, pod: Pod) -> None:
        """A pod is enrolled: its certificate is fetched before anybody asks."""
        try:
            identity = str(identity_of(pod))
        except ValueError as error:
            _log.error("pod %s/%s: %s: no certificate", pod.namespace, pod.name, error)
            self._count("certificate_refused_identity")
            return
        for other in [i for i, w in self._wanted.items() if pod.uid in w.pods and i != identity]:
            self._release(other, pod.uid)
        self._wanted.setdefault(identity, _Wanted()).pods.add(pod.uid)
        asked = bool(self._interested.get(identity))
        self._renewals.want(identity, Priority.REALTIME if asked else Priority.WARMUP, time.time())
        self._changed.set()

    def remove_pod(self, uid: str) -> None:
        for identity in [i for i, w in self._wanted.items() if uid in w.pods]:
            self._release(identity, uid)

    def ask(self, worker: int, identity: str) -> None:
        """A worker wants the certificate now and whenever it changes."""
        self._interested.setdefault(identity, set()).add(worker)
        wanted = self._wanted.get(identity)
        if wanted is None:
            if len(self._early) >= WAITING_MAX:
                self._refuse(worker, identity)
                return
            self._early.append((time.monotonic(), worker, identity))
        elif wanted.held is not None:
            self._send(worker, wanted.held.message)
        else:
            self._renewals.want(identity, Priority.REALTIME, time.time())
            if wanted.error:
                self._send(worker, Certificate(identity=identity, generation=self._generation, error=wanted.error))
            self._changed.set()

    def forget_worker(self, worker: int) -> None:
        for identity in list(self._interested):
            self._interested[identity].discard(worker)
            if not self._interested[identity]:
                del self._interested[identity]
        self._early = [e for e in self._early if e[1] != worker]

    def retry_failed(self) -> None:
        """The control plane can be reached again."""
        self._renewals.retry_failed(time.time())
        self._changed.set()

    def held(self) -> list[tuple[str, int, Certificate | None, str]]:
        """Identity, serial number, certificate and last error of every identity wanted here."""
        return [
            (identity, w.held.serial if w.held else 0, w.held.message if w.held else None, w.error)
            for identity, w in sorted(self._wanted.items())
        ]

    async def run(self) -> None:
        """Fetch and renew until cancelled."""
        roots = self._roots_stamp()
        try:
            while True:
                self._changed.clear()
                now = time.time()
                for identity in self._renewals.start(now):
                    self._wanted[identity].fetch = asyncio.create_task(self._fetch(identity))
                self._expire(now)
                self._refuse_early()
                if (stamp := self._roots_stamp()) != roots:
                    roots = stamp
                    self._refresh_roots()
                due = self._renewals.next_due()
                wait = min(ROOTS_POLL_S, max(0.05, due - now)) if due is not None else ROOTS_POLL_S
                if self._early:
                    wait = min(wait, 0.25)
                try:
                    async with asyncio.timeout(wait):  # wait_for of 3.11 can lose a cancellation
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            for wanted in self._wanted.values():
                if wanted.fetch is not None:
                    wanted.fetch.cancel()

    async def _fetch(self, identity: str) -> None:
        try:
            key = make_key()
            csr = make_csr(key, identity)
            chain = await self._create(self._settings, identity, csr, self._settings.secret_ttl_s)
            leaf = x509.load_pem_x509_certificate(chain[0].encode())
        except (AmbientError, ValueError, OSError) as error:
            delay = self._renewals.failed(identity, time.time(), random.random())
            self._count("certificate_failed")
            _log.warning("certificate of %s: %s; again in %.1f s", identity, error, delay)
            self._failed(identity, str(error))
            return
        except asyncio.CancelledError:
            raise
        except Exception as error:  # nothing foreign may stop the renewal of every other identity
            self._renewals.failed(identity, time.time(), random.random())
            self._count("certificate_failed")
            _log.exception("certificate of %s", identity)
            self._failed(identity, f"{type(error).__name__}: {error}")
            return
        finally:
            self._changed.set()
        not_before, not_after = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
        self._renewals.succeeded(identity, not_before, not_after, time.time(), random.random())
        wanted = self._wanted.get(identity)
        if wanted is None:
            return  # its last pod went meanwhile
        self._generation += 1
        message = Certificate(
            identity=identity,
            generation=self._generation,
            chain_pem=_join(chain[:-1]),
            key_pem=key_pem(key),
            roots_pem=trust_bundle(self._settings, chain),
            not_before=int(not_before),
            not_after=int(not_after),
        )
        wanted.held, wanted.error = _Held(message, chain, leaf.serial_number), ""
        self._count("certificate_fetched")
        _log.info("certificate of %s: valid until %s", identity, leaf.not_valid_after_utc.isoformat())
        self._tell(message)

    def _failed(self, identity: str, error: str) -> None:
        wanted = self._wanted.get(identity)
        if wanted is None:
            return
        wanted.error = error[:500]
        if wanted.held is None:
            self._tell(Certificate(identity=identity, generation=self._generation, error=wanted.error))

    def _expire(self, now: float) -> None:
        for identity, wanted in self._wanted.items():
            if wanted.held is not None and wanted.held.message.not_after <= now:
                wanted.held = None
                wanted.error = wanted.error or "the certificate has expired"
                self._count("certificate_expired")
                _log.error("certificate of %s has expired: %s", identity, wanted.error)
                self._generation += 1
                self._tell(Certificate(identity=identity, generation=self._generation, error=wanted.error))

    def _refresh_roots(self) -> None:
        """The bundle on disk changed: workers get the certificates they have with the new roots."""
        for wanted in self._wanted.values():
            if wanted.held is None:
                continue
            old = wanted.held.message
            roots = trust_bundle(self._settings, wanted.held.chain)
            if roots != old.roots_pem:
                self._generation += 1
                wanted.held.message = Certificate(
                    identity=old.identity,
                    generation=self._generation,
                    chain_pem=old.chain_pem,
                    key_pem=old.key_pem,
                    roots_pem=roots,
                    not_before=old.not_before,
                    not_after=old.not_after,
                )
                self._tell(wanted.held.message)

    def _roots_stamp(self) -> tuple[int, int, int]:
        try:
            found = Path(self._settings.ca_root_file).stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_ino, found.st_size)

    def _refuse_early(self) -> None:
        """Workers that asked for an identity which no pod of this node has brought since."""
        now = time.monotonic()
        still: list[tuple[float, int, str]] = []
        for since, worker, identity in self._early:
            if identity in self._wanted:
                continue  # answered by `_tell` when it is fetched, or here if it has been
            if now - since < UNKNOWN_HOLD_S:
                still.append((since, worker, identity))
            else:
                self._refuse(worker, identity)
        for _, worker, identity in self._early:
            wanted = self._wanted.get(identity)
            if wanted is not None and wanted.held is not None:
                self._send(worker, wanted.held.message)
        self._early = still

    def _refuse(self, worker: int, identity: str) -> None:
        self._count("certificate_refused_unknown")
        error = "no enrolled pod of this node has this identity"
        self._send(worker, Certificate(identity=identity, generation=self._generation, error=error))

    def _release(self, identity: str, uid: str) -> None:
        wanted = self._wanted[identity]
        wanted.pods.discard(uid)
        if not wanted.pods:
            if wanted.fetch is not None:
                wanted.fetch.cancel()
            del self._wanted[identity]
            self._renewals.drop(identity)
            self._count("certificate_forgotten")

    def _tell(self, message: Certificate) -> None:
        for worker in sorted(self._interested.get(message.identity, ())):
            self._send(worker, message)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1


def _join(elements: tuple[str, ...]) -> bytes:
    return "".join(e if e.endswith("\n") else e + "\n" for e in elements).encode()
