"""Refusals of the API server, in the form every Kubernetes client understands (meta/v1 Status).

An `ApiError` is raised where a request is decided and becomes a Status document at the HTTP edge; a watch
sends the same document inside an ERROR event. Codes and reasons are those of k8s.io/apimachinery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ambient.errors import PeerFault

JsonObject = dict[str, Any]
"""A Kubernetes object as decoded from JSON. Objects held by the store are shared: readers must not change them."""


@dataclass(frozen=True, slots=True)
class Cause:
    """One broken rule. ``field`` is a path such as ``spec.ports[0].port``; ``reason`` one of field.ErrorType."""

    field: str
    message: str
    reason: str = "FieldValueInvalid"


class ApiError(PeerFault):
    """A refused request. ``code`` is the HTTP status, ``reason`` the machine-readable word clients switch on."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: JsonObject | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s

    def document(self) -> JsonObject:
        status: JsonObject = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        details = dict(self.details or {})
        if self.retry_after_s is not None:
            details["retryAfterSeconds"] = self.retry_after_s
        if details:
            status["details"] = details
        return status


def qualified(plural: str, group: str) -> str:
    """``pods`` or ``deployments.apps``: how messages name a resource."""
    return f"{plural}.{group}" if group else plural


def _details(plural: str, group: str, name: str) -> JsonObject:
    details: JsonObject = {"kind": plural}
    if name:
        details["name"] = name
    if group:
        details["group"] = group
    return details


def not_found(plural: str, group: str, name: str) -> ApiError:
    message = f'{qualified(plural, group)} "{name}" not found'
    return ApiError(404, "NotFound", message, details=_details(plural, group, name))


def unknown_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", details={})


def already_exists(plural: str, group: str, name: str) -> ApiError:
    message = f'{qualified(plural, group)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, details=_details(plural, group, name))


def conflict(plural: str, group: str, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {qualified(plural, group)} "{name}": {why}'
    return ApiError(409, "Conflict", message, details=_details(plural, group, name))


def forbidden(plural: str, group: str, name: str, why: str) -> ApiError:
    shown = f'{qualified(plural, group)} "{name}"' if name else qualified(plural, group)
    return ApiError(403, "Forbidden", f"{shown} is forbidden: {why}", details=_details(plural, group, name))


def invalid(kind: str, group: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422 in Kubernetes' words: every cause is listed, one alone without brackets."""
    shown = [f"{cause.field}: {cause.message}" for cause in causes]
    text = shown[0] if len(shown) == 1 else "[" + ", ".join(shown) + "]"
    details = _details(kind, group, name)
    details["causes"] = [{"reason": c.reason, "message": c.message, "field": c.field} for c in causes]
    return ApiError(422, "Invalid", f'{qualified(kind, group)} "{name}" is invalid: {text}', details=details)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def expired(message: str) -> ApiError:
    """410: a resourceVersion or continue token from before what the history still holds. The client lists again."""
    return ApiError(410, "Expired", message)


def gone_version(version: int, oldest: int) -> ApiError:
    return expired(f"too old resource version: {version} ({oldest})")


def method_not_allowed(method: str) -> ApiError:
    message = f"the server does not allow this method on the requested resource ({method})"
    return ApiError(405, "MethodNotAllowed", message)


def unsupported_media_type(message: str) -> ApiError:
    return ApiError(415, "UnsupportedMediaType", message)


def too_large(message: str) -> ApiError:
    return ApiError(413, "RequestEntityTooLarge", message)


def too_many(message: str, retry_after_s: int = 1) -> ApiError:
    return ApiError(429, "TooManyRequests", message, retry_after_s=retry_after_s)


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")


def required(field: str, extra: str = "") -> Cause:
    return Cause(field, "Required value" + (f": {extra}" if extra else ""), "FieldValueRequired")


def invalid_value(field: str, value: object, rule: str) -> Cause:
    return Cause(field, f"Invalid value: {_shown(value)}: {rule}")


def not_supported(field: str, value: object, supported: Sequence[str]) -> Cause:
    choices = ", ".join(f'"{choice}"' for choice in supported)
    return Cause(field, f"Unsupported value: {_shown(value)}: supported values: {choices}", "FieldValueNotSupported")


def duplicate(field: str, value: object) -> Cause:
    return Cause(field, f"Duplicate value: {_shown(value)}", "FieldValueDuplicate")


def forbidden_field(field: str, rule: str) -> Cause:
    return Cause(field, f"Forbidden: {rule}", "FieldValueForbidden")


def _shown(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
