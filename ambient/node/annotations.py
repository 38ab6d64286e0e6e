"""What the agent writes on a pod: whether it is in the mesh, and if it was asked to be and is not, why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final, Protocol

from ambient.errors import AmbientError
from ambient.manifest.mesh import REDIRECTION
from ambient.manifest.objects import Namespace, Pod
from ambient.node.member import Member

NOT_ENROLLED: Final = "ambient.mesh/not-enrolled"
"""Annotation of a pod that was asked into the mesh and cannot be in it: ``reason: sentence``."""

log = logging.getLogger(__name__)


class Api(Protocol):
    """What is asked of the API server. Faults are AmbientError."""

    async def pod(self, namespace: str, name: str) -> Pod | None: ...

    async def namespace(self, name: str) -> Namespace | None: ...

    async def annotate(self, namespace: str, name: str, annotations: Mapping[str, str | None]) -> None:
        """Nothing happens if there is no such pod."""


class Annotations:
    """What is on a pod already is not written again. ``take`` hears what is there."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def take(self, member: Member, pod: Pod) -> None:
        member.annotated = pod.annotations.get(REDIRECTION) == "enabled"
        member.told = pod.annotations.get(NOT_ENROLLED, "")

    async def in_mesh(self, member: Member, enabled: bool) -> None:
        """Write on the pod whether it is in the mesh. Raises AmbientError."""
        if member.annotated is enabled:
            return
        value = "enabled" if enabled else None
        await self._api.annotate(member.record.namespace, member.record.name, {REDIRECTION: value})
        member.annotated = enabled

    async def reason(self, member: Member, reason: str) -> None:
        """Write on the pod why it is not in the mesh; a failure is only logged."""
        if member.told == reason or member.api is None:
            return
        try:
            await self._api.annotate(member.record.namespace, member.record.name, {NOT_ENROLLED: reason or None})
            member.told = reason
        except AmbientError as error:
            log.warning("pod %s: %s", member.title, error)
