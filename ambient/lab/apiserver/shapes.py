"""Types of the fields that defaulting, validation and controllers read, so that they need not mistrust them.

A shape is ``str``, ``int``, ``bool``, ``dict`` (any object), `INT_OR_STRING`, ``[shape]`` for a list, a dict
of shapes for an object (unlisted fields are free), or `Map` for an object with free keys. A field of another
type is refused as a real server refuses it: 400, before anything else looks at the object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import ApiError, JsonObject, bad_request

DEPTH_MAX = 64


@dataclass(frozen=True, slots=True)
class Map:
    """An object used as a map: every value has the shape."""

    value: Any


class _IntOrString:
    pass


INT_OR_STRING: Final = _IntOrString()
_STRINGS: Final = Map(str)

METADATA: Final = {
    "name": str,
    "generateName": str,
    "namespace": str,
    "uid": str,
    "resourceVersion": str,
    "labels": _STRINGS,
    "annotations": _STRINGS,
    "finalizers": [str],
    "ownerReferences": [
        {"apiVersion": str, "kind": str, "name": str, "uid": str, "controller": bool, "blockOwnerDeletion": bool}
    ],
}
_SELECTOR: Final = {
    "matchLabels": _STRINGS,
    "matchExpressions": [{"key": str, "operator": str, "values": [str]}],
}
_PROBE: Final = {
    "httpGet": {"port": INT_OR_STRING, "path": str, "host": str, "scheme": str, "httpHeaders": [{"name": str}]},
    "tcpSocket": {"port": INT_OR_STRING, "host": str},
    "exec": {"command": [str]},
    "grpc": {"port": int},
    "initialDelaySeconds": int,
    "timeoutSeconds": int,
    "periodSeconds": int,
    "successThreshold": int,
    "failureThreshold": int,
}
_CONTAINER: Final = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "workingDir": str,
    "ports": [{"name": str, "containerPort": int, "hostPort": int, "protocol": str}],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
    "resources": dict,
    "livenessProbe": _PROBE,
    "readinessProbe": _PROBE,
    "startupProbe": _PROBE,
    "restartPolicy": str,
    "securityContext": dict,
}
_VOLUME: Final = {
    "name": str,
    "projected": {
        "sources": [
            {
                "serviceAccountToken": {"audience": str, "expirationSeconds": int, "path": str},
                "configMap": {"name": str},
                "secret": {"name": str},
            }
        ]
    },
    "configMap": {"name": str},
    "secret": {"secretName": str},
    "emptyDir": dict,
    "hostPath": {"path": str},
}
_POD_SPEC: Final = {
    "containers": [_CONTAINER],
    "initContainers": [_CONTAINER],
    "volumes": [_VOLUME],
    "nodeName": str,
    "nodeSelector": _STRINGS,
    "serviceAccountName": str,
    "serviceAccount": str,
    "hostNetwork": bool,
    "hostAliases": [{"ip": str, "hostnames": [str]}],
    "hostname": str,
    "subdomain": str,
    "restartPolicy": str,
    "dnsPolicy": str,
    "runtimeClassName": str,
    "terminationGracePeriodSeconds": int,
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "affinity": dict,
}
_CONDITIONS: Final = [{"type": str, "status": str, "reason": str, "message": str}]
_POD: Final = {
    "spec": _POD_SPEC,
    "status": {
        "phase": str,
        "reason": str,
        "podIP": str,
        "podIPs": [{"ip": str}],
        "hostIP": str,
        "conditions": _CONDITIONS,
        "containerStatuses": [{"name": str, "ready": bool, "restartCount": int, "state": dict}],
        "initContainerStatuses": [{"name": str, "ready": bool, "restartCount": int, "state": dict}],
    },
}
_TEMPLATE: Final = {"metadata": METADATA, "spec": _POD_SPEC}
_WORKLOAD: Final = {
    "spec": {
        "replicas": int,
        "selector": _SELECTOR,
        "template": _TEMPLATE,
        "minReadySeconds": int,
        "paused": bool,
        "strategy": {
            "type": str,
            "rollingUpdate": {"maxSurge": INT_OR_STRING, "maxUnavailable": INT_OR_STRING},
        },
    },
    "status": {"replicas": int, "readyReplicas": int, "availableReplicas": int, "conditions": _CONDITIONS},
}
_SHAPES: Final[dict[str, Any]] = {
    "namespaces": {"spec": {"finalizers": [str]}, "status": {"phase": str}},
    "nodes": {
        "spec": {"podCIDR": str, "podCIDRs": [str], "unschedulable": bool, "taints": [{"key": str, "effect": str}]},
        "status": {
            "addresses": [{"type": str, "address": str}],
            "conditions": _CONDITIONS,
            "nodeInfo": Map(str),
        },
    },
    "pods": _POD,
    "serviceaccounts": {"secrets": [{"name": str}], "automountServiceAccountToken": bool},
    "services": {
        "spec": {
            "type": str,
            "selector": _STRINGS,
            "clusterIP": str,
            "clusterIPs": [str],
            "ipFamilies": [str],
            "ipFamilyPolicy": str,
            "externalName": str,
            "externalIPs": [str],
            "sessionAffinity": str,
            "publishNotReadyAddresses": bool,
            "ports": [
                {
                    "name": str,
                    "port": int,
                    "targetPort": INT_OR_STRING,
                    "nodePort": int,
                    "protocol": str,
                    "appProtocol": str,
                }
            ],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": str, "hostname": str}]}},
    },
    "endpoints": {
        "subsets": [
            {
                "addresses": [{"ip": str}],
                "notReadyAddresses": [{"ip": str}],
                "ports": [{"name": str, "port": int, "protocol": str}],
            }
        ]
    },
    "endpointslices.discovery.k8s.io": {
        "addressType": str,
        "endpoints": [
            {
                "addresses": [str],
                "conditions": {"ready": bool, "serving": bool, "terminating": bool},
                "nodeName": str,
                "targetRef": {"kind": str, "name": str, "namespace": str, "uid": str},
            }
        ],
        "ports": [{"name": str, "port": int, "protocol": str, "appProtocol": str}],
    },
    "configmaps": {"data": _STRINGS, "binaryData": _STRINGS, "immutable": bool},
    "secrets": {"data": _STRINGS, "stringData": _STRINGS, "type": str, "immutable": bool},
    "events": {
        "involvedObject": {"kind": str, "name": str, "namespace": str},
        "reason": str,
        "message": str,
        "type": str,
        "count": int,
    },
    "leases.coordination.k8s.io": {
        "spec": {"holderIdentity": str, "leaseDurationSeconds": int, "leaseTransitions": int}
    },
    "deployments.apps": _WORKLOAD,
    "replicasets.apps": _WORKLOAD,
    "customresourcedefinitions.apiextensions.k8s.io": {
        "spec": {
            "group": str,
            "scope": str,
            "names": {
                "kind": str,
                "plural": str,
                "singular": str,
                "listKind": str,
                "shortNames": [str],
                "categories": [str],
            },
            "versions": [
                {
                    "name": str,
                    "served": bool,
                    "storage": bool,
                    "subresources": {"status": dict},
                    "additionalPrinterColumns": [{"name": str, "type": str, "jsonPath": str, "priority": int}],
                }
            ],
        }
    },
    "tokenreviews.authentication.k8s.io": {"spec": {"token": str, "audiences": [str]}},
    "selfsubjectaccessreviews.authorization.k8s.io": {
        "spec": {
            "resourceAttributes": {
                "namespace": str,
                "verb": str,
                "group": str,
                "version": str,
                "resource": str,
                "subresource": str,
                "name": str,
            },
            "nonResourceAttributes": {"path": str, "verb": str},
        }
    },
}
_CUSTOM: Final = {"spec": dict, "status": dict}


def _refuse(kind: str, path: str, value: Any, wanted: str) -> ApiError:
    got = {bool: "bool", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return bad_request(
        f"{kind} cannot be handled as a {kind}: json: cannot unmarshal {got.get(type(value), 'value')} into Go struct "
        f"field {path} of type {wanted}"
    )


def without_nulls(value: Any, depth: int = 0) -> Any:
    """A copy without null fields (null means absent in the built-in kinds). ApiError 400 when nested too deep."""
    if depth > DEPTH_MAX:
        raise bad_request(f"the object is nested deeper than {DEPTH_MAX} levels")
    if isinstance(value, dict):
        return {k: without_nulls(v, depth + 1) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(item, depth + 1) for item in value]
    return value


def _check(kind: str, path: str, value: Any, shape: Any) -> None:
    if shape is str:
        ok, wanted = isinstance(value, str), "string"
    elif shape is int:
        ok, wanted = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63, "int64"
    elif shape is bool:
        ok, wanted = isinstance(value, bool), "bool"
    elif shape is INT_OR_STRING:
        ok, wanted = isinstance(value, int | str) and not isinstance(value, bool), "intstr.IntOrString"
    elif isinstance(shape, list):
        ok, wanted = isinstance(value, list), "array"
    else:
        ok, wanted = isinstance(value, dict), "object"
    if not ok:
        raise _refuse(kind, path, value, wanted)
    if isinstance(shape, list):
        for index, item in enumerate(value):
            _check(kind, f"{path}[{index}]", item, shape[0])
    elif isinstance(shape, Map):
        for key, item in value.items():
            _check(kind, f"{path}.{key}", item, shape.value)
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            if value.get(key) is not None:
                _check(kind, f"{path}.{key}" if path else key, value[key], inner)


def shaped(kind: Kind, obj: JsonObject) -> JsonObject:
    """A copy of ``obj`` whose known fields have their types and none of them is null. Raises ApiError 400."""
    metadata = obj.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise _refuse(kind.kind, "metadata", metadata, "object")
    if kind.custom:
        result = without_nulls({key: value for key, value in obj.items() if key not in ("spec", "status")})
        for key in ("spec", "status"):
            if obj.get(key) is not None:
                without_nulls(obj[key])
                result[key] = obj[key]
    else:
        result = without_nulls(obj)
    result["metadata"] = without_nulls(metadata)
    _check(kind.kind, "metadata", result["metadata"], METADATA)
    _check(kind.kind, "", result, _CUSTOM if kind.custom else _SHAPES.get(kind.resource, {}))
    return dict(result)
