"""Service account tokens: signed, bound to a pod, and reviewed against what the store holds now.

Tokens are JWTs (ES256) of the form the Kubernetes API server issues. A token is good only while its service
account, and the pod it is bound to, exist with the uids they had.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.moments import parse_timestamp, timestamp
from ambient.lab.apiserver.status import (
    Cause,
    JsonObject,
    conflict,
    invalid,
    invalid_value,
    not_found,
)
from ambient.lab.apiserver.store import Store

ISSUER = "https://kubernetes.default.svc.cluster.local"
EXPIRATION_MIN_S, EXPIRATION_DEFAULT_S, EXPIRATION_MAX_S = 600, 3600, 1 << 32
_TOKEN_BYTES_MAX = 8192
_DELETION_LEEWAY = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class User:
    """Who sent a request."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()
    namespace: str = ""
    """Namespace of the service account; empty for other users."""

    def document(self) -> JsonObject:
        """UserInfo of authentication.k8s.io."""
        info: JsonObject = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            info["uid"] = self.uid
        if self.extra:
            info["extra"] = {key: list(values) for key, values in self.extra}
        return info


@dataclass(frozen=True, slots=True)
class Accepted:
    user: User
    audiences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    why: str


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _json(value: JsonObject) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class TokenAuthority:
    """Issues and reviews tokens. The key lives as long as the server."""

    def __init__(self, store: Store, audiences: Sequence[str] = (ISSUER,)) -> None:
        self._store = store
        self._audiences = tuple(audiences)
        self._key = ec.generate_private_key(ec.SECP256R1())
        der = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._key_id = _encode(hashlib.sha256(der).digest())

    def key_set(self) -> JsonObject:
        """The JWKS document of the signing key."""
        numbers = self._key.public_key().public_numbers()
        point = {"x": _encode(numbers.x.to_bytes(32, "big")), "y": _encode(numbers.y.to_bytes(32, "big"))}
        return {"keys": [{"use": "sig", "kty": "EC", "kid": self._key_id, "crv": "P-256", "alg": "ES256", **point}]}

    def request(self, namespace: str, name: str, request: JsonObject) -> JsonObject:
        """Answer a TokenRequest for a service account. Raises ApiError (404, 409, 422)."""
        account = self._store.get(schema.SERVICE_ACCOUNT, namespace, name)
        spec = request.get("spec") or {}
        if not isinstance(spec, dict):
            raise invalid("TokenRequest", "authentication.k8s.io", "", [invalid_value("spec", spec, "an object")])
        audiences, lifetime_s, bound, causes = self._read(spec)
        if causes:
            raise invalid("TokenRequest", "authentication.k8s.io", "", causes)
        now = self._store.now
        expires = now + timedelta(seconds=lifetime_s)
        claims: JsonObject = {
            "aud": audiences,
            "exp": int(expires.timestamp()),
            "iat": int(now.timestamp()),
            "nbf": int(now.timestamp()),
            "iss": ISSUER,
            "jti": str(uuid.uuid4()),
            "sub": f"system:serviceaccount:{namespace}:{name}",
        }
        private: JsonObject = {
            "namespace": namespace,
            "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]},
        }
        if bound:
            private.update(self._bind(namespace, name, bound))
        claims["kubernetes.io"] = private
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": name, "namespace": namespace, "creationTimestamp": timestamp(now)},
            "spec": {"audiences": audiences, "expirationSeconds": lifetime_s, "boundObjectRef": bound},
            "status": {"token": self.sign(claims), "expirationTimestamp": timestamp(expires)},
        }

    def _read(self, spec: JsonObject) -> tuple[list[str], int, JsonObject | None, list[Cause]]:
        causes = []
        audiences = spec.get("audiences") or list(self._audiences)
        if not isinstance(audiences, list) or not all(isinstance(item, str) for item in audiences):
            causes.append(invalid_value("spec.audiences", audiences, "must be a list of strings"))
        lifetime_s = spec.get("expirationSeconds")
        lifetime_s = EXPIRATION_DEFAULT_S if lifetime_s is None else lifetime_s
        if not isinstance(lifetime_s, int) or isinstance(lifetime_s, bool):
            causes.append(invalid_value("spec.expirationSeconds", lifetime_s, "must be a number"))
            lifetime_s = 0
        elif lifetime_s < EXPIRATION_MIN_S:
            rule = "may not specify a duration less than 10 minutes"
            causes.append(invalid_value("spec.expirationSeconds", lifetime_s, rule))
        elif lifetime_s > EXPIRATION_MAX_S:
            rule = "may not specify a duration larger than 2^32 seconds"
            causes.append(invalid_value("spec.expirationSeconds", lifetime_s, rule))
        bound = spec.get("boundObjectRef")
        if bound is not None and not (isinstance(bound, dict) and bound.get("kind") == "Pod" and bound.get("name")):
            causes.append(invalid_value("spec.boundObjectRef", bound, "cannot bind token to anything but a Pod here"))
        return audiences, lifetime_s, bound, causes

    def _bind(self, namespace: str, account: str, bound: JsonObject) -> JsonObject:
        pod = self._store.find(schema.POD, namespace, str(bound["name"]))
        if pod is None:
            raise not_found("pods", "", str(bound["name"]))
        metadata = pod["metadata"]
        if pod["spec"].get("serviceAccountName") != account:
            why = "cannot bind token for serviceaccount " + repr(account) + " to pod running with different "
            raise invalid(
                "TokenRequest",
                "",
                "",
                [Cause("spec.boundObjectRef", why + "serviceaccount name.", "FieldValueInvalid")],
            )
        if bound.get("uid") and bound["uid"] != metadata["uid"]:
            why = f"the UID in the bound object reference ({bound['uid']}) does not match the UID in record"
            raise conflict("pods", "", metadata["name"], why)
        claims: JsonObject = {"pod": {"name": metadata["name"], "uid": metadata["uid"]}}
        if node := pod["spec"].get("nodeName"):
            claims["node"] = {"name": node}
            found = self._store.find(schema.NODE, "", node)
            if found is not None:
                claims["node"]["uid"] = found["metadata"]["uid"]
        return claims

    def sign(self, claims: JsonObject) -> str:
        """A JWT of these claims."""
        header = {"alg": "ES256", "kid": self._key_id, "typ": "JWT"}
        signed = f"{_encode(_json(header))}.{_encode(_json(claims))}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def _claims(self, token: str) -> JsonObject | None:
        """The claims of a token that this authority signed, or None."""
        if len(token) > _TOKEN_BYTES_MAX or token.count(".") != 2:
            return None
        signed, _, signature_text = token.rpartition(".")
        header_text, _, payload_text = signed.partition(".")
        try:
            header: Any = json.loads(_decode(header_text))
            signature = _decode(signature_text)
            if not isinstance(header, dict) or header.get("alg") != "ES256" or len(signature) != 64:
                return None
            encoded = encode_dss_signature(int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
            self._key.public_key().verify(encoded, signed.encode(), ec.ECDSA(hashes.SHA256()))
            claims: Any = json.loads(_decode(payload_text))
        except (InvalidSignature, binascii.Error, ValueError, RecursionError):
            return None
        return claims if isinstance(claims, dict) else None

    def review(self, token: str, audiences: Sequence[str] = ()) -> Accepted | Refused:
        """Whether a token is good now, for one of ``audiences`` (empty: the API server's own)."""
        claims = self._claims(token)
        if claims is None:
            return Refused("invalid bearer token")
        now = self._store.now.timestamp()
        if now >= claims["exp"]:
            return Refused("invalid bearer token, service account token has expired")
        if now < claims["nbf"] - 1:
            return Refused("invalid bearer token, service account token is not valid yet")
        wanted = tuple(audiences) or self._audiences
        meant = tuple(audience for audience in wanted if audience in claims["aud"])
        if not meant:
            return Refused(f"token audiences {claims['aud']} is invalid for the target audiences {list(wanted)}")
        private = claims["kubernetes.io"]
        namespace, account = private["namespace"], private["serviceaccount"]
        stored = self._store.find(schema.SERVICE_ACCOUNT, namespace, account["name"])
        if stored is None or stored["metadata"]["uid"] != account["uid"]:
            return Refused("invalid bearer token, service account has been deleted")
        extra: list[tuple[str, tuple[str, ...]]] = [
            ("authentication.kubernetes.io/credential-id", (f"JTI={claims['jti']}",))
        ]
        if "pod" in private:
            why = self._pod_gone(namespace, private["pod"])
            if why:
                return Refused(why)
            extra.append(("authentication.kubernetes.io/pod-name", (private["pod"]["name"],)))
            extra.append(("authentication.kubernetes.io/pod-uid", (private["pod"]["uid"],)))
        if "node" in private:
            extra.append(("authentication.kubernetes.io/node-name", (private["node"]["name"],)))
            if "uid" in private["node"]:
                extra.append(("authentication.kubernetes.io/node-uid", (private["node"]["uid"],)))
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
        user = User(claims["sub"], account["uid"], groups, tuple(sorted(extra)), namespace)
        return Accepted(user, meant)

    def _pod_gone(self, namespace: str, bound: JsonObject) -> str:
        pod = self._store.find(schema.POD, namespace, bound["name"])
        if pod is None or pod["metadata"]["uid"] != bound["uid"]:
            return "invalid bearer token, service account token is bound to a pod that is gone"
        deleted = pod["metadata"].get("deletionTimestamp")
        if deleted and self._store.now > parse_timestamp(deleted) + _DELETION_LEEWAY:
            return "invalid bearer token, service account token is bound to a pod that is deleted"
        return ""

    def review_document(self, review: JsonObject) -> JsonObject:
        """Answer a TokenReview (authentication.k8s.io/v1)."""
        spec = review.get("spec") or {}
        result = self.review(str(spec.get("token", "")), spec.get("audiences") or ())
        if isinstance(result, Accepted):
            status: JsonObject = {
                "authenticated": True,
                "user": result.user.document(),
                "audiences": list(result.audiences),
            }
        else:
            status = {"user": {}, "error": result.why}
        return {**review, "metadata": {}, "status": status}
