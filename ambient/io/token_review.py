"""Who a service account token belongs to, asked of the Kubernetes API (TokenReview, audience istio-ca).

The token's pod and node come from the claims the API server vouches for. Servers before 1.30 do not name the
node: then it is the node of the very pod (by uid) that the token is bound to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ambient.control.certificates import Caller
from ambient.errors import PlatformFault
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.manifest.kinds import POD

AUDIENCE = "istio-ca"
_PREFIX = "system:serviceaccount:"
_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_NODE_NAME = "authentication.kubernetes.io/node-name"


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Status(msgspec.Struct):
    authenticated: bool = False
    audiences: list[str] | None = None
    user: _User = msgspec.field(default_factory=_User)


class _Review(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


class TokenReviewer:
    """``review`` is what the gRPC server's authentication asks; it remembers nothing."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client

    async def review(self, token: str) -> Caller | None:
        """The owner of the token, None if it is not valid for us. Raises AmbientError if nobody answers."""
        body: Mapping[str, Any] = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        answer = await self._client.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body)
        try:
            status = msgspec.json.decode(answer, type=_Review).status
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PlatformFault(f"the answer to a TokenReview is not readable: {error}") from None
        caller = caller_of(status)
        if caller is None or caller.node_name or not caller.pod_name:
            return caller
        try:
            pod = await self._client.get(POD, caller.pod_name, caller.namespace)
        except ApiStatus as refusal:
            if refusal.code == 404:
                return None  # bound to a pod that is gone
            raise
        if pod.metadata.uid != caller.pod_uid:
            return None
        return Caller(caller.namespace, caller.service_account, caller.pod_name, caller.pod_uid, pod.spec.node_name)


def caller_of(status: _Status) -> Caller | None:
    """A service account that the API server authenticated for our audience, else None."""
    if not status.authenticated or AUDIENCE not in (status.audiences or ()):
        return None
    if not status.user.username.startswith(_PREFIX):
        return None
    namespace, separator, account = status.user.username[len(_PREFIX) :].partition(":")
    if not separator or not namespace or not account or ":" in account:
        return None

    def extra(key: str) -> str:
        values = (status.user.extra or {}).get(key) or [""]
        return values[0] if len(values) == 1 else ""

    return Caller(namespace, account, extra(_POD_NAME), extra(_POD_UID), extra(_NODE_NAME))
