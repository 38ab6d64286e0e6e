"""STRICT waits until everybody knows the way in, and goes before anybody is told that there is none.

A pod whose capture just began is published as HBONE at once, but without the policies that refuse plaintext:
peers that have not heard of it yet still come in plaintext, and must not be refused. Once every connected
subscriber acknowledged the pod's HBONE form, and had a moment to finish the requests it sent before, or the time
is up, it is published with them.

A pod that leaves goes the other way: still HBONE, but without those policies, until every subscriber (its own
node's among them) acknowledged that form or the time is up; only then do peers hear that it is reached in
plaintext. A pod that is not HBONE never lists them, because its plaintext is all it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ambient.manifest.peer_authentication import is_strict
from ambient.model.workload import TunnelProtocol, Workload

Waiting = Callable[[str], Sequence[str]]
"""Workload UID -> the nodes that have not acknowledged."""


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
        """Workloads released although somebody had not acknowledged."""
        self._deadlines: dict[str, float] = {}
        self._settling: set[str] = set()
        """Those whose deadline is the end of their settling, because all have acknowledged."""
        self._leaving: dict[str, float] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(sorted((*self._deadlines, *self._leaving)))

    def admit(self, wanted: Workload, published: Workload | None, now: float, *, first: bool) -> Workload:
        """The form of ``wanted`` to publish now. ``first``: nothing was published before, so all is taken as known.

        New addresses under an old name are a new pod: nobody knows yet that those are HBONE.
        """
        uid = wanted.uid
        same = published is not None and set(wanted.addresses) <= set(published.addresses)
        if not wanted.enrolled:
            self._deadlines.pop(uid, None)
            self._settling.discard(uid)
            if published is None or not same or not (uid in self._leaving or _refuses_plaintext(published)):
                self._leaving.pop(uid, None)
                return without_strict(wanted)
            self._leaving.setdefault(uid, now + self.timeout_s)
            return without_strict(dataclasses.replace(wanted, protocol=TunnelProtocol.HBONE))
        self._leaving.pop(uid, None)
        if first:
            return wanted
        if published is None or not published.enrolled or not same:
            self._deadlines[uid] = now + self.timeout_s
            self._settling.discard(uid)
        return without_strict(wanted) if uid in self._deadlines else wanted

    def forget(self, uid: str) -> None:
        self._deadlines.pop(uid, None)
        self._leaving.pop(uid, None)
        self._settling.discard(uid)

    def release(self, now: float, ignorant: Waiting, behind: Waiting) -> tuple[str, ...]:
        """Workloads whose wait is over. ``ignorant(uid)`` names the nodes that may not know it as HBONE,
        ``behind(uid)`` those that may not have its present form."""
        released: list[str] = []
        for uid in tuple(self._deadlines):
            if uid not in self._settling and not ignorant(uid):
                self._settling.add(uid)
                self._deadlines[uid] = min(self._deadlines[uid], now + self.settle_s)
            if now >= self._deadlines[uid]:
                self.timeouts_total += uid not in self._settling
                released.append(uid)
        for uid, deadline in self._leaving.items():
            late = bool(behind(uid))
            if not late or now >= deadline:
                self.timeouts_total += late
                released.append(uid)
        for uid in released:
            self.forget(uid)
        return tuple(released)

    @property
    def next_deadline(self) -> float | None:
        return min((*self._deadlines.values(), *self._leaving.values()), default=None)


def _refuses_plaintext(published: Workload) -> bool:
    return published.enrolled and any(is_strict(key) for key in published.policies)
