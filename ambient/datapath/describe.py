"""What each kernel map is, in the words the command line prints."""

from __future__ import annotations

from typing import Final

MAP_PURPOSE: Final[dict[str, str]] = {
    "enrolled": "network namespace -> the workload whose connects are captured, and its share",
    "workloads": "address -> workload, and how it is reached",
    "services": "virtual address and port -> service",
    "endpoints": "service port and slot -> endpoint, as this node prefers them",
    "verdicts": "source identity, destination workload and port -> whether the kernel may let it connect",
    "pending": "socket -> what the connect hook decided (lives in the socket, not listable)",
    "hashed": "socket -> that it was put into sockets (lives in the socket, not listable)",
    "redirects": "captured connection -> where its application wanted to go",
    "authorized": "connection into a pod -> who let it in",
    "origins": "connection into a pod -> the client address its application is shown",
    "flows": "connection authorized in the kernel -> both its ends and their bytes",
    "sockets": "connection -> a socket whose bytes may be moved by redirection",
    "events": "ring buffer of closed flows (for telemetry, not listable)",
    "listeners": "pod address and kind -> ztunnel's listening socket",
    "counters": "reason -> how often",
    "settings": "what loader and agent told the programs",
}
