"""Whose token it is, from the API server's answer: only what it vouches for, and only for our audience."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ambient.control.certificates import Caller
from ambient.errors import PlatformFault
from ambient.io.kube import KubeClient
from ambient.io.kube_answers import ApiStatus
from ambient.io.kube_auth import Credentials
from ambient.io.token_review import TokenReviewer
from ambient.manifest.kinds import POD


class Api(KubeClient):
    """Answers a TokenReview and at most one pod."""

    def __init__(self, status: Any, pod: dict[str, Any] | None = None) -> None:
        super().__init__(Credentials("http://127.0.0.1:1"))
        self.status = status
        self.pod = pod
        self.asked: Any = None

    async def request(self, method: str, path: str, **more: Any) -> bytes:
        if method == "POST":
            self.asked = (path, more["body"])
            return json.dumps({"status": self.status}).encode() if self.status != "rubbish" else b"<html>"
        assert path == POD.path("ambient-system", "ambient-node-x")
        if self.pod is None:
            raise ApiStatus(404, "NotFound", "gone")
        return json.dumps(self.pod).encode()


def status(**changes: Any) -> dict[str, Any]:
    extra = {
        "authentication.kubernetes.io/pod-name": ["ambient-node-x"],
        "authentication.kubernetes.io/pod-uid": ["u1"],
        "authentication.kubernetes.io/node-name": ["n1"],
    }
    user = {"username": "system:serviceaccount:ambient-system:ambient-node", "extra": extra | changes.pop("extra", {})}
    user |= changes.pop("user", {})
    return {"authenticated": True, "audiences": ["istio-ca"], "user": user} | changes


NODE = Caller("ambient-system", "ambient-node", "ambient-node-x", "u1", "n1")
NO_NODE = {"extra": {"authentication.kubernetes.io/node-name": []}}
POD_THERE = {"metadata": {"name": "ambient-node-x", "uid": "u1"}, "spec": {"nodeName": "n7"}}


async def test_the_claims_of_the_token_are_the_caller() -> None:
    api = Api(status())
    assert await TokenReviewer(api).review("sesame") == NODE
    path, body = api.asked
    assert path == "/apis/authentication.k8s.io/v1/tokenreviews"
    assert body["spec"] == {"token": "sesame", "audiences": ["istio-ca"]}


@pytest.mark.parametrize(
    "answer",
    [
        {"authenticated": False},
        {},
        status(authenticated=False),
        status(audiences=["https://kubernetes.default.svc"]),
        status(audiences=None),  # a server that does not check audiences proves nothing
        status(user={"username": "kubernetes-admin"}),
        status(user={"username": "system:serviceaccount:only"}),
        status(user={"username": "system:serviceaccount::x"}),
        status(user={"username": "system:serviceaccount:a:b:c"}),
    ],
)
async def test_anything_less_is_nobody(answer: dict[str, Any]) -> None:
    assert await TokenReviewer(Api(answer)).review("sesame") is None


async def test_an_older_server_does_not_name_the_node_so_the_bound_pod_does() -> None:
    caller = await TokenReviewer(Api(status(**NO_NODE), POD_THERE)).review("sesame")
    assert caller is not None and caller.node_name == "n7"


async def test_a_pod_that_is_gone_or_another_of_its_name_is_nobody() -> None:
    assert await TokenReviewer(Api(status(**NO_NODE))).review("sesame") is None
    other = {"metadata": {"name": "ambient-node-x", "uid": "u2"}, "spec": {"nodeName": "n7"}}
    assert await TokenReviewer(Api(status(**NO_NODE), other)).review("sesame") is None


async def test_several_values_of_one_claim_are_none() -> None:
    answer = status(extra={"authentication.kubernetes.io/node-name": ["n1", "n2"]})
    caller = await TokenReviewer(Api(answer, POD_THERE)).review("sesame")
    assert caller is not None and caller.node_name == "n7"


async def test_an_answer_that_is_no_review_is_no_verdict() -> None:
    with pytest.raises(PlatformFault, match="not readable"):
        await TokenReviewer(Api("rubbish")).review("sesame")
