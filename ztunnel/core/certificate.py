"""The identity in a peer's certificate: its URI names, read from DER by a small strict parser.

The chain was verified by OpenSSL before; what is read here is only who the leaf says it is. Anything that is
not plain DER, or a leaf with other than exactly one SPIFFE ID of a workload among its URI names, is refused.
"""

from __future__ import annotations

from ambient.errors import PeerFault
from ambient.model.identity import Identity

_SEQUENCE = 0x30
_OCTETS = 0x04
_OID = 0x06
_BOOLEAN = 0x01
_EXTENSIONS = 0xA3
_URI = 0x86
_SUBJECT_ALT_NAME = b"\x55\x1d\x11"
_CERTIFICATE_BYTES_MAX = 64 * 1024


class CertificateFault(PeerFault):
    """The peer's certificate does not say who it is."""


def _element(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Tag, start and end of the value of the element at ``at``. Only single-byte tags and minimal lengths."""
    if at + 2 > end:
        raise CertificateFault("the certificate ends inside an element")
    tag, length = data[at], data[at + 1]
    at += 2
    if tag & 0x1F == 0x1F:
        raise CertificateFault("the certificate has a tag of several bytes")
    if length >= 0x80:
        count = length & 0x7F
        if not 1 <= count <= 3 or at + count > end:
            raise CertificateFault("the certificate has a length that is not DER")
        length = int.from_bytes(data[at : at + count], "big")
        if length < 0x80 or length >> 8 * (count - 1) == 0:
            raise CertificateFault("the certificate has a length that is not minimal")
        at += count
    if at + length > end:
        raise CertificateFault("the certificate ends inside an element")
    return tag, at, at + length


def _expect(data: bytes, at: int, end: int, tag: int) -> tuple[int, int]:
    found, start, stop = _element(data, at, end)
    if found != tag:
        raise CertificateFault(f"the certificate has tag {found:#x} where {tag:#x} belongs")
    return start, stop


def uri_names(der: bytes) -> tuple[str, ...]:
    """The URI subject alternative names of a certificate, in order. Raises CertificateFault."""
    if len(der) > _CERTIFICATE_BYTES_MAX:
        raise CertificateFault("the certificate is too large")
    start, end = _expect(der, 0, len(der), _SEQUENCE)
    if end != len(der):
        raise CertificateFault("bytes follow the certificate")
    at, end = _expect(der, start, end, _SEQUENCE)
    names: tuple[str, ...] | None = None
    while at < end:
        tag, start, stop = _element(der, at, end)
        at = stop
        if tag != _EXTENSIONS:
            continue
        inner, inner_end = _expect(der, start, stop, _SEQUENCE)
        while inner < inner_end:
            start, stop = _expect(der, inner, inner_end, _SEQUENCE)
            inner = stop
            oid, oid_end = _expect(der, start, stop, _OID)
            tag, value, value_end = _element(der, oid_end, stop)
            if tag == _BOOLEAN:
                tag, value, value_end = _element(der, value_end, stop)
            if tag != _OCTETS or value_end != stop:
                raise CertificateFault("an extension of the certificate is malformed")
            if der[oid:oid_end] == _SUBJECT_ALT_NAME:
                if names is not None:
                    raise CertificateFault("the certificate has two lists of alternative names")
                names = _uris(der, value, value_end)
    return names or ()


def _uris(der: bytes, at: int, end: int) -> tuple[str, ...]:
    start, stop = _expect(der, at, end, _SEQUENCE)
    if stop != end:
        raise CertificateFault("bytes follow the alternative names")
    found: list[str] = []
    while start < stop:
        tag, value, value_end = _element(der, start, stop)
        start = value_end
        if tag == _URI:
            try:
                found.append(der[value:value_end].decode("ascii"))
            except UnicodeDecodeError:
                raise CertificateFault("a URI of the certificate is not ASCII") from None
    return tuple(found)


def peer_identity(der: bytes) -> Identity:
    """Who a verified leaf is: its only URI name, a SPIFFE ID of a workload. Raises CertificateFault."""
    names = uri_names(der)
    if len(names) != 1:
        raise CertificateFault(f"the certificate has {len(names)} URI names, a SPIFFE certificate has one")
    try:
        return Identity.parse(names[0])
    except ValueError as error:
        raise CertificateFault(str(error)) from None
