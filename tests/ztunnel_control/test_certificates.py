"""Certificates of local pods: ahead of need, renewed, shared by workers, forgotten; and with the CA away."""

from __future__ import annotations

import asyncio
import datetime
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ambient.errors import PeerFault
from ambient.io.ca_client import make_key
from ambient.settings import NodeSettings
from tests.support.control import until
from tests.support.shop import pod, spiffe
from ztunnel.core.messages import Certificate, Message
from ztunnel.io import certificates as module
from ztunnel.io.certificates import Certificates

CART, TWIN = pod("cart-1", "10.0.0.2"), pod("cart-2", "10.0.0.3")
IDENTITY = spiffe("cart")


def self_signed(name: str) -> str:
    key = make_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, name)])
    return _sign(subject, subject, key.public_key(), key, 3600.0)


def _sign(subject: x509.Name, issuer: x509.Name, public: object, key: object, life_s: float, age_s: float = 1.0) -> str:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=age_s))
        .not_valid_after(now + datetime.timedelta(seconds=life_s))
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()  # type: ignore[arg-type]


@dataclass
class Ca:
    """A CA that signs with a fixed key; ``error`` makes it refuse."""

    root: str = field(default_factory=lambda: self_signed("root"))
    life_s: float = 3600.0
    age_s: float = 1.0
    error: str = ""
    asked: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    hold: asyncio.Event | None = None

    async def create(self, settings: NodeSettings, identity: str, csr_pem: str, ttl_s: int) -> tuple[str, ...]:
        self.asked.append(identity)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.error:
                raise PeerFault(self.error)
            csr = x509.load_pem_x509_csr(csr_pem.encode())
            name = x509.Name([])
            return (_sign(name, name, csr.public_key(), make_key(), self.life_s, self.age_s), self.root)
        finally:
            self.running -= 1


class Desk:
    def __init__(self, directory: Path) -> None:
        self.ca = Ca()
        self.roots = directory / "roots.pem"
        self.roots.write_text(self.ca.root)
        self.sent: list[tuple[int, Message]] = []
        settings = NodeSettings(node_name="n", ca_root_file=str(self.roots))
        self.certificates = Certificates(settings, self.ca.create, lambda w, m: self.sent.append((w, m)))

    def to(self, worker: int) -> list[Certificate]:
        return [m for w, m in self.sent if w == worker and isinstance(m, Certificate)]


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(module, "ROOTS_POLL_S", 0.05)
    found = Desk(tmp_path)
    task = asyncio.create_task(found.certificates.run())
    yield found
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_pods_certificate_is_there_before_anybody_asks(desk: Desk) -> None:
    desk.certificates.put_pod(CART)
    await until(lambda: desk.certificates.held()[0][2] is not None)
    assert desk.sent == []
    desk.certificates.ask(1, IDENTITY)
    (certificate,) = desk.to(1)
    leaf = x509.load_pem_x509_certificate(certificate.chain_pem)
    key = load_pem_private_key(certificate.key_pem, None)
    assert leaf.public_key() == key.public_key()
    assert certificate.roots_pem.decode() == desk.ca.root
    assert certificate.not_after == int(leaf.not_valid_after_utc.timestamp())


async def test_pods_of_one_identity_share_one_certificate_and_the_last_takes_it_along(desk: Desk) -> None:
    desk.certificates.put_pod(CART)
    desk.certificates.put_pod(TWIN)
    await until(lambda: desk.certificates.held()[0][2] is not None)
    assert desk.ca.asked == [IDENTITY]
    desk.certificates.remove_pod(CART.uid)
    assert len(desk.certificates.held()) == 1
    desk.certificates.remove_pod(TWIN.uid)
    assert desk.certificates.held() == []
    desk.certificates.put_pod(CART)
    await until(lambda: desk.certificates.held()[0][2] is not None)
    assert len(desk.ca.asked) == 2


async def test_a_worker_that_asks_early_is_served_when_the_pod_comes_and_a_stranger_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNKNOWN_HOLD_S", 0.3)
    desk.certificates.ask(1, IDENTITY)
    desk.certificates.ask(2, spiffe("eve"))
    desk.certificates.put_pod(CART)
    await until(lambda: bool(desk.to(1)) and bool(desk.to(2)))
    assert desk.to(1)[0].error == "" and "no enrolled pod" in desk.to(2)[0].error
    assert desk.ca.asked == [IDENTITY], "the CA is never asked for another identity"


async def test_a_renewed_certificate_goes_to_every_worker_that_asked(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.core.renewal.RENEW_MIN_S", 0.1)
    desk.ca.age_s = 7200.0  # more than half its life has passed when it comes
    desk.certificates.put_pod(CART)
    for worker in (1, 2):
        desk.certificates.ask(worker, IDENTITY)
    await until(lambda: len(desk.to(1)) >= 3 and len(desk.to(2)) >= 3)
    generations = [c.generation for c in desk.to(1)]
    assert generations == sorted(set(generations)) and len({c.key_pem for c in desk.to(1)}) == len(generations)
    desk.certificates.forget_worker(2)
    before = len(desk.to(2))
    await until(lambda: len(desk.to(1)) >= 5)
    assert len(desk.to(2)) == before


async def test_while_the_ca_is_away_the_reason_is_told_and_the_old_certificate_stays(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.core.renewal.BACKOFF_FIRST_S", 0.05)
    desk.ca.error = "the CA is away"
    desk.certificates.ask(1, IDENTITY)
    desk.certificates.put_pod(CART)
    await until(lambda: bool(desk.to(1)))
    assert (desk.to(1)[0].error, desk.to(1)[0].chain_pem) == ("the CA is away", b"")
    desk.ca.error = ""
    await until(lambda: desk.to(1)[-1].error == "")
    held = len(desk.to(1))
    desk.ca.error = "away again"
    desk.certificates._renewals._entries[IDENTITY].due = 0.0
    desk.certificates._changed.set()
    await until(lambda: desk.certificates.held()[0][3] == "away again")
    assert len(desk.to(1)) == held, "a valid certificate is not taken back"


async def test_an_expired_certificate_is_taken_back(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.ca.life_s = 1.2
    desk.certificates.ask(1, IDENTITY)
    desk.certificates.put_pod(CART)
    await until(lambda: bool(desk.to(1)))
    desk.ca.error = "away"
    await until(lambda: desk.to(1)[-1].error != "", "it expires")
    assert desk.certificates.counters["certificate_expired"] == 1


async def test_new_roots_on_disk_reach_the_workers_with_the_same_certificate(desk: Desk) -> None:
    desk.certificates.ask(1, IDENTITY)
    desk.certificates.put_pod(CART)
    await until(lambda: bool(desk.to(1)))
    fresh = self_signed("new root")
    aside = desk.roots.with_suffix(".new")
    aside.write_text(desk.ca.root + fresh)
    os.replace(aside, desk.roots)
    await until(lambda: len(desk.to(1)) == 2)
    first, second = desk.to(1)
    assert second.chain_pem == first.chain_pem and second.generation > first.generation
    assert fresh.encode() in second.roots_pem and desk.ca.root.encode() in second.roots_pem


async def test_at_most_eight_are_fetched_at_once(desk: Desk) -> None:
    desk.ca.hold = asyncio.Event()
    for n in range(12):
        desk.certificates.put_pod(pod(f"p{n}-1", f"10.0.1.{n}"))
    await until(lambda: desk.ca.running == 8)
    desk.ca.hold.set()
    await until(lambda: sum(c is not None for _, _, c, _ in desk.certificates.held()) == 12)
    assert desk.ca.most == 8


async def test_a_returning_control_plane_is_asked_at_once(desk: Desk) -> None:
    desk.ca.error = "away"
    desk.certificates.put_pod(CART)
    await until(lambda: desk.certificates.held()[0][3] == "away")
    desk.certificates._renewals._entries[IDENTITY].due = time.time() + 3600
    desk.ca.error = ""
    desk.certificates.retry_failed()
    await until(lambda: desk.certificates.held()[0][2] is not None)


async def test_a_pod_whose_account_changed_gives_its_old_identity_up(desk: Desk) -> None:
    desk.certificates.put_pod(CART)
    desk.certificates.put_pod(pod("cart-1", "10.0.0.2", account="other"))
    assert [identity for identity, *_ in desk.certificates.held()] == [spiffe("other")]


async def test_a_pod_that_can_have_no_identity_is_refused_and_counted(desk: Desk) -> None:
    desk.certificates.put_pod(pod("bad-1", "10.0.0.9", account="a/b"))
    assert desk.certificates.held() == []
    assert desk.certificates.counters["certificate_refused_identity"] == 1
