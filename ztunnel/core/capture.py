"""What an accepted connection is: captured, to be delivered, or to be closed with a reason.

The recursion guard is here: neither an application nor a peer may reach the mesh's own ports through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ambient import ports


@dataclass(frozen=True, slots=True)
class Closed:
    """Close it; ``reason`` is the counter's word."""

    reason: str


class Captured(NamedTuple):
    """Carry it to ``ip``:``port``; ``endpoint`` is what the hook chose, empty if nothing."""

    ip: str
    port: int
    endpoint: str
    client_ip: str
    client_port: int


def outbound(
    original: tuple[str, int] | None, endpoint: tuple[str, int], client: tuple[str, int], addresses: tuple[str, ...]
) -> Captured | Closed:
    """A connection accepted on 15001. ``original`` is None if the kernel has no record of it.

    ``addresses`` are the pod's own: a captured connection that leads back into them is legal (a Service whose
    endpoint is the caller), one to a port of the mesh is not.
    """
    if original is None:
        return Closed("no_redirect")
    ip, port = original
    if port in ports.GUARDED:
        return Closed("recursion")
    if not port:
        return Closed("no_port")
    chosen = ""
    if endpoint[1]:
        chosen = f"[{endpoint[0]}]:{endpoint[1]}" if ":" in endpoint[0] else f"{endpoint[0]}:{endpoint[1]}"
    return Captured(ip, port, chosen, *client)


def plaintext(local: tuple[str, int], client: tuple[str, int], addresses: tuple[str, ...]) -> Captured | Closed:
    """A connection accepted on 15006: its local address is where the client wanted to go."""
    ip, port = local
    if port in ports.GUARDED:
        return Closed("recursion")
    if ip not in addresses:
        return Closed("not_local")
    return Captured(ip, port, "", *client)
