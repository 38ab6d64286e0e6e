"""IP addresses and sockets addresses as values.

Every address is folded on entry: an IPv4-mapped IPv6 address (``::ffff:10.0.0.1``) is the IPv4 address.
The kernel maps hold 16 bytes always, IPv4 as ``::ffff:a.b.c.d``; `packed16` and `unpack16` are the only
conversion.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED_PREFIX = bytes(10) + b"\xff\xff"


def fold(address: IPAddress) -> IPAddress:
    """The address with an IPv4-mapped IPv6 address turned into IPv4; scope IDs are dropped."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.scope_id is not None:
            return ipaddress.IPv6Address(int(address))
    return address


def parse_ip(text: str) -> IPAddress:
    """Parse canonical or mapped text. Raises ValueError, whose message names the text."""
    return fold(ipaddress.ip_address(text))


def unpack_ip(raw: bytes) -> IPAddress:
    """4 or 16 bytes in network order, as on the WDS wire. Raises ValueError for any other length."""
    if len(raw) not in (4, 16):
        raise ValueError(f"an IP address has 4 or 16 bytes, not {len(raw)}")
    return fold(ipaddress.ip_address(raw))


def packed16(address: IPAddress) -> bytes:
    """The 16 bytes the kernel maps use: IPv4 as ::ffff:a.b.c.d."""
    address = fold(address)
    return _MAPPED_PREFIX + address.packed if address.version == 4 else address.packed


def unpack16(raw: bytes) -> IPAddress:
    """Inverse of `packed16`. Raises ValueError unless there are exactly 16 bytes."""
    if len(raw) != 16:
        raise ValueError(f"a map address has 16 bytes, not {len(raw)}")
    return fold(ipaddress.IPv6Address(raw))


def network_contains(network: IPNetwork, address: IPAddress) -> bool:
    """Whether the (folded) address is in the network; other families never are."""
    address = fold(address)
    return address.version == network.version and address in network


@dataclass(frozen=True, slots=True, order=True)
class SocketAddress:
    """An IP address and a port in host order."""

    ip: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"

    @staticmethod
    def parse(text: str) -> SocketAddress:
        """Parse ``1.2.3.4:80`` or ``[::1]:80``. Raises ValueError naming the text."""
        host, separator, port = text.rpartition(":")
        if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535 or len(port) > 5:
            raise ValueError(f"{text!r} is not ADDRESS:PORT")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if ":" not in host:
                raise ValueError(f"{text!r}: only IPv6 addresses go in brackets")
        elif ":" in host:
            raise ValueError(f"{text!r}: an IPv6 address needs brackets")
        return SocketAddress(parse_ip(host), int(port))
