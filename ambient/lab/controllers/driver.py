"""Runs the controllers: wakes on writes, plans from the whole state, performs, until nothing is left to do."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from ambient.lab.apiserver import schema
from ambient.lab.apiserver.status import ApiError, JsonObject
from ambient.lab.apiserver.store import Store
from ambient.lab.controllers.deployments import plan_deployment, plan_replica_set
from ambient.lab.controllers.endpoints import ZONE, plan_endpoint_slices, plan_endpoints
from ambient.lab.controllers.garbage import plan_garbage, plan_lost_pods, plan_namespace
from ambient.lab.controllers.scheduler import plan_scheduling
from ambient.lab.controllers.steps import Step, perform

log = logging.getLogger(__name__)

_SETTLE_S = 0.01
"""How long writes are gathered before a pass."""
_RESYNC_S = 5.0
"""A pass without any write, for what failed before."""
_PASSES_MAX = 100

Controller = Callable[[Store], Iterable[Step]]


def _by_namespace(objects: Iterable[JsonObject]) -> dict[str, list[JsonObject]]:
    found: dict[str, list[JsonObject]] = defaultdict(list)
    for obj in objects:
        found[obj["metadata"].get("namespace", "")].append(obj)
    return found


def _deployments(store: Store) -> Iterable[Step]:
    pods, sets = _by_namespace(store.all(schema.POD)), _by_namespace(store.all(schema.REPLICA_SET))
    for deployment in store.all(schema.DEPLOYMENT):
        namespace = deployment["metadata"]["namespace"]
        yield from plan_deployment(deployment, sets[namespace], pods[namespace], store.now)


def _replica_sets(store: Store) -> Iterable[Step]:
    pods = _by_namespace(store.all(schema.POD))
    for replica_set in store.all(schema.REPLICA_SET):
        yield from plan_replica_set(replica_set, pods[replica_set["metadata"]["namespace"]])


def _scheduler(store: Store) -> Iterable[Step]:
    return plan_scheduling(store.all(schema.POD), store.all(schema.NODE), store.now)


def _endpoints(store: Store) -> Iterable[Step]:
    pods, slices = _by_namespace(store.all(schema.POD)), _by_namespace(store.all(schema.ENDPOINT_SLICE))
    labels = {node["metadata"]["name"]: node["metadata"].get("labels", {}) for node in store.all(schema.NODE)}
    zones = {name: found[ZONE] for name, found in labels.items() if ZONE in found}
    for service in store.all(schema.SERVICE):
        namespace = service["metadata"]["namespace"]
        yield from plan_endpoint_slices(service, pods[namespace], slices[namespace], zones)
        older = store.find(schema.ENDPOINTS, namespace, service["metadata"]["name"])
        yield from plan_endpoints(service, pods[namespace], older)


def _garbage(store: Store) -> Iterable[Step]:
    kinds = store.registry.stored()
    objects = [(kind, obj) for kind in kinds if kind.resource != schema.EVENT.resource for obj in store.all(kind)]

    def owner_exists(namespace: str, reference: JsonObject) -> bool | None:
        kind = store.registry.by_kind(reference["apiVersion"], reference["kind"])
        if kind is None:
            return None
        owner = store.find(kind, namespace, reference["name"])
        return owner is not None and owner["metadata"]["uid"] == reference["uid"]

    yield from plan_garbage(objects, owner_exists)
    yield from plan_lost_pods(store.all(schema.POD), store.all(schema.NODE))


def _namespaces(store: Store) -> Iterable[Step]:
    contents: dict[str, list[tuple[schema.Kind, JsonObject]]] = defaultdict(list)
    for kind in store.registry.stored():
        if kind.namespaced:
            for obj in store.all(kind):
                contents[obj["metadata"]["namespace"]].append((kind, obj))
    for namespace in store.all(schema.NAMESPACE):
        yield from plan_namespace(namespace, contents[namespace["metadata"]["name"]])


CONTROLLERS: tuple[Controller, ...] = (_deployments, _replica_sets, _scheduler, _endpoints, _garbage, _namespaces)


def reconcile(store: Store, controllers: Iterable[Controller] = CONTROLLERS) -> int:
    """One pass of every controller. Returns how many steps succeeded; refused ones are logged and come again."""
    done = 0
    for controller in controllers:
        for step in list(controller(store)):
            try:
                perform(store, step)
                done += 1
            except ApiError as error:
                log.info("%s: %s", type(step).__name__, error)
    return done


async def run_controllers(store: Store) -> None:
    """Run until cancelled. A controller that fails is logged and tried again; it never ends the others."""
    wake = asyncio.Event()
    wake.set()
    stop = store.history.listen(lambda resource: wake.set() if resource != schema.EVENT.resource else None)
    try:
        while True:
            try:
                async with asyncio.timeout(_RESYNC_S):
                    await wake.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(_SETTLE_S)
            for _ in range(_PASSES_MAX):
                wake.clear()
                _pass(store)
                if not wake.is_set():
                    break
                await asyncio.sleep(0)
    finally:
        stop()


def _pass(store: Store) -> None:
    for controller in CONTROLLERS:
        try:
            reconcile(store, (controller,))
        except Exception:
            log.exception("controller %s", controller.__name__)
