"""Bodies in Kubernetes' protobuf form, which new kubectls send for `kubectl create` of the oldest kinds.

A table of the messages those commands send, and a decoder to the same JSON objects as everything else. A
field that the table does not know is refused, never dropped: the same manifest as YAML is always accepted.
Field numbers are those of k8s.io/api and k8s.io/apimachinery (they never change).
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any, Final

from ambient.lab.apiserver.status import ApiError, JsonObject, bad_request, unsupported_media_type

MEDIA_TYPE: Final = "application/vnd.kubernetes.protobuf"
_MAGIC: Final = b"k8s\x00"
_DEPTH_MAX: Final = 32

_Field = tuple[str, str]
"""JSON name and type: scalars, Time or a message's name; ``*`` keeps zero, [] repeats, {} maps."""

_TYPE_META: Final[dict[int, _Field]] = {1: ("apiVersion", "str"), 2: ("kind", "str")}
_CONTAINER_STRINGS: Final[dict[int, _Field]] = {
    1: ("name", "str"),
    2: ("image", "str"),
    3: ("command", "[str]"),
    4: ("args", "[str]"),
    5: ("workingDir", "str"),
}

MESSAGES: Final[dict[str, dict[int, _Field]]] = {
    "Unknown": {
        1: ("typeMeta", "TypeMeta"),
        2: ("raw", "raw"),
        3: ("contentEncoding", "str"),
        4: ("contentType", "str"),
    },
    "TypeMeta": _TYPE_META,
    "OwnerReference": {
        1: ("kind", "str"),
        3: ("name", "str"),
        4: ("uid", "str"),
        5: ("apiVersion", "str"),
        6: ("controller", "bool*"),
        7: ("blockOwnerDeletion", "bool*"),
    },
    "ObjectMeta": {
        1: ("name", "str"),
        2: ("generateName", "str"),
        3: ("namespace", "str"),
        4: ("selfLink", "str"),
        5: ("uid", "str"),
        6: ("resourceVersion", "str"),
        7: ("generation", "int"),
        8: ("creationTimestamp", "Time"),
        9: ("deletionTimestamp", "Time"),
        10: ("deletionGracePeriodSeconds", "int*"),
        11: ("labels", "{str}"),
        12: ("annotations", "{str}"),
        13: ("ownerReferences", "[OwnerReference]"),
        14: ("finalizers", "[str]"),
    },
    "ObjectReference": {
        1: ("kind", "str"),
        2: ("namespace", "str"),
        3: ("name", "str"),
        4: ("uid", "str"),
        5: ("apiVersion", "str"),
        6: ("resourceVersion", "str"),
        7: ("fieldPath", "str"),
    },
    "LocalObjectReference": {1: ("name", "str")},
    "Namespace": {1: ("metadata", "ObjectMeta"), 2: ("spec", "NamespaceSpec"), 3: ("status", "NamespaceStatus")},
    "NamespaceSpec": {1: ("finalizers", "[str]")},
    "NamespaceStatus": {1: ("phase", "str")},
    "ConfigMap": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{str}"),
        3: ("binaryData", "{bytes}"),
        4: ("immutable", "bool*"),
    },
    "Secret": {
        1: ("metadata", "ObjectMeta"),
        2: ("data", "{bytes}"),
        3: ("type", "str"),
        4: ("stringData", "{str}"),
        5: ("immutable", "bool*"),
    },
    "ServiceAccount": {
        1: ("metadata", "ObjectMeta"),
        2: ("secrets", "[ObjectReference]"),
        3: ("imagePullSecrets", "[LocalObjectReference]"),
        4: ("automountServiceAccountToken", "bool*"),
    },
    "Service": {1: ("metadata", "ObjectMeta"), 2: ("spec", "ServiceSpec"), 3: ("status", "ServiceStatus")},
    "ServiceSpec": {
        1: ("ports", "[ServicePort]"),
        2: ("selector", "{str}"),
        3: ("clusterIP", "str"),
        4: ("type", "str"),
        5: ("externalIPs", "[str]"),
        7: ("sessionAffinity", "str"),
        8: ("loadBalancerIP", "str"),
        9: ("loadBalancerSourceRanges", "[str]"),
        10: ("externalName", "str"),
        11: ("externalTrafficPolicy", "str"),
        12: ("healthCheckNodePort", "int"),
        13: ("publishNotReadyAddresses", "bool"),
        17: ("ipFamilyPolicy", "str"),
        18: ("clusterIPs", "[str]"),
        19: ("ipFamilies", "[str]"),
        20: ("allocateLoadBalancerNodePorts", "bool*"),
        21: ("loadBalancerClass", "str"),
        22: ("internalTrafficPolicy", "str"),
    },
    "ServicePort": {
        1: ("name", "str"),
        2: ("protocol", "str"),
        3: ("port", "int"),
        4: ("targetPort", "IntOrString"),
        5: ("nodePort", "int"),
        6: ("appProtocol", "str"),
    },
    "ServiceStatus": {1: ("loadBalancer", "LoadBalancerStatus")},
    "LoadBalancerStatus": {},
    "Deployment": {1: ("metadata", "ObjectMeta"), 2: ("spec", "DeploymentSpec"), 3: ("status", "DeploymentStatus")},
    "DeploymentSpec": {
        1: ("replicas", "int*"),
        2: ("selector", "LabelSelector"),
        3: ("template", "PodTemplateSpec"),
        4: ("strategy", "DeploymentStrategy"),
        5: ("minReadySeconds", "int"),
        6: ("revisionHistoryLimit", "int*"),
        7: ("paused", "bool"),
        9: ("progressDeadlineSeconds", "int*"),
    },
    "DeploymentStrategy": {1: ("type", "str"), 2: ("rollingUpdate", "RollingUpdate")},
    "RollingUpdate": {1: ("maxUnavailable", "IntOrString"), 2: ("maxSurge", "IntOrString")},
    "DeploymentStatus": {number: (f"count{number}", "int") for number in (1, 2, 3, 4, 5, 7, 9)},
    "LabelSelector": {1: ("matchLabels", "{str}"), 2: ("matchExpressions", "[LabelSelectorRequirement]")},
    "LabelSelectorRequirement": {1: ("key", "str"), 2: ("operator", "str"), 3: ("values", "[str]")},
    "PodTemplateSpec": {1: ("metadata", "ObjectMeta"), 2: ("spec", "PodSpec")},
    "PodSpec": {
        2: ("containers", "[Container]"),
        3: ("restartPolicy", "str"),
        4: ("terminationGracePeriodSeconds", "int*"),
        5: ("activeDeadlineSeconds", "int*"),
        6: ("dnsPolicy", "str"),
        7: ("nodeSelector", "{str}"),
        8: ("serviceAccountName", "str"),
        9: ("serviceAccount", "str"),
        10: ("nodeName", "str"),
        11: ("hostNetwork", "bool"),
        12: ("hostPID", "bool"),
        13: ("hostIPC", "bool"),
        15: ("imagePullSecrets", "[LocalObjectReference]"),
        16: ("hostname", "str"),
        17: ("subdomain", "str"),
        19: ("schedulerName", "str"),
        20: ("initContainers", "[Container]"),
        24: ("priorityClassName", "str"),
        27: ("shareProcessNamespace", "bool*"),
        29: ("runtimeClassName", "str"),
        30: ("enableServiceLinks", "bool*"),
        31: ("preemptionPolicy", "str"),
    },
    "Container": {
        **_CONTAINER_STRINGS,
        6: ("ports", "[ContainerPort]"),
        7: ("env", "[EnvVar]"),
        8: ("resources", "ResourceRequirements"),
        13: ("terminationMessagePath", "str"),
        14: ("imagePullPolicy", "str"),
        16: ("stdin", "bool"),
        17: ("stdinOnce", "bool"),
        18: ("tty", "bool"),
        20: ("terminationMessagePolicy", "str"),
    },
    "ContainerPort": {
        1: ("name", "str"),
        2: ("hostPort", "int"),
        3: ("containerPort", "int"),
        4: ("protocol", "str"),
        5: ("hostIP", "str"),
    },
    "EnvVar": {1: ("name", "str"), 2: ("value", "str")},
    "ResourceRequirements": {},
    "TokenRequest": {
        1: ("metadata", "ObjectMeta"),
        2: ("spec", "TokenRequestSpec"),
        3: ("status", "TokenRequestStatus"),
    },
    "TokenRequestSpec": {
        1: ("audiences", "[str]"),
        3: ("boundObjectRef", "BoundObjectReference"),
        4: ("expirationSeconds", "int*"),
    },
    "TokenRequestStatus": {1: ("token", "str"), 2: ("expirationTimestamp", "Time")},
    "BoundObjectReference": {1: ("kind", "str"), 2: ("apiVersion", "str"), 3: ("name", "str"), 4: ("uid", "str")},
    "TokenReview": {1: ("metadata", "ObjectMeta"), 2: ("spec", "TokenReviewSpec"), 3: ("status", "TokenReviewStatus")},
    "TokenReviewSpec": {1: ("token", "str"), 2: ("audiences", "[str]")},
    "TokenReviewStatus": {1: ("authenticated", "bool"), 2: ("user", "UserInfo"), 3: ("error", "str")},
    "SelfSubjectReview": {1: ("metadata", "ObjectMeta"), 2: ("status", "SelfSubjectReviewStatus")},
    "SelfSubjectReviewStatus": {1: ("userInfo", "UserInfo")},
    "UserInfo": {1: ("username", "str"), 2: ("uid", "str"), 3: ("groups", "[str]")},
    "SelfSubjectAccessReview": {
        1: ("metadata", "ObjectMeta"),
        2: ("spec", "SelfSubjectAccessReviewSpec"),
        3: ("status", "SubjectAccessReviewStatus"),
    },
    "SelfSubjectAccessReviewSpec": {
        1: ("resourceAttributes", "ResourceAttributes"),
        2: ("nonResourceAttributes", "NonResourceAttributes"),
    },
    "SubjectAccessReviewStatus": {1: ("allowed", "bool"), 2: ("reason", "str"), 3: ("error", "str"), 4: ("no", "bool")},
    "ResourceAttributes": {
        1: ("namespace", "str"),
        2: ("verb", "str"),
        3: ("group", "str"),
        4: ("version", "str"),
        5: ("resource", "str"),
        6: ("subresource", "str"),
        7: ("name", "str"),
    },
    "NonResourceAttributes": {1: ("path", "str"), 2: ("verb", "str")},
    "DeleteOptions": {
        1: ("gracePeriodSeconds", "int*"),
        2: ("preconditions", "Preconditions"),
        3: ("orphanDependents", "bool*"),
        4: ("propagationPolicy", "str"),
        5: ("dryRun", "[str]"),
    },
    "Preconditions": {1: ("uid", "str"), 2: ("resourceVersion", "str")},
    "Eviction": {1: ("metadata", "ObjectMeta"), 2: ("deleteOptions", "DeleteOptions")},
    "Scale": {1: ("metadata", "ObjectMeta"), 2: ("spec", "ScaleSpec"), 3: ("status", "ScaleStatus")},
    "ScaleSpec": {1: ("replicas", "int*")},
    "ScaleStatus": {1: ("replicas", "int"), 2: ("selector", "str")},
}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise bad_request("protobuf: a number is cut off or too long")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & (1 << 64) - 1, at


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Number and value of each field: an int, or the bytes of a length-delimited one. ApiError 400 on garbage."""
    found: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
            found.append((tag >> 3, value))
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise bad_request("protobuf: a field is longer than its message")
            found.append((tag >> 3, data[at : at + length]))
            at += length
        else:
            raise bad_request(f"protobuf: wire type {tag & 7} is not used here")
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise bad_request("protobuf: a number where text is expected")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise bad_request("protobuf: text that is not UTF-8") from None


def _scalar(kind: str, value: int | bytes, depth: int) -> Any:
    if kind == "str":
        return _text(value)
    if kind in ("int", "bool"):
        if not isinstance(value, int):
            raise bad_request("protobuf: text where a number is expected")
        return _signed(value) if kind == "int" else bool(value)
    if isinstance(value, int):
        raise bad_request("protobuf: a number where a message is expected")
    match kind:
        case "raw":
            return value
        case "bytes":
            return base64.b64encode(value).decode()
        case "Time":
            parts = dict(_fields(value))
            seconds = parts.get(1, 0)
            if not isinstance(seconds, int) or not 0 < seconds < 1 << 36:
                return None  # the zero time, which Go sends for none
            return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        case "IntOrString":
            parts = dict(_fields(value))
            if parts.get(1, 0):
                return _text(parts.get(3, b""))
            number = parts.get(2, 0)
            return _signed(number) if isinstance(number, int) else 0
    return _message(kind, value, depth + 1)


def _message(name: str, data: bytes, depth: int) -> JsonObject:
    if depth > _DEPTH_MAX:
        raise bad_request(f"protobuf: nested deeper than {_DEPTH_MAX}")
    known = MESSAGES[name]
    result: JsonObject = {}
    for number, value in _fields(data):
        if number not in known:
            if not value:
                continue  # Go sends text and numbers that were left out as empty ones
            raise unsupported_media_type(
                f"protobuf: field {number} of {name} is not known to this server; send the object as YAML or JSON "
                "(kubectl create ... --dry-run=client -o yaml | kubectl apply -f -)"
            )
        field, kind = known[number]
        if kind.startswith("["):
            result.setdefault(field, []).append(_scalar(kind[1:-1], value, depth))
        elif kind.startswith("{"):
            entry = dict(_fields(value)) if isinstance(value, bytes) else {}
            item = _scalar(kind[1:-1], entry.get(2, b""), depth)
            result.setdefault(field, {})[_text(entry.get(1, b""))] = item
        else:
            decoded = _scalar(kind.removesuffix("*"), value, depth)
            if kind.endswith("*") or decoded not in ("", 0, None) or kind == "EnvVar":
                result[field] = decoded
    return result


def is_protobuf(body: bytes) -> bool:
    return body.startswith(_MAGIC)


def decode_protobuf(body: bytes) -> JsonObject:
    """The object in a protobuf body, with apiVersion and kind. ApiError 400 on garbage, 415 on unknown messages."""
    if not is_protobuf(body):
        raise bad_request("protobuf: the body does not begin with Kubernetes' four magic bytes")
    envelope = _message("Unknown", body[len(_MAGIC) :], 0)
    head = envelope.get("typeMeta", {})
    name = head.get("kind", "")
    if name not in MESSAGES or name in ("Unknown", "TypeMeta"):
        refusal: ApiError = unsupported_media_type(
            f"protobuf: kind {name!r} is accepted as YAML or JSON only "
            "(kubectl create ... --dry-run=client -o yaml | kubectl apply -f -)"
        )
        raise refusal
    return {**_message(name, envelope.get("raw", b""), 1), **head}
