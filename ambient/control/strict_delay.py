"""STRICT waits until everybody knows the way in.

A pod whose capture just began is published as HBONE at once, but without the policies that refuse plaintext:
peers that have not heard of it yet still come in plaintext, and must not be refused. Once every connected
subscriber acknowledged the pod's HBONE form, or the time is up, it is published with them. A pod that is not
HBONE never lists them, because its plaintext is all it has.
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

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.timeouts_total = 0
        """Workloads made strict although somebody had not acknowledged."""
        self._deadlines: dict[str, float] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        return tuple(sorted(self._deadlines))

    def admit(self, wanted: Workload, published: Workload | None, now: float, *, first: bool) -> Workload:
        """The form of ``wanted`` to publish now. ``first``: nothing was published before, so all is taken as known.

        New addresses under an old name are a new pod: nobody knows yet that those are HBONE.
        """
        uid = wanted.uid
        if not wanted.enrolled:
            self._deadlines.pop(uid, None)
            return without_strict(wanted)
        if first:
            return wanted
        known = published is not None and published.enrolled and set(wanted.addresses) <= set(published.addresses)
        if not known:
            self._deadlines[uid] = now + self.timeout_s
        return without_strict(wanted) if uid in self._deadlines else wanted

    def forget(self, uid: str) -> None:
        self._deadlines.pop(uid, None)

    def release(self, now: float, still_waiting: Callable[[str], Sequence[str]]) -> tuple[str, ...]:
        """Workloads whose wait is over. ``still_waiting(uid)`` names the nodes that have not acknowledged."""
        released: list[str] = []
        for uid, deadline in self._deadlines.items():
            if not still_waiting(uid):
                released.append(uid)
            elif now >= deadline:
                self.timeouts_total += 1
                released.append(uid)
        for uid in released:
            del self._deadlines[uid]
        return tuple(released)

    @property
    def next_deadline(self) -> float | None:
        return min(self._deadlines.values(), default=None)
