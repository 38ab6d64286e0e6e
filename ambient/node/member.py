"""One pod of this node, and the steps of its way in and out of the mesh."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ambient.datapath.entries import LocalPod
from ambient.errors import AmbientError, PlatformFault
from ambient.io import netns
from ambient.manifest.acceleration import Acceleration, resolve
from ambient.manifest.objects import Pod
from ambient.model.identity import Identity
from ambient.node import listeners
from ambient.node import messages as m
from ambient.node.holder_client import Handle, HolderClient
from ambient.node.kernel import Kernel
from ambient.node.records import Record

log = logging.getLogger(__name__)

Annotate = Callable[["Member", bool], Awaitable[None]]
Acknowledged = Callable[[str, float], Awaitable[bool]]


@dataclass(eq=False)
class Member:
    """What the agent knows of a pod. ``state`` is a word for status; ``record`` is what survives a restart."""

    record: Record
    workload_uid: str
    trust_domain: str
    api: Pod | None = None
    state: str = "not_enrolled"
    """not_enrolled, waiting, enrolling, enrolled, leaving, refused, failed"""
    reason: str = ""
    detail: str = ""
    handle: Handle | None = None
    handed: bool = False
    """Whether the holder has the handle as it is."""
    cookie: int = 0
    addressed: bool = False
    """Whether its addresses are those of an enrolled pod."""
    annotated: bool | None = None
    """Whether the pod carries the annotation; None before it was looked at."""
    told: str = ""
    """The reason that was last written to the pod."""
    auto_redirect: bool = False
    """What `auto` means on this kernel."""
    acceleration_problem: str = ""
    """What is wrong with the annotation, for status."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    task: asyncio.Task[None] | None = None
    kicked: asyncio.Event = field(default_factory=asyncio.Event)
    """Something changed since the last look."""
    retry: asyncio.TimerHandle | None = None
    failures: int = 0

    @property
    def title(self) -> str:
        return f"{self.record.namespace}/{self.record.name}"

    def is_named(self, namespace: str, name: str) -> bool:
        return (self.record.namespace, self.record.name) == (namespace, name)

    def described(self) -> LocalPod:
        """The pod as the maps shall hold it."""
        record = self.record
        return LocalPod(
            self.workload_uid,
            record.addresses,
            record.generation,
            self.addressed,
            open=record.open_on_failure,
            bypass=record.bypass,
            identity=self.identity,
            acceleration=self.acceleration,
        )

    def local_pod(self) -> LocalPod | None:
        """What the map of addresses shall say of it; None if it owns none."""
        record = self.record
        return None if record.gone or not record.addresses or not record.generation else self.described()

    @property
    def identity(self) -> Identity | None:
        """None if its fields cannot form one."""
        try:
            return Identity(self.trust_domain, self.record.namespace, self.record.service_account)
        except ValueError:
            return None

    @property
    def acceleration(self) -> Acceleration:
        """As wanted, `auto` resolved for this kernel."""
        return resolve(Acceleration(self.record.acceleration), auto_redirect=self.auto_redirect)

    def row(self) -> dict[str, Any]:
        """For the agent's status."""
        record = self.record
        return {
            "uid": record.uid,
            "namespace": record.namespace,
            "name": record.name,
            "state": self.state,
            "reason": self.reason,
            "detail": self.detail,
            "addresses": list(record.addresses),
            "workload_uid": self.workload_uid,
            "netns_cookie": self.cookie,
            "generation": record.generation,
            "annotated": self.annotated,
            "acceleration": self.acceleration.value,
            "problem": self.acceleration_problem,
        }

    def message(self, number: int) -> m.Pod:
        record = self.record
        return m.Pod(
            uid=record.uid,
            workload_uid=self.workload_uid,
            name=record.name,
            namespace=record.namespace,
            service_account=record.service_account,
            trust_domain=self.trust_domain,
            addresses=record.addresses,
            netns_cookie=self.cookie,
            workload=number,
        )


class MemberSteps:
    """`ambient.node.enrol.Steps` for one pod, on the real kernel and holder."""

    def __init__(
        self,
        member: Member,
        kernel: Kernel,
        holder: HolderClient,
        *,
        open_netns: Callable[[Member], int],
        addresses_changed: Callable[[], None],
        annotate: Annotate,
        acknowledged: Acknowledged,
        wanted_back: Callable[[Member], bool],
    ) -> None:
        self._member = member
        self._kernel = kernel
        self._holder = holder
        self._open_netns = open_netns
        self._addresses_changed = addresses_changed
        self._annotate = annotate
        self._acknowledged = acknowledged
        self._wanted_back = wanted_back

    async def open_listeners(self) -> None:
        member = self._member
        if member.handle is None:
            fd = self._open_netns(member)
            try:
                opened = listeners.open_listeners(fd)
                member.cookie = netns.netns_cookie(fd)
            except BaseException:
                os.close(fd)
                raise
            member.handle = Handle(member.message(0), {m.NETNS: fd} | opened)
            member.handed = False
        wanted = member.message(self._kernel.number(member.workload_uid))
        if not member.handed or member.handle.pod != wanted:
            member.handle = Handle(wanted, member.handle.fds)
            await self._holder.put(member.handle)
            member.handed = True

    async def put_addresses(self) -> None:
        member = self._member
        if member.handle is None:
            raise PlatformFault(f"pod {member.title} has no listeners")
        self._kernel.put_listeners(member.record.addresses, member.handle.fds)
        member.addressed = True
        self._addresses_changed()

    async def attach(self) -> None:
        member = self._member
        assert member.handle is not None
        self._kernel.attach(member.handle.fds[m.NETNS], member.record.uid)
        if member.acceleration is Acceleration.REDIRECT:
            self._kernel.redirection.add(member.record.uid, member.handle.fds[m.NETNS])

    async def put_enrolled(self) -> None:
        member = self._member
        self._kernel.put_enrolled(member.cookie, member.described())

    async def annotate(self, enabled: bool) -> None:
        await self._annotate(self._member, enabled)

    async def acknowledged(self, timeout_s: float) -> bool:
        return await self._acknowledged(self._member.workload_uid, timeout_s)

    async def close_tunnels(self) -> None:
        if self._member.handle is not None:
            listeners.close_for_good(self._member.handle.fds, "hbone")

    async def remove_enrolled(self) -> None:
        if self._member.cookie:
            self._kernel.remove_enrolled(self._member.cookie)

    async def drained(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while not self._wanted_back(self._member):
            self._member.kicked.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._member.kicked.wait()
            except TimeoutError:
                return

    async def detach(self) -> None:
        self._kernel.detach(self._member.record.uid)

    async def hand_back(self, drain_s: float) -> None:
        member, handle = self._member, self._member.handle
        member.handle, member.handed = None, False
        told = True
        try:
            if member.record.uid in self._holder.held:
                await self._holder.remove(member.record.uid, drain_s)
        except AmbientError as error:
            log.warning("pod %s: %s", member.title, error)
            told = False  # who still has them gives them to a new holder, which asks us, and then they go
        finally:
            if handle is not None:
                fd = handle.fds.pop(m.NETNS, -1)
                if fd >= 0:
                    os.close(fd)
                if told:
                    listeners.close_for_good(handle.fds)
                handle.close()

    async def leave_addresses(self) -> None:
        member = self._member
        self._kernel.remove_listeners(member.record.addresses)
        member.addressed = False
        self._addresses_changed()

    async def remove_addresses(self) -> None:
        member = self._member
        addresses, member.record.addresses, member.addressed = member.record.addresses, (), False
        try:
            self._addresses_changed()
        finally:
            self._kernel.remove_listeners(addresses)
            self._kernel.remove_flows(addresses, member.cookie)
