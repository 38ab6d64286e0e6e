"""The order in which a pod joins and leaves the mesh. What each step does is `Steps`' affair; the order is ours.

Joining: nobody is told to use a path before it stands. Leaving: a path goes only when nobody uses it any
more. So load through label flips sees no failure. Every step may be repeated, and every way out of the
middle is `undo` or `forget`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

ACKNOWLEDGE_S: Final = 5.0
"""How long peers have to learn that a pod is no longer reached by HBONE."""
DRAIN_S: Final = 10.0
SETTLE_S: Final = 0.25
"""Handshakes in flight reach the listener they were steered to."""


class Steps(Protocol):
    """One pod's. Each raises AmbientError or Refused if it cannot be done; removing what is not there is done."""

    async def open_listeners(self) -> None:
        """Open the listeners in the pod's namespace, unless there are some, and hand them over to ztunnel."""

    async def put_addresses(self) -> None:
        """Write `listeners` and the pod's own addresses in `workloads`."""

    async def attach(self) -> None:
        """Attach and pin sk_lookup: from here plaintext is captured."""

    async def put_enrolled(self) -> None:
        """From here the pod's own connections are captured."""

    async def annotate(self, enabled: bool) -> None:
        """Tell the control plane, and so the peers."""

    async def acknowledged(self, timeout_s: float) -> bool:
        """Whether every node knows that the pod is not reached by HBONE."""

    async def close_tunnels(self) -> None:
        """Stop listening for tunnels; those that stand go on."""

    async def remove_enrolled(self) -> None:
        """The pod's own new connections are left alone."""

    async def drained(self, timeout_s: float) -> None:
        """Wait so long, or until the pod is wanted back."""

    async def detach(self) -> None:
        """Remove sk_lookup: new connections reach the application directly."""

    async def hand_back(self, drain_s: float) -> None:
        """Take the listeners from ztunnel, whose connections may finish for so long, and close them."""

    async def leave_addresses(self) -> None:
        """Remove `listeners`; the addresses stay known as those of a pod that is not enrolled."""

    async def remove_addresses(self) -> None:
        """The addresses name nobody; every authorization for them goes."""


async def enrol(steps: Steps) -> None:
    """Join, or complete a joining that was broken off. The annotation is the last step and not part of this."""
    await steps.open_listeners()
    await steps.put_addresses()
    await steps.attach()
    await steps.put_enrolled()


async def leave(steps: Steps) -> None:
    """Leave while the pod lives on."""
    began = time.monotonic()
    await steps.annotate(False)
    if not await steps.acknowledged(ACKNOWLEDGE_S):
        await asyncio.sleep(max(0.0, ACKNOWLEDGE_S - (time.monotonic() - began)))
    await steps.close_tunnels()
    # Outbound first: its listener must be there as long as connections are sent to it.
    await steps.remove_enrolled()
    await steps.drained(DRAIN_S)
    await steps.detach()
    await asyncio.sleep(SETTLE_S)
    await steps.hand_back(DRAIN_S)
    await steps.leave_addresses()


async def undo(steps: Steps) -> None:
    """Joining failed and the pod lives on: as if nothing had been tried. Raises the first failure, at the end."""
    await _all(steps.remove_enrolled, steps.detach, steps.leave_addresses, lambda: steps.hand_back(0.0))


async def forget(steps: Steps) -> None:
    """The pod is gone: everything goes before its address can be given away. Raises the first failure, at the end."""
    await _all(steps.remove_enrolled, steps.remove_addresses, steps.detach, lambda: steps.hand_back(0.0))


async def _all(*steps: Callable[[], Awaitable[None]]) -> None:
    failure: Exception | None = None
    for step in steps:
        try:
            await step()
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure
