"""Who may do what.

Users come from client certificates (common name, organizations as groups), the service account tokens this
server issued, or static tokens handed in. There are two kinds of user:

* *system*: group ``system:masters`` or ``system:nodes``, or a service account of a system namespace. May do all.
* *others*, plain service accounts in particular: may get, list and watch everything except Secrets, and ask
  who they are and what they may do. They may write nothing and review no tokens.

A system user may act as another (``kubectl --as``), with that user's rights.
Without valid credentials only the version and health paths answer; all else is 401.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.schema import Kind
from ambient.lab.apiserver.status import ApiError, forbidden, qualified, unauthorized
from ambient.lab.apiserver.tokens import Accepted, TokenAuthority, User

SYSTEM_GROUPS = frozenset({"system:masters", "system:nodes"})
READ_VERBS = frozenset({"get", "list", "watch"})
_SELF = frozenset({schema.SELF_REVIEW.resource, schema.SELF_ACCESS_REVIEW.resource})


def authenticate(
    authorization: str,
    certificate: Mapping[str, Any] | None,
    tokens: TokenAuthority,
    static_tokens: Mapping[str, User],
) -> User:
    """The sender of a request. ``certificate`` is ssl's getpeercert() of a verified client. Raises ApiError 401."""
    if certificate:
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        common = [value for key, value in subject if key == "commonName"]
        groups = tuple(value for key, value in subject if key == "organizationName")
        if common:
            return User(common[0], groups=(*groups, "system:authenticated"))
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise unauthorized()
    for known, user in static_tokens.items():
        if hmac.compare_digest(known.encode(), token.encode()):
            return user
    result = tokens.review(token)
    if isinstance(result, Accepted):
        return result.user
    raise unauthorized()


def impersonate(user: User, name: str, groups: Sequence[str], system_namespaces: Collection[str]) -> User:
    """The user that a request's Impersonate-User and Impersonate-Group name. Raises ApiError 403 for plain users."""
    if not is_system(user, system_namespaces):
        why = f'User "{user.name}" cannot impersonate resource "users" in API group "" at the cluster scope'
        raise ApiError(403, "Forbidden", f'users "{name}" is forbidden: {why}', details={"kind": "users", "name": name})
    parts = name.split(":")
    if parts[:2] == ["system", "serviceaccount"] and len(parts) == 4:
        shared = ("system:serviceaccounts", f"system:serviceaccounts:{parts[2]}")
        return User(name, groups=(*groups, *shared, "system:authenticated"), namespace=parts[2])
    return User(name, groups=(*groups, "system:authenticated"))


def is_system(user: User, system_namespaces: Collection[str]) -> bool:
    return bool(SYSTEM_GROUPS & set(user.groups)) or (user.namespace != "" and user.namespace in system_namespaces)


def allowed(user: User, verb: str, resource: str, subresource: str, system_namespaces: Collection[str]) -> bool:
    """Whether ``user`` may ``verb`` a resource (``deployments.apps``)."""
    if is_system(user, system_namespaces):
        return True
    if resource in _SELF:
        return verb == "create"
    return verb in READ_VERBS and resource != schema.SECRET.resource and subresource in ("", "status", "scale")


def refused(user: User, verb: str, kind: Kind, subresource: str, namespace: str, name: str) -> ApiError:
    resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
    scope = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    shown = f'"{resource}" in API group "{kind.group}"'
    why = f'User "{user.name}" cannot {verb} resource {shown} {scope}'
    error = forbidden(kind.plural, kind.group, name, why)
    if not name:
        error.message = f"{qualified(kind.plural, kind.group)} is forbidden: {why}"
    return error
