"""`/diff` and `/repair` of agent.sock: what the kernel should hold against what it does hold.

Both run in one turn of the agent's loop, or, where a step of repairing waits, pod by pod under the pod's own lock, so
nothing is compared that is half written. Pods on their way in or out are left out on both sides.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from ambient.datapath import drift
from ambient.datapath.render import Names
from ambient.datapath.values import EnrolledValue, ListenerKey, SettingsValue
from ambient.errors import AmbientError
from ambient.node.kernel import Kernel, listener_fds
from ambient.node.listeners import Refused
from ambient.node.member import Member
from ambient.node.pods import Pods

SO_COOKIE = 57
Row = dict[str, Any]
_RIGHTS = ("enrolled", "workloads", "verdicts", "flows")
"""Maps by which the connect hook lets connections in: where they were wrong, so may be what they let in."""


def compare(kernel: Kernel, pods: Pods) -> list[Row]:
    """Rows of everything that differs; empty when all is as wanted. Raises BpfFault."""
    names = kernel.names()
    rows: list[Row] = []
    for name, wanted in kernel.wanted(pods.local_pods()).items():
        rows += drift.compare(name, wanted, dict(getattr(kernel.maps, name).items()), names)
    members = [m for m in pods.members.values() if m.state == "enrolled" and m.handle is not None]
    flux = [m for m in pods.members.values() if m.state != "enrolled" and (m.record.in_mesh or m.handle is not None)]
    rows += _enrolled(kernel, members, flux, names)
    rows += _listeners(kernel, members, flux, names)
    rows += _attachments(kernel, members, flux)
    settings: dict[int, SettingsValue] = {} if kernel.maps.settings is None else {0: kernel.maps.settings}
    rows += [drift.unrightful(*found, names) for found in kernel.same_node.unrightful()]
    rows += drift.compare("settings", {0: kernel.settings}, settings, names, drift.same_settings)
    return rows


def _enrolled(kernel: Kernel, members: list[Member], flux: list[Member], names: Names) -> list[Row]:
    wanted: dict[int, EnrolledValue] = {m.cookie: kernel.enrolled_value(m.described()) for m in members}
    moving = {m.cookie for m in flux}
    actual = {cookie: value for cookie, value in kernel.maps.enrolled.items() if cookie not in moving}
    return drift.compare("enrolled", wanted, actual, names, drift.same_enrolled)


def _listeners(kernel: Kernel, members: list[Member], flux: list[Member], names: Names) -> list[Row]:
    wanted: dict[ListenerKey, int] = {}
    for member in members:
        assert member.handle is not None
        for address in member.record.addresses:
            for kind, fd in listener_fds(address, member.handle.fds):
                wanted[ListenerKey(address, kind)] = _cookie(fd)
    moving = {address for m in flux for address in m.record.addresses}
    actual = {key: cookie for key, cookie in kernel.maps.listeners.items() if key.pod not in moving}
    return drift.compare("listeners", wanted, actual, names)


def _attachments(kernel: Kernel, members: list[Member], flux: list[Member]) -> list[Row]:
    """Not a map, but as much a part of what the kernel holds: `sk_lookup` in each enrolled pod's namespace."""
    titles = {m.record.uid: m.title for m in members}
    attached = set(kernel.attached()) - {m.record.uid for m in flux}
    rows = []
    for uid in sorted(attached ^ set(titles)):
        word = "missing" if uid in titles else "extra"
        rows.append(
            {"map": "sk_lookup", "key": uid, "drift": word, "name": titles.get(uid, ""), "wanted": {}, "actual": {}}
        )
    return rows


def _cookie(fd: int) -> int:
    duplicate = socket.socket(fileno=os.dup(fd))
    try:
        return int.from_bytes(duplicate.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
    finally:
        duplicate.close()


async def repair(kernel: Kernel, pods: Pods) -> tuple[list[Row], list[Row]]:
    """What differed, and what still does after everything was written again. Raises BpfFault."""
    before = compare(kernel, pods)
    if not before:
        return before, before
    kernel.resync(pods.local_pods(), distrust=any(row["map"] in _RIGHTS for row in before))
    pods.remove_strangers(kernel)
    lacking = {row["key"] for row in before if row["map"] == "sk_lookup" and row["drift"] == "missing"}
    for member in list(pods.members.values()):
        async with member.lock:
            if member.state != "enrolled" or member.handle is None:
                continue
            steps = pods.steps(member)
            try:
                await steps.put_addresses()
                if member.record.uid in lacking:
                    await steps.attach()
                await steps.put_enrolled()
            except (AmbientError, Refused, OSError) as error:
                pods.note(member, "failed", "failed", str(error))
                pods.kick(member)
    return before, compare(kernel, pods)
