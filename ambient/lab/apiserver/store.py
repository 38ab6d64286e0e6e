"""The API's meaning: create, replace, modify and delete objects by the rules clients rely on.

The HTTP edge and the lab's controllers both write through this class, so both see the same defaults,
conflicts, generations and graceful deletions. Time and random names are handed in; there is no I/O.
Objects handed out are the stored ones: do not change them, use `modify`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.allocate import ServiceAllocator
from ambient.lab.apiserver.defaults import apply_defaults, initial_status
from ambient.lab.apiserver.definitions import established
from ambient.lab.apiserver.deletion import begun, is_awaited, is_ending
from ambient.lab.apiserver.history import History, Key
from ambient.lab.apiserver.moments import timestamp
from ambient.lab.apiserver.pages import Page, first_page, read_token
from ambient.lab.apiserver.schema import Kind, Registry, kind_of_definition
from ambient.lab.apiserver.selectors import Matcher
from ambient.lab.apiserver.shapes import shaped
from ambient.lab.apiserver.status import (
    ApiError,
    Cause,
    JsonObject,
    already_exists,
    bad_request,
    conflict,
    forbidden,
    invalid,
    invalid_value,
    not_found,
)
from ambient.lab.apiserver.validate import validate, validate_update

SYSTEM_NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")
_GENERATED_NAME_MAX = 63
_GENERATED_TRIES = 8


@dataclass(frozen=True, slots=True)
class DeleteOptions:
    grace_period_s: int | None = None
    uid: str = ""
    resource_version: str = ""
    propagation: str = "Background"
    """``Background``, ``Foreground`` or ``Orphan``."""
    dry_run: bool = False


@dataclass(slots=True)
class Sources:
    """Where time and randomness come from."""

    now: Callable[[], datetime]
    uid: Callable[[], str]
    suffix: Callable[[], str]
    """Five characters for generated names."""
    objects_max: int = 50_000
    service_ranges: Sequence[str] = field(default_factory=lambda: ("10.96.0.0/16",))


class Store:
    """All objects of one cluster. Not thread-safe: one event loop owns it."""

    def __init__(self, sources: Sources, history: History | None = None, registry: Registry | None = None) -> None:
        self.history = history or History()
        self.registry = registry or Registry()
        self._sources = sources
        self._services = ServiceAllocator(sources.service_ranges)
        for name in SYSTEM_NAMESPACES:
            self.create(schema.NAMESPACE, "", {"metadata": {"name": name}})

    @property
    def now(self) -> datetime:
        return self._sources.now()

    def first_service_address(self) -> str:
        """The address reserved for the API server's own Service."""
        return self._services.first_address()

    # --- reading ----------------------------------------------------------------------------------------

    def find(self, kind: Kind, namespace: str, name: str) -> JsonObject | None:
        return self.history.get(kind.resource, (namespace if kind.namespaced else "", name))

    def get(self, kind: Kind, namespace: str, name: str) -> JsonObject:
        """Raises ApiError 404."""
        found = self.find(kind, namespace, name)
        if found is None:
            raise not_found(kind.plural, kind.group, name)
        return found

    def all(self, kind: Kind, namespace: str = "") -> list[JsonObject]:
        """Every object of a kind (in a namespace), in order of namespace and name."""
        return [obj for key, obj in self.history.objects(kind.resource) if not namespace or key[0] == namespace]

    def page(
        self,
        kind: Kind,
        namespace: str = "",
        *,
        matches: Matcher | None = None,
        limit: int = 0,
        token: str = "",
        version: int | None = None,
    ) -> Page:
        """A page of at most ``limit`` objects (0: all) of one consistent version: the newest, or ``version``.

        ``token`` continues an earlier page at that page's version. ApiError 410 when that is forgotten.
        """
        start: Key = ("", "")
        if token:
            version, start = read_token(token)
        at = self.history.version if version is None else version
        items = []
        for key, obj in self.history.snapshot(kind.resource, at):
            if key > start and (not namespace or key[0] == namespace) and (matches is None or matches(obj)):
                items.append((key, obj))
        return first_page(items, at, limit, counted=matches is None)

    # --- writing ----------------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, obj: JsonObject, *, dry_run: bool = False) -> JsonObject:
        """Store a new object. Raises ApiError (400, 403, 404, 409, 422)."""
        obj = shaped(kind, obj)
        metadata = obj["metadata"]
        if metadata.get("resourceVersion"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        self._place(kind, namespace, metadata)
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = self._generate(kind, namespace, metadata["generateName"])
        for key in ("selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "generation", "resourceVersion"):
            metadata.pop(key, None)
        obj.update(apiVersion=kind.api_version(), kind=kind.kind)
        apply_defaults(kind, obj)
        if kind.has_status():
            status = initial_status(kind, obj)
            obj.pop("status", None)
            if status is not None:
                obj["status"] = status
        self._refuse_if(kind, obj, validate(kind, obj))
        name = metadata["name"]
        self._require_namespace(kind, namespace, name)
        if self.find(kind, namespace, name) is not None:
            raise already_exists(kind.plural, kind.group, name)
        if self.history.count() >= self._sources.objects_max:
            why = f"exceeded quota: this server holds at most {self._sources.objects_max} objects; delete some"
            raise forbidden(kind.plural, kind.group, name, why)
        if kind is schema.POD:
            self._admit_pod(namespace, obj)
        if kind is schema.SERVICE:
            self._complete_service(obj, None)
        metadata["uid"] = self._sources.uid()
        metadata["creationTimestamp"] = timestamp(self.now)
        if kind.generation:
            metadata["generation"] = 1
        return self._commit(kind, obj, dry_run=dry_run)

    def replace(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        obj: JsonObject,
        *,
        subresource: str = "",
        dry_run: bool = False,
    ) -> JsonObject:
        """Store a new form of an object. With a resourceVersion it must be the present one (409 otherwise).

        ``subresource`` is empty (status is kept as it is) or ``status`` (labels and annotations may change
        too, everything else is kept). Nothing changed: nothing is written.
        """
        old = self.get(kind, namespace, name)
        obj = shaped(kind, obj)
        metadata = obj["metadata"]
        if metadata.get("name", name) != name:
            raise bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
            )
        self._place(kind, namespace, metadata)
        seen = metadata.get("resourceVersion")
        if seen and seen != old["metadata"]["resourceVersion"]:
            raise conflict(kind.plural, kind.group, name)
        if metadata.get("uid") and metadata["uid"] != old["metadata"]["uid"]:
            why = (
                f"Precondition failed: UID in precondition: {metadata['uid']}, "
                f"UID in object meta: {old['metadata']['uid']}"
            )
            raise conflict(kind.plural, kind.group, name, why)
        obj = self._updated(kind, old, obj, subresource)
        if obj == old:
            return old
        if is_ending(obj) and not obj["metadata"].get("finalizers") and not is_awaited(obj):
            return self._remove(kind, old if dry_run else obj, dry_run=dry_run)
        return self._commit(kind, obj, dry_run=dry_run)

    def modify(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        change: Callable[[JsonObject], JsonObject | None],
        *,
        subresource: str = "",
        dry_run: bool = False,
    ) -> JsonObject:
        """Replace an object by what ``change`` makes of a copy of it (returning None: changed in place)."""
        mine = copy.deepcopy(self.get(kind, namespace, name))
        changed = change(mine)
        obj = mine if changed is None else changed
        return self.replace(kind, namespace, name, obj, subresource=subresource, dry_run=dry_run)

    def delete(
        self, kind: Kind, namespace: str, name: str, options: DeleteOptions | None = None
    ) -> tuple[JsonObject, bool]:
        """Delete an object, or start to: returns it and whether it is gone.

        A pod on a node stays with a deletionTimestamp until its kubelet deletes it with grace 0; an object
        with finalizers until the last is removed; a namespace until `finalize_namespace`.
        """
        options = options or DeleteOptions()
        obj = self.get(kind, namespace, name)
        metadata = obj["metadata"]
        for what, wanted, real in (
            ("UID", options.uid, metadata["uid"]),
            ("ResourceVersion", options.resource_version, metadata["resourceVersion"]),
        ):
            if wanted and wanted != real:
                why = f"Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {real}"
                raise conflict(kind.plural, kind.group, name, why)
        if kind is schema.NAMESPACE and name in SYSTEM_NAMESPACES[:1] + SYSTEM_NAMESPACES[2:]:
            raise forbidden(kind.plural, kind.group, name, "this namespace may not be deleted")
        if options.propagation == "Orphan" and not options.dry_run:
            self._orphan(metadata["uid"])
        foreground = options.propagation == "Foreground" and bool(self.dependents(obj))
        ending, gone = begun(kind, obj, self.now, options.grace_period_s, foreground=foreground)
        if gone:
            return self._remove(kind, ending, dry_run=options.dry_run), True
        if ending == obj:
            return obj, False
        return self._commit(kind, ending, dry_run=options.dry_run), False

    def finalize_namespace(self, name: str) -> JsonObject:
        """Remove a terminating namespace: its contents are gone. Raises ApiError 409 when it is not terminating."""
        obj = self.get(schema.NAMESPACE, "", name)
        if not is_ending(obj):
            raise conflict("namespaces", "", name, "the namespace is not being deleted")
        return self._remove(schema.NAMESPACE, copy.deepcopy(obj), dry_run=False)

    def bind(self, namespace: str, name: str, node: str) -> JsonObject:
        """Assign a pod to a node, once. Raises ApiError 409 when it already has one."""
        pod = copy.deepcopy(self.get(schema.POD, namespace, name))
        if pod["spec"].get("nodeName"):
            why = f"pod {name} is already assigned to node {pod['spec']['nodeName']!r}"
            raise conflict("pods/binding", "", name, why)
        if is_ending(pod):
            raise conflict("pods/binding", "", name, f"pod {name} is being deleted, cannot be assigned to a host")
        pod["spec"]["nodeName"] = node
        conditions = [c for c in pod["status"].get("conditions", []) if c["type"] != "PodScheduled"]
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp(self.now)}
        pod["status"]["conditions"] = [*conditions, scheduled]
        return self._commit(schema.POD, pod, dry_run=False)

    def dependents(self, owner: JsonObject) -> list[tuple[Kind, JsonObject]]:
        """Objects whose ownerReferences name ``owner``'s uid."""
        uid = owner["metadata"]["uid"]
        return [
            (kind, obj)
            for kind in self.registry.stored()
            for obj in self.all(kind)
            if any(ref.get("uid") == uid for ref in obj["metadata"].get("ownerReferences", ()))
        ]

    # --- rules ------------------------------------------------------------------------------------------

    def _place(self, kind: Kind, namespace: str, metadata: JsonObject) -> None:
        if not kind.namespaced:
            metadata.pop("namespace", None)
            return
        if not namespace:
            raise bad_request(f"an empty namespace may not be set for {kind.plural}")
        if metadata.get("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        metadata["namespace"] = namespace

    def _generate(self, kind: Kind, namespace: str, prefix: str) -> str:
        for _ in range(_GENERATED_TRIES):
            name = prefix[: _GENERATED_NAME_MAX - 5] + self._sources.suffix()
            if self.find(kind, namespace, name) is None:
                return name
        raise ApiError(409, "AlreadyExists", f"no free name could be generated for {prefix}; try again")

    def _require_namespace(self, kind: Kind, namespace: str, name: str) -> None:
        if not kind.namespaced:
            return
        owner = self.get(schema.NAMESPACE, "", namespace)
        if is_ending(owner):
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            error = forbidden(kind.plural, kind.group, name, why)
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {namespace} is being terminated",
                "field": "metadata.namespace",
            }
            error.details = {**(error.details or {}), "causes": [cause]}
            raise error

    def _admit_pod(self, namespace: str, pod: JsonObject) -> None:
        account = pod["spec"]["serviceAccountName"]
        if self.find(schema.SERVICE_ACCOUNT, namespace, account) is None:
            why = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
            metadata = pod["metadata"]
            raise forbidden("pods", "", metadata.get("generateName") or metadata["name"], why)

    def _complete_service(self, service: JsonObject, old: JsonObject | None) -> None:
        key = (service["metadata"]["namespace"], service["metadata"]["name"])
        others = [obj for other, obj in self.history.objects(schema.SERVICE.resource) if other != key]
        self._refuse_if(schema.SERVICE, service, self._services.complete(service, old, others))

    @staticmethod
    def _refuse_if(kind: Kind, obj: JsonObject, causes: list[Cause]) -> None:
        if causes:
            metadata = obj["metadata"]
            name = metadata.get("name") or metadata.get("generateName") or ""
            raise invalid(kind.kind, kind.group, str(name), causes)

    def _updated(self, kind: Kind, old: JsonObject, obj: JsonObject, subresource: str) -> JsonObject:
        """The object to store for an update: server fields kept, defaults filled in, rules checked."""
        before, metadata = old["metadata"], obj["metadata"]
        if subresource == "status":
            status = obj.get("status", {})
            obj = copy.deepcopy(old)
            for name in ("labels", "annotations"):
                if metadata.get(name) is not None:
                    obj["metadata"][name] = metadata[name]
                elif name in before:
                    del obj["metadata"][name]
            obj["status"] = status
            self._refuse_if(kind, obj, validate(kind, obj))
            return obj
        obj.update(apiVersion=kind.api_version(), kind=kind.kind)
        for name in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds"):
            metadata.pop(name, None)
            if name in before:
                metadata[name] = before[name]
        metadata.pop("selfLink", None)
        metadata["name"] = before["name"]
        metadata["resourceVersion"] = before["resourceVersion"]
        if kind.has_status():
            obj.pop("status", None)
            if "status" in old:
                obj["status"] = copy.deepcopy(old["status"])
        apply_defaults(kind, obj)
        self._refuse_if(kind, obj, validate(kind, obj))
        if is_ending(old):
            added = set(metadata.get("finalizers", ())) - set(before.get("finalizers", ()))
            if added:
                rule = "no new finalizers can be added if the object is being deleted"
                self._refuse_if(kind, obj, [invalid_value("metadata.finalizers", sorted(added), rule)])
        if kind is schema.SERVICE:
            self._complete_service(obj, old)
        self._refuse_if(kind, obj, validate_update(kind, obj, old))
        if kind.generation and _content(obj) != _content(old):
            metadata["generation"] = before.get("generation", 0) + 1
        return obj

    def _orphan(self, uid: str) -> None:
        for kind in self.registry.stored():
            for obj in self.all(kind):
                owners = obj["metadata"].get("ownerReferences", [])
                if any(ref.get("uid") == uid for ref in owners):
                    mine = copy.deepcopy(obj)
                    mine["metadata"]["ownerReferences"] = [ref for ref in owners if ref.get("uid") != uid]
                    self._commit(kind, mine, dry_run=False)

    def _commit(self, kind: Kind, obj: JsonObject, *, dry_run: bool) -> JsonObject:
        if dry_run:
            return obj
        metadata = obj["metadata"]
        key = (metadata.get("namespace", ""), metadata["name"])
        metadata["resourceVersion"] = str(self.history.next_version())
        self.history.commit(kind.resource, key, obj)
        if kind is schema.DEFINITION:
            self._define(obj)
        elif kind is schema.NAMESPACE and not is_ending(obj):
            account = ("default", {"metadata": {"name": "default"}})
            if self.find(schema.SERVICE_ACCOUNT, metadata["name"], account[0]) is None:
                self.create(schema.SERVICE_ACCOUNT, metadata["name"], account[1])
        return obj

    def _remove(self, kind: Kind, obj: JsonObject, *, dry_run: bool) -> JsonObject:
        if dry_run:
            return obj
        metadata = obj["metadata"]
        metadata["resourceVersion"] = str(self.history.next_version())
        self.history.commit(kind.resource, (metadata.get("namespace", ""), metadata["name"]), obj, deleted=True)
        if kind is schema.DEFINITION:
            served = self.registry.get(metadata["name"])
            if served is not None and served.custom:
                for instance in self.all(served) if served not in schema.BUILT_IN else ():
                    self._remove(served, copy.deepcopy(instance), dry_run=False)
                self.registry.forget(metadata["name"])
        return obj

    def _define(self, definition: JsonObject) -> None:
        """Serve what a definition describes, and say so on its status as the real server does."""
        self.registry.define(kind_of_definition(definition))
        if not definition.get("status", {}).get("conditions"):
            self._commit(schema.DEFINITION, established(definition, timestamp(self.now)), dry_run=False)


def _content(obj: JsonObject) -> JsonObject:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}
