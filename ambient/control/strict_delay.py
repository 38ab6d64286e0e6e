"""STRICT waits until everybody knows the way in.

A pod whose capture just began is published as HBONE at once, but without the policies that refuse plaintext:
peers that have not heard of it yet still come in plaintext, and must not be refused. Once every connected
subscriber acknowledged the pod's HBONE form, and had a moment to finish the requests it sent before, or the time
is up, it is published with them. A pod that is not HBONE never lists them, because its plaintext is all it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ambient.manifest.peer_authentication import is_strict
from ambient.model.workload import Workload


def without_strict(workload: Workload) -> Workload:
    kept = tuple(key for key in workload.policies if not is_strict(key))
    return workload if kept == workload.policies else dataclasses.replace(workload, policies=kept)


class StrictDelay:
    """Which workloads wait, and until when (the caller's clock, seconds)."""

    def __init__(self, timeout_s: float, settle_s: float = 0.0) -> None:
        self.timeout_s = timeout_s
        self.settle_s = settle_s
        """How long after the last acknowledgement: a plaintext request under way would be cut off by STRICT."""
        self.timeouts_total = 0
        """Workloads made strict although somebody had not acknowledged."""
        self._deadlines: dict[str, float] = {}
        self._settling: set[str] = set()
        """Those whose deadline is the end of their settling, because all have acknowledged."""

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(sorted(self._deadlines))

    def admit(self, wanted: Workload, published: Workload | None, now: float, *, first: bool) -> Workload:
        """The form of ``wanted`` to publish now. ``first``: nothing was published before, so all is taken as known.

        New addresses under an old name are a new pod: nobody knows yet that those are HBONE.
        """
        uid = wanted.uid
        if not wanted.enrolled:
            self.forget(uid)
            return without_strict(wanted)
        if first:
            return wanted
        known = published is not None and published.enrolled and set(wanted.addresses) <= set(published.addresses)
        if not known:
            self._deadlines[uid] = now + self.timeout_s
            self._settling.discard(uid)
        return without_strict(wanted) if uid in self._deadlines else wanted

    def forget(self, uid: str) -> None:
        self._deadlines.pop(uid, None)
        self._settling.discard(uid)

    def release(self, now: float, still_waiting: Callable[[str], Sequence[str]]) -> tuple[str, ...]:
        """Workloads whose wait is over. ``still_waiting(uid)`` names the nodes that have not acknowledged."""
        released: list[str] = []
        for uid, deadline in self._deadlines.items():
            if uid not in self._settling and not still_waiting(uid):
                self._settling.add(uid)
                deadline = self._deadlines[uid] = min(deadline, now + self.settle_s)
            if now >= deadline:
                self.timeouts_total += uid not in self._settling
                released.append(uid)
        for uid in released:
            self.forget(uid)
        return tuple(released)

    @property
    def next_deadline(self) -> float | None:
        return min(self._deadlines.values(), default=None)
