"""The cluster's DNS: names of services and pods out of the API objects, as CoreDNS' kubernetes plugin gives them.

Pure: a question's bytes and the objects in, the answer's bytes out. Only what stub resolvers send is understood:
one question, class IN. It knows the cluster's names and nothing else; everything else does not exist.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ambient.errors import PeerFault
from ambient.lab.objects import LabService
from ambient.lab.service_rules import cluster_addresses, is_ready, slices_by_service
from ambient.lab.topology import CLUSTER_DOMAIN
from ambient.manifest.objects import EndpointSlice

A, CNAME, SRV, AAAA, ANY = 1, 5, 33, 28, 255
NO_ERROR, FORMAT_ERROR, NAME_ERROR, NOT_IMPLEMENTED, REFUSED = 0, 1, 3, 4, 5
UDP_BYTES_MAX = 512
TCP_BYTES_MAX = 65535
TTL_S = 5
_CLASS_IN = 1
_HEADER = struct.Struct("!6H")
_QUERY, _AUTHORITATIVE, _TRUNCATED, _RECURSION_DESIRED, _RECURSION = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080


@dataclass(frozen=True, slots=True)
class Question:
    """``name`` in lower case without the final dot; ``raw`` is its section's bytes as they came."""

    id: int
    flags: int
    name: str
    type: int
    klass: int
    raw: bytes


def parse(message: bytes) -> Question:
    """Raises PeerFault if it is not a query with one question."""
    if len(message) < _HEADER.size:
        raise PeerFault(f"DNS: a message of {len(message)} bytes has no header")
    number, flags, questions, _, _, _ = _HEADER.unpack_from(message)
    if flags & _QUERY or questions != 1:
        raise PeerFault(f"DNS: flags {flags:#06x} with {questions} questions; one question is understood")
    labels: list[str] = []
    offset = _HEADER.size
    while True:
        if offset >= len(message):
            raise PeerFault("DNS: the name has no end")
        length = message[offset]
        offset += 1
        if length == 0:
            break
        if length > 63 or offset + length > len(message) or offset + length - _HEADER.size > 254:
            raise PeerFault("DNS: a label is longer than the message or the limit, or compressed")
        labels.append(message[offset : offset + length].decode("latin-1").lower())
        offset += length
    if offset + 4 > len(message):
        raise PeerFault("DNS: the question has no type and class")
    kind, klass = struct.unpack_from("!2H", message, offset)
    return Question(number, flags, ".".join(labels), kind, klass, message[_HEADER.size : offset + 4])


def encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("latin-1") for label in name.split(".") if label) + b"\0"


def respond(question: Question, code: int, records: Iterable[tuple[int, bytes]], limit: int) -> bytes:
    """The answer; over ``limit`` bytes only the header with the truncation mark, so that TCP is tried."""
    encoded = [b"\xc0\x0c" + struct.pack("!HHIH", kind, _CLASS_IN, TTL_S, len(data)) + data for kind, data in records]
    flags = _QUERY | _AUTHORITATIVE | _RECURSION | (question.flags & (_RECURSION_DESIRED | 0x7800)) | code
    body = question.raw + b"".join(encoded)
    if _HEADER.size + len(body) > limit:
        return _HEADER.pack(question.id, flags | _TRUNCATED, 1, 0, 0, 0) + question.raw
    return _HEADER.pack(question.id, flags, 1, len(encoded), 0, 0) + body


def answer(message: bytes, names: Names, limit: int) -> bytes | None:
    """The answer to a message, or None where no answer is due (it is no query, or too short for an ID)."""
    try:
        question = parse(message)
    except PeerFault:
        if len(message) < _HEADER.size or message[2] & 0x80:
            return None
        number, flags = struct.unpack_from("!2H", message)
        return _HEADER.pack(number, _QUERY | (flags & 0x7900) | FORMAT_ERROR, 0, 0, 0, 0)
    if question.flags & 0x7800:
        return respond(question, NOT_IMPLEMENTED, (), limit)
    if question.klass not in (_CLASS_IN, 255):
        return respond(question, REFUSED, (), limit)
    found = names.find(question.name)
    if found is None:
        return respond(question, NAME_ERROR, (), limit)
    return respond(question, NO_ERROR, found.records(question.type), limit)


@dataclass(frozen=True, slots=True)
class Found:
    """A name that exists: its addresses, or the name it stands for."""

    addresses: tuple[str, ...] = ()
    alias: str = ""

    def records(self, kind: int) -> list[tuple[int, bytes]]:
        if self.alias:
            return [(CNAME, encode_name(self.alias))]
        parsed = [ipaddress.ip_address(address) for address in self.addresses]
        wanted = {4: (A, ANY), 6: (AAAA, ANY)}
        return [(A if ip.version == 4 else AAAA, ip.packed) for ip in parsed if kind in wanted[ip.version]]


class Names:
    """All names of one state of the cluster."""

    def __init__(self, services: Mapping[str, LabService], slices: Iterable[EndpointSlice]) -> None:
        self._services = services
        self._slices = slices_by_service(slices)

    def find(self, name: str) -> Found | None:
        """What ``name`` (lower case, no final dot) stands for; None if it does not exist."""
        suffix = "." + CLUSTER_DOMAIN
        if not name.endswith(suffix):
            return None
        match name.removesuffix(suffix).split("."):
            case [service, namespace, "svc"]:
                return self._service(namespace, service)
            case [host, service, namespace, "svc"]:
                addresses = self._endpoints(namespace, service).get(host)
                return Found(tuple(addresses)) if addresses else None
            case [address, _, "pod"]:
                return _pod(address)
        return None

    def _service(self, namespace: str, name: str) -> Found | None:
        service = self._services.get(f"{namespace}/{name}")
        if service is None:
            return None
        if service.spec.type == "ExternalName":
            return Found(alias=service.spec.external_name)
        if addresses := cluster_addresses(service):
            return Found(addresses)
        found = [a for addresses in self._endpoints(namespace, name).values() for a in addresses]
        return Found(tuple(dict.fromkeys(found)))

    def _endpoints(self, namespace: str, name: str) -> dict[str, list[str]]:
        """Host name -> addresses of a headless service's endpoints."""
        service = self._services.get(f"{namespace}/{name}")
        if service is None or cluster_addresses(service):
            return {}
        found: dict[str, list[str]] = {}
        for item in self._slices.get((namespace, name), ()):
            for endpoint in item.endpoints or ():
                if is_ready(endpoint) or service.spec.publish_not_ready_addresses:
                    for address in endpoint.addresses or ():
                        host = endpoint.hostname or address.replace(".", "-").replace(":", "-")
                        found.setdefault(host, []).append(address)
        return found


def _pod(text: str) -> Found | None:
    """``10-244-1-5`` or ``fd00-244--5``: the address is in the name."""
    for candidate in (text.replace("-", "."), text.replace("-", ":")):
        try:
            return Found((str(ipaddress.ip_address(candidate)),))
        except ValueError:
            continue
    return None
