"""This node's pods: who is to be in the mesh, and bringing each there, one operation per pod at a time.

Three things drive it: CNI requests, changes of pods and namespaces in the API, and a slow look at the living
pods. All end in `_reconcile`, which compares what is wanted with what is and runs `ambient.node.enrol`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Container
from pathlib import Path
from typing import Any, Final

from ambient.datapath.entries import LocalPod
from ambient.errors import AmbientError, PlatformFault
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import Namespace, Pod
from ambient.manifest.pods import Enrol, Leave, NotEnrolled, addresses_of, in_world, uid_on_node, workload_uid
from ambient.node import enrol, living
from ambient.node import messages as m
from ambient.node.annotations import Annotations, Api
from ambient.node.holder_client import Handle, HolderClient
from ambient.node.kernel import Kernel
from ambient.node.listeners import Refused
from ambient.node.member import Member, MemberSteps
from ambient.node.records import Record, Records
from ambient.node.wishes import Wishes
from ambient.settings import NodeSettings

AUDIT_S: Final = 30.0
RETRY_MAX_S: Final = 30.0
PODS_MAX: Final = 1024

log = logging.getLogger(__name__)


class Pods:
    """``kernel`` and ``holder`` may be None until they are there: then nothing can be enrolled."""

    def __init__(
        self,
        settings: NodeSettings,
        records: Records,
        api: Api,
        acknowledged: Callable[[str, float], Awaitable[bool]],
        pods_cgroup: Callable[[], Path],
    ) -> None:
        self._settings = settings
        self._mesh = Mesh(trust_domain=settings.trust_domain, cluster_id=settings.cluster_id)
        self.records = records
        self.api = api
        self._annotations = Annotations(api)
        self._acknowledged = acknowledged
        self._pods_cgroup = pods_cgroup
        self.kernel: Kernel | None = None
        self.holder: HolderClient | None = None
        self.operating = asyncio.Event()
        """Set when what an earlier agent left was taken up: from then on pods are enrolled."""
        self.counters: dict[str, int] = {}
        self._late: dict[str, Handle] = {}
        self.members: dict[str, Member] = {}
        self.wishes = Wishes(records, self.members, lambda: self.kernel)
        for record in records.pods.values():
            self.members[record.uid] = self.new_member(record)

    # --- what others ask

    def local_pods(self) -> list[LocalPod]:
        return [pod for member in self.members.values() if (pod := member.local_pod()) is not None]

    def status(self) -> list[dict[str, Any]]:
        members = sorted(self.members.values(), key=lambda x: x.title)
        return [member.row() for member in members if not member.record.gone]

    def netns_of(self, cookie: int) -> int | None:
        """The descriptor of an enrolled pod's namespace."""
        for member in self.members.values():
            if member.cookie == cookie and member.handle is not None:
                return member.handle.fds.get(m.NETNS)
        return None

    def count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    # --- start and stop

    async def restore(self, kernel: Kernel, holder: HolderClient, snapshot: dict[str, Handle]) -> None:
        """Take up what an earlier agent left: in the kernel, with the holder, in agent.json. Then operate."""
        self.kernel, self.holder = kernel, holder
        kernel.same_node.netns_of = self.netns_of
        await self.apply_bypass()
        for uid, handle in (snapshot | self._late).items():
            self._adopt(uid, handle)
        self._late.clear()
        for member in list(self.members.values()):
            gone = living.is_gone(member.record, self._pods_cgroup(), self._ended(member))
            if gone or (member.record.gone and member.record.in_mesh):
                log.info("pod %s ended while the agent was away", member.title)
                await self._forget(member)
        kernel.put_pods(self.local_pods())
        for member in self.members.values():
            if member.record.in_mesh and member.handle is not None:
                try:
                    await enrol.enrol(self.steps(member))
                    member.state = "enrolled"
                except (AmbientError, Refused, OSError) as error:
                    log.warning("pod %s: %s", member.title, error)
        self.remove_strangers(kernel)
        self.records.save()
        self.operating.set()
        for member in self.members.values():
            self.kick(member)

    def _adopt(self, uid: str, handle: Handle) -> None:
        member = self.members.get(uid)
        assert self.holder is not None
        if uid in self.holder.held:  # we have them, and the holder the same
            handle.close()
            return
        self.holder.held[uid] = handle
        if member is None or not member.record.in_mesh:
            member = member or self.new_member(Record(uid=uid, namespace=handle.pod.namespace, name=handle.pod.name))
            member.handle, member.handed = handle, True
            asyncio.get_running_loop().create_task(self.steps(member).hand_back(0.0))
            return
        member.handle, member.handed = handle, True
        member.cookie = handle.pod.netns_cookie

    def late(self, handle: Handle) -> None:
        """The holder got a pod's listeners back after it had told us what it has."""
        if self.holder is None:
            self._late[handle.pod.uid] = handle
            return
        self._adopt(handle.pod.uid, handle)
        if (member := self.members.get(handle.pod.uid)) is not None:
            self.kick(member)

    def remove_strangers(self, kernel: Kernel) -> None:
        """Attachments and entries of pods that nobody remembers."""
        known = {x.record.uid for x in self.members.values() if x.handle is not None}
        cookies = {x.cookie for x in self.members.values() if x.handle is not None}
        addresses = {a for x in self.members.values() if x.handle is not None for a in x.record.addresses}
        for uid in kernel.attached():
            if uid not in known:
                kernel.detach(uid)
        for cookie in kernel.maps.enrolled:
            if cookie not in cookies:
                kernel.remove_enrolled(cookie)
        strangers = {key.pod for key, _ in kernel.maps.listeners.items()} - addresses
        kernel.remove_listeners(strangers)
        kernel.remove_flows({key.local for key in (*kernel.maps.authorized, *kernel.maps.origins)} - addresses, 0)

    async def close(self) -> None:
        tasks = [x.task for x in self.members.values() if x.task is not None]
        for member in self.members.values():
            if member.retry is not None:
                member.retry.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the API's word

    def pod_changed(self, old: Pod | None, new: Pod | None) -> None:
        if old is not None and (new is None or uid_on_node(new) != uid_on_node(old)):
            self._deleted(old)
        if new is None:
            return
        uid = uid_on_node(new)
        member = self.members.get(uid)
        if member is not None and not member.is_named(new.namespace, new.name):
            self.count("pods_with_anothers_uid")
            return
        if member is None:
            if len(self.members) >= 2 * PODS_MAX:
                self.count("pods_beyond_limit")
                return
            member = self.new_member(Record(uid=uid, namespace=new.namespace, name=new.name))
            self.members[member.record.uid] = member
            self.records.pods[member.record.uid] = member.record
        member.api = new
        self._annotations.take(member, new)
        member.record.service_account = new.spec.service_account_name or "default"
        self._take_addresses(member, new)
        self.kick(member)

    def _deleted(self, pod: Pod) -> None:
        member = self.members.get(uid_on_node(pod))
        if member is None or not member.is_named(pod.namespace, pod.name):
            return
        member.api = None
        if not member.record.in_mesh and (member.record.gone or not member.record.container_id):
            self.drop(member)
        else:
            self.kick(member)  # DEL comes, or the look at its namespace finds it gone

    def namespace_changed(self, name: str, new: Namespace | None) -> None:
        if self.wishes.take_namespace(name, new):
            for member in self.members.values():
                if member.record.namespace == name:
                    self.kick(member)

    def api_synced(self, pods: Container[str], unreadable: Container[str], namespaces: Container[str]) -> None:
        """Everything was told once: what is not among these (UIDs and, of unreadable ones, keys of pods) is gone from
        the API, also if an earlier watch, which broke off, had told of it."""
        for member in list(self.members.values()):
            known = member.api
            if known is not None and member.record.uid not in pods and known.key not in unreadable:
                self._deleted(known)
        for name in [name for name in self.wishes.namespaces if name not in namespaces]:
            self.namespace_changed(name, None)
        self.wishes.synced = True
        for member in list(self.members.values()):
            if member.api is None and member.record.gone and not member.record.in_mesh:
                self.drop(member)
            else:
                self.kick(member)

    def _take_addresses(self, member: Member, pod: Pod) -> None:
        """A pod that was there before the plugin has its addresses from its status; else ADD's word holds."""
        record = member.record
        if record.gone or record.container_id or pod.spec.host_network:
            return
        try:
            addresses = tuple(str(a) for a in addresses_of(pod)) if in_world(pod) else ()
        except AmbientError as error:
            log.warning("%s", error)
            return
        if addresses == record.addresses or (record.in_mesh and addresses):
            return
        if record.in_mesh:
            return  # it leaves the mesh first
        record.addresses = addresses
        if addresses:
            record.generation = self.records.next_generation(time.time_ns())
        self.addresses_changed()

    def addresses_changed(self) -> None:
        """Raises OSError if agent.json cannot be written; the kernel knows nevertheless."""
        try:
            self.records.save()
        finally:
            if self.kernel is not None:
                self.kernel.put_pods(self.local_pods())

    def new_member(self, record: Record) -> Member:
        return Member(record, workload_uid(self._mesh, record.namespace, record.name), self._mesh.trust_domain)

    def drop(self, member: Member) -> None:
        if member.retry is not None:
            member.retry.cancel()
        self.members.pop(member.record.uid, None)
        self.records.pods.pop(member.record.uid, None)
        self.addresses_changed()

    # --- what is wanted

    async def set_bypass(self, on: bool, namespace: str) -> None:
        """Switch capture off or on again, at once, for the node or (``namespace``) for its pods there. Remembered."""
        self.records.bypass = self.wishes.bypass().switched(on, namespace)
        where = f"namespace {namespace}" if namespace else "this node"
        log.warning("capture of %s: %s by the operator", where, "switched off" if on else "back to normal")
        try:
            self.records.save()
        finally:
            await self.apply_bypass()

    async def apply_bypass(self) -> None:
        """Write into the kernel what is remembered. Raises AmbientError."""
        if self.kernel is None:
            return
        if self.records.bypass is not None and self.kernel.bypassed != self.records.bypass.node:
            self.kernel.set_bypass(self.records.bypass.node)
        for member in self.members.values():
            if self.wishes.take_bypass(member) and member.state == "enrolled":
                await self.steps(member).put_enrolled()
        self.addresses_changed()

    # --- one pod at a time

    def kick(self, member: Member) -> None:
        member.kicked.set()
        if not self.operating.is_set() or (member.task is not None and not member.task.done()):
            return
        member.task = asyncio.get_running_loop().create_task(self._work(member))

    async def _work(self, member: Member) -> None:
        while member.kicked.is_set():
            member.kicked.clear()
            try:
                async with member.lock:
                    await self._reconcile(member)
                member.failures = 0
            except (Refused, AmbientError, OSError) as error:
                self._failed(member, error)
                return
            except Exception:
                log.exception("pod %s", member.title)
                self._failed(member, PlatformFault("a bug in the agent; see its log"))
                return

    def _failed(self, member: Member, error: Exception) -> None:
        member.failures += 1
        if isinstance(error, Refused):
            self.note(member, "refused", error.reason, error.detail)
        elif member.state == "leaving":
            self.note(member, "leaving", "failed", str(error))
        else:
            self.note(member, "failed", "failed", str(error))
        delay = min(RETRY_MAX_S, 0.5 * 2.0 ** min(member.failures, 8))
        if member.retry is not None:
            member.retry.cancel()
        member.retry = asyncio.get_running_loop().call_later(delay, self.kick, member)

    def note(self, member: Member, state: str, reason: str = "", detail: str = "") -> None:
        if (state, reason, detail) != (member.state, member.reason, member.detail):
            if reason:
                self.count(f"not_enrolled_{reason}")
            log.info("pod %s: %s%s", member.title, state, f" ({reason}: {detail})" if reason else "")
        member.state, member.reason, member.detail = state, reason, detail

    async def _reconcile(self, member: Member) -> None:
        record = member.record
        if record.gone:
            if record.in_mesh:  # its end was broken off
                await self._forget(member)
                if self._ended(member):
                    self.drop(member)
            return
        if self._ended(member) and living.is_gone(record, self._pods_cgroup(), True):
            await self._forget(member)
            self.drop(member)
            return
        match self.wishes.verdict(member):
            case None:
                return
            case Enrol():
                await self._bring_in(member)
            case Leave():
                await self._bring_out(member)
                self.note(member, "not_enrolled")
                await self._annotations.reason(member, "")
            case NotEnrolled(reason=reason, detail=detail):
                await self._bring_out(member)
                self.note(member, "refused", reason, detail)
                await self._annotations.reason(member, f"{reason}: {detail}")

    async def _bring_in(self, member: Member) -> None:
        record = member.record
        if not record.addresses:
            self.note(member, "waiting", "no_address", "the pod has no address yet")
            return
        try:
            self.check(member)
            changed = self.wishes.take_all(member)
            if member.state != "enrolled" or member.handle is None or not member.handed:
                await self.join(member)
            elif changed:
                await self.steps(member).put_enrolled()
                self.addresses_changed()
        except Refused as refusal:
            await self._bring_out(member)
            self.note(member, "refused", refusal.reason, refusal.detail)
            await self._annotations.reason(member, f"{refusal.reason}: {refusal.detail}")
            raise
        await self.steps(member).annotate(True)
        await self._annotations.reason(member, "")

    def check(self, member: Member) -> None:
        """Raises Refused if the pod, as it is now, cannot be served."""
        held = member.handle.fds[m.NETNS] if member.handle is not None else None
        living.check(member.record, held, self._pods_cgroup())

    async def join(self, member: Member) -> None:
        """Raises after undoing everything. The annotation is the caller's."""
        began = time.monotonic()
        member.record.in_mesh = True
        self.records.save()
        self.note(member, "enrolling")
        steps = self.steps(member)
        try:
            await enrol.enrol(steps)
        except BaseException:
            self.note(member, "failed", "failed", "enrolling was broken off")
            try:
                await enrol.undo(steps)
            except (AmbientError, OSError) as error:
                log.error("pod %s: undoing its enrolment: %s", member.title, error)
            member.record.in_mesh = False
            self.records.save()
            raise
        self.count("enrolled")
        self.note(member, "enrolled")
        log.info("pod %s: took %.0f ms", member.title, 1000 * (time.monotonic() - began))

    async def _bring_out(self, member: Member) -> None:
        if not member.record.in_mesh:
            if member.annotated and member.api is not None:
                await self.steps(member).annotate(False)
            return
        self.note(member, "leaving")
        await enrol.leave(self.steps(member))
        member.kicked.set()  # much may have changed meanwhile: look once more
        member.record.in_mesh = False
        self.records.save()
        self.count("left")
        if member.api is not None:
            self._take_addresses(member, member.api)

    async def _forget(self, member: Member) -> None:
        """The pod is gone: nothing of it is left in kernel or holder when this returns."""
        self.note(member, "gone")
        member.record.gone = True
        await enrol.forget(self.steps(member))
        member.record.in_mesh = False
        member.record.container_id = member.record.netns_path = ""
        self.records.save()

    def steps(self, member: Member) -> MemberSteps:
        assert self.kernel is not None and self.holder is not None
        return MemberSteps(
            member,
            self.kernel,
            self.holder,
            open_netns=lambda x: living.open_netns(x.record, self._pods_cgroup()),
            addresses_changed=self.addresses_changed,
            annotate=self._annotations.in_mesh,
            acknowledged=self._acknowledged,
            wanted_back=lambda x: isinstance(self.wishes.verdict(x), Enrol),
        )

    def _ended(self, member: Member) -> bool:
        """Whether the API says that there is no such pod."""
        return member.api is None and self.wishes.synced

    async def audit(self) -> None:
        """Look at every living pod again, for ever: what was fine may forward packets by now."""
        while True:
            await asyncio.sleep(AUDIT_S)
            for member in list(self.members.values()):
                self.kick(member)

    # --- sandboxes that end

    def release(self, member: Member) -> None:
        """ADD failed: the runtime takes the sandbox away and comes again."""
        member.record.addresses = ()
        member.record.container_id = member.record.netns_path = ""
        self.addresses_changed()

    async def forget_or_release(self, member: Member) -> None:
        if self.kernel is not None:
            await self._forget(member)
        else:
            self.release(member)
            member.record.gone = True

    async def interrupt(self, member: Member) -> None:
        """Break off whatever is being done to the pod: its sandbox is new or gone."""
        if member.task is not None and not member.task.done():
            member.task.cancel()
            await asyncio.gather(member.task, return_exceptions=True)
