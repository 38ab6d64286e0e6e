"""CNI requests: what ADD, DEL, CHECK and GC of a pod's sandbox do to its membership.

ADD of a pod of the mesh answers when the pod is enrolled, or fails with the reason, so that no container of it
ever runs uncaptured; a pod that by its nature cannot be in the mesh starts outside it, with the reason on it. DEL
answers when nothing of the pod is left, so its address can be given to another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Final

from ambient.errors import AmbientError, PlatformFault
from ambient.manifest import mesh as words
from ambient.manifest.objects import Namespace, Pod
from ambient.manifest.pods import SYSTEM_NAMESPACES, Enrol, uid_on_node
from ambient.node import cni, enrol
from ambient.node.listeners import Refused
from ambient.node.member import Member
from ambient.node.pods import Pods
from ambient.node.records import Record

START_S: Final = 10.0
"""How long a request waits for an agent that has just been restarted."""

log = logging.getLogger(__name__)


class Sandboxes:
    """Answers CNI requests for `Pods`."""

    def __init__(self, pods: Pods) -> None:
        self._pods = pods

    async def answer(self, request: cni.Request) -> cni.Answer:
        """Answer a request. Never raises."""
        try:
            match request.command:
                case "ADD":
                    return await self._add(request)
                case "DEL":
                    return await self._del(request)
                case "GC":
                    return await self._gc(request)
                case _:
                    return self._check_request(request)
        except (AmbientError, OSError) as error:
            return cni.error(request.version or "1.1.0", cni.TRY_AGAIN_LATER, str(error))
        except Exception:
            log.exception("CNI %s", request.command)
            return cni.error(request.version or "1.1.0", cni.NOT_ENROLLED, "a bug in the ambient agent; see its log")

    async def _started(self) -> bool:
        try:
            async with asyncio.timeout(START_S):
                await self._pods.operating.wait()
        except TimeoutError:
            return False
        return True

    async def _add(self, request: cni.Request) -> cni.Answer:
        if not request.of_a_pod or request.pod_namespace in SYSTEM_NAMESPACES:
            return cni.done(request)
        pod, namespace = await self._look_up(request)
        verdict = self._pods.wishes.judge(pod, namespace)
        if isinstance(verdict, Enrol) and not await self._started():
            return cni.error(
                request.version, cni.TRY_AGAIN_LATER, "the ambient agent is not ready yet; see its /status"
            )
        uid = request.pod_uid or uid_on_node(pod)
        member = self._pods.members.get(uid)
        if member is not None and not member.is_named(request.pod_namespace, request.pod_name):
            await self._forget(member)  # an object that took the UID of this pod for its own
            member = None
        if member is None:
            member = self._pods.new_member(Record(uid=uid, namespace=request.pod_namespace, name=request.pod_name))
            self._pods.members[uid] = member
            self._pods.records.pods[uid] = member.record
        await self._pods.interrupt(member)
        addresses = tuple(str(a) for a in request.addresses)
        for other in [
            x for x in self._pods.members.values() if x is not member and set(x.record.addresses) & set(addresses)
        ]:
            # Its DEL was lost: the address belongs to this pod now, so nothing may be left of the other one.
            await self._forget(other)
        async with member.lock:
            if member.record.in_mesh and self._pods.kernel is not None:
                await enrol.forget(self._pods.steps(member))  # an earlier sandbox of the same pod
            record = member.record
            member.api = pod
            member.annotated = pod.annotations.get(words.REDIRECTION) == "enabled"
            record.service_account = pod.spec.service_account_name or "default"
            record.container_id, record.ifname = request.container_id, request.ifname
            record.netns_path, record.netns_inode = request.netns, os.stat(request.netns).st_ino
            record.addresses, record.gone, record.in_mesh = addresses, False, False
            record.generation = self._pods.records.next_generation(time.time_ns())
            self._pods.wishes.take_all(member, namespace)
            self._pods.addresses_changed()
            if isinstance(verdict, Enrol):
                return await self._add_to_mesh(request, member)
        self._pods.kick(member)
        return cni.done(request)

    async def _forget(self, member: Member) -> None:
        await self._pods.interrupt(member)
        async with member.lock:
            await self._pods.forget_or_release(member)

    async def _add_to_mesh(self, request: cni.Request, member: Member) -> cni.Answer:
        try:
            self._pods.check(member)
            await self._pods.join(member)
        except Refused as refusal:
            self._pods.note(member, "refused", refusal.reason, refusal.detail)
            if refusal.reason in ("forwards", "nested_namespaces"):
                self._pods.kick(member)  # which tells the pod
                return cni.done(request)
            self._pods.release(member)
            return cni.error(request.version, cni.NOT_ENROLLED, f"pod {member.title} cannot be enrolled: {refusal}")
        except (AmbientError, OSError) as error:
            self._pods.release(member)
            return cni.error(request.version, cni.NOT_ENROLLED, f"pod {member.title} cannot be enrolled: {error}")
        try:
            await self._pods.steps(member).annotate(True)
        except AmbientError as error:
            log.warning("pod %s: %s", member.title, error)
        self._pods.kick(member)
        return cni.done(request)

    async def _look_up(self, request: cni.Request) -> tuple[Pod, Namespace]:
        """The pod and its namespace, from what was watched or else from the API. PlatformFault if unknown."""
        member = self._pods.members.get(request.pod_uid)
        named = member is not None and member.is_named(request.pod_namespace, request.pod_name)
        pod = member.api if member is not None and named else None
        if pod is None:
            pod = await self._pods.api.pod(request.pod_namespace, request.pod_name)
        if pod is None:
            raise PlatformFault(f"pod {request.pod_namespace}/{request.pod_name} is not in the API (yet)")
        if request.pod_uid and request.pod_uid not in (pod.metadata.uid, uid_on_node(pod)):
            raise PlatformFault(f"pod {pod.key} has another UID by now ({pod.metadata.uid})")
        namespace = self._pods.wishes.namespaces.get(pod.namespace) or await self._pods.api.namespace(pod.namespace)
        if namespace is None:
            raise PlatformFault(f"namespace {pod.namespace} is not in the API")
        return pod, namespace

    async def _del(self, request: cni.Request) -> cni.Answer:
        member = self._pods.members.get(request.pod_uid) or next(
            (
                x
                for x in self._pods.members.values()
                if request.container_id and x.record.container_id == request.container_id
            ),
            None,
        )
        if member is None or (member.record.gone and not member.record.in_mesh):
            return cni.done(request)
        if member.record.container_id and member.record.container_id != request.container_id:
            return cni.done(request)  # an earlier sandbox of a pod that has a new one
        if member.record.in_mesh:
            await self._started()
        await self._pods.interrupt(member)
        async with member.lock:
            await self._pods.forget_or_release(member)
        if member.api is None and self._pods.wishes.synced:
            self._pods.drop(member)
        return cni.done(request)

    async def _gc(self, request: cni.Request) -> cni.Answer:
        if request.valid is None:
            return cni.done(request)
        valid = set(request.valid)
        for member in list(self._pods.members.values()):
            record = member.record
            if record.container_id and cni.Attachment(record.container_id, record.ifname) not in valid:
                await self._pods.interrupt(member)
                async with member.lock:
                    await self._pods.forget_or_release(member)
        return cni.done(request)

    def _check_request(self, request: cni.Request) -> cni.Answer:
        member = self._pods.members.get(request.pod_uid)
        if member is None or member.state not in ("failed", "enrolling"):
            return cni.done(request)
        return cni.error(
            request.version, cni.NOT_ENROLLED, f"pod {member.title} is not in the mesh: {member.detail or member.state}"
        )
