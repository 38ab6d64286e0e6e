"""Owned descriptors of the parent, and the named sets of them that a pod has."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ambient.node.messages import NETNS, Pod


class Descriptor:
    """Owns one descriptor: closed when the last one who holds or sends it lets go.

    A forked child calls `disown`: its copies were closed in one go, and the numbers may be others' by now.
    """

    __slots__ = ("fd",)
    _owned = True

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        if Descriptor._owned:
            os.close(self.fd)

    @staticmethod
    def disown() -> None:
        Descriptor._owned = False


@dataclass(frozen=True, slots=True)
class HeldPod:
    """A pod and its descriptors by name: the network namespace first, then listeners."""

    pod: Pod
    descriptors: dict[str, Descriptor]

    def part(self, *prefixes: str) -> dict[str, Descriptor]:
        """Those whose names begin so, in their order."""
        return {name: d for name, d in self.descriptors.items() if name.startswith(prefixes)}

    def for_worker(self) -> dict[str, Descriptor]:
        return self.part(NETNS, "outbound", "plaintext", "hbone")

    def for_control(self) -> dict[str, Descriptor]:
        return self.part("dns_")

    def same_as(self, other: HeldPod) -> bool:
        """Whether it is the same pod with the very same sockets and namespace."""
        return self.pod == other.pod and self._inodes() == other._inodes()

    def _inodes(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for name, descriptor in self.descriptors.items():
            stat = os.fstat(descriptor.fd)
            found[name] = (stat.st_dev, stat.st_ino)
        return found
