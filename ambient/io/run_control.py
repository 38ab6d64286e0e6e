"""`ambient control`: watches the Kubernetes API, keeps the World, serves discovery and certificates.

    reflectors -> Reconciler -> World -> discovery server     (`DEBOUNCE_S` after a change; later while there are many)
                             -> Writer: statuses, the trust bundle in every namespace

Without the API server the last World serves, certificates included; without a complete World nobody is told
anything, because clients take the first one for all there is.

    python -m ambient.io.run_control --config FILE
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ambient.control.certificates import PodFacts
from ambient.control.reconcile import Reconciler
from ambient.control.statuses import ROOT_CONFIG_MAP
from ambient.errors import AmbientError, PlatformFault
from ambient.io import control_admin, logs
from ambient.io.ca import Authority
from ambient.io.control_writer import Writer
from ambient.io.kube import KubeClient
from ambient.io.lease import Election
from ambient.io.reflector import Reflector
from ambient.io.secrecy import no_dumps
from ambient.io.token_review import TokenReviewer
from ambient.io.xds_server import ControlServer, serve
from ambient.manifest import kinds
from ambient.manifest.kinds import Changed, Kind
from ambient.manifest.mesh import Mesh
from ambient.manifest.objects import Pod
from ambient.manifest.problems import Problem
from ambient.model.world import World
from ambient.settings import ControlSettings, read_settings
from ambient.xds.server import Server

log = logging.getLogger(__name__)

DEBOUNCE_S = 0.01  # collects what belongs together: a rollout's pods, a service and its slices
PAUSE_S_MAX = 0.5
SETTLE_S = 1.0  # between the last acknowledgement and STRICT: requests under way in plaintext finish
LEASE_NAME = "ambient-control"

WATCHED: tuple[Kind[Any], ...] = (
    kinds.NAMESPACE,
    kinds.NODE,
    kinds.POD,
    kinds.SERVICE,
    kinds.ENDPOINT_SLICE,
    kinds.AUTHORIZATION_POLICY,
    kinds.PEER_AUTHENTICATION,
)


class ControlPlane:
    """Construct, then `run` until cancelled. Raises AmbientError from the constructor for bad settings."""

    def __init__(self, settings: ControlSettings, client: KubeClient) -> None:
        self.settings = settings
        self.client = client
        self.authority = Authority.open(settings, time.time())
        self.discovery = Server()
        mesh = Mesh(settings.trust_domain, settings.cluster_id, settings.cluster_domain, settings.root_namespace)
        self.reconciler = Reconciler(mesh, settings.acknowledge_timeout_s, SETTLE_S)
        self.writer = Writer(client, self.reconciler, lambda: self.authority.bundle_pem)
        self.publishes_total = 0
        self.server: ControlServer | None = None
        self._election: Election | None = None
        if settings.leader_election:
            identity = f"{socket.gethostname()}_{os.getpid()}"
            self._election = Election(client, settings.system_namespace, LEASE_NAME, identity)
        self._wake = asyncio.Event()
        self._changed = True
        self._published = asyncio.Event()
        self.reflectors: tuple[Reflector[Any], ...] = (
            *(self._reflector(kind) for kind in WATCHED),
            self._reflector(kinds.CONFIG_MAP, field_selector=f"metadata.name={ROOT_CONFIG_MAP}"),
        )

    def _reflector(self, kind: Kind[Any], field_selector: str = "") -> Reflector[Any]:
        def unreadable(key: str, problem: Problem | None) -> None:
            self.reconciler.unreadable(kind.name, key, problem)
            self._changed = True
            self._wake.set()

        return Reflector(self.client, kind, self._on_event, field_selector=field_selector, on_problem=unreadable)

    def _on_event(self, event: Changed[Any]) -> None:
        self.reconciler.change(event)
        self._changed = True
        self._wake.set()

    @property
    def leading(self) -> bool:
        return self._election is None or self._election.leading

    def not_ready(self) -> tuple[str, ...]:
        missing = [f"{r.kind.name} not read" for r in self.reflectors if not r.synced.is_set()]
        if not missing and not self._published.is_set():
            missing.append("no World published")
        if self.leading and self.server is None:
            missing.append("not serving")
        return tuple(missing)

    async def run(self) -> None:
        admin = await control_admin.listen(control_admin.make_app(self), self.settings.admin_listen, log.info)
        self.discovery.listen(self._wake.set)
        self.authority.listen(self.writer.wake)
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in self.reflectors:
                    tasks.create_task(reflector.run())
                tasks.create_task(self._publish())
                tasks.create_task(self._lead())
        finally:
            if self._election is not None:
                await self._election.release()
            await admin.cleanup()
            await self.client.close()

    async def _publish(self) -> None:
        """The one task that computes Worlds and hands them to the discovery server."""
        loop = asyncio.get_running_loop()
        for reflector in self.reflectors:
            await reflector.synced.wait()
        served: World | None = None
        while True:
            self._wake.clear()
            started = loop.time()
            if self._changed:
                self._changed = False
                world = self.reconciler.publish(loop.time())
                if world is not served:  # a node's heartbeat changes nothing
                    served = world
                    self.discovery.set_world(world)
                    self.publishes_total += 1
                self.writer.wake()
                self._say_problems()
                self._published.set()
            released = self.reconciler.release(
                loop.time(), lambda uid: self.discovery.acknowledged(uid, True), self.discovery.behind
            )
            if released is not None:
                served = released
                self.discovery.set_world(released)
                self.publishes_total += 1
            busy_s = loop.time() - started
            deadline = self.reconciler.delay.next_deadline
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wake.wait()
            except TimeoutError:
                continue
            # with thousands of pods joining at once this takes long, and each acknowledgement wakes it again
            await asyncio.sleep(max(DEBOUNCE_S, min(3 * busy_s, PAUSE_S_MAX)))

    _said: frozenset[Problem] = frozenset()

    def _say_problems(self) -> None:
        problems = frozenset(self.reconciler.problems)
        for problem in sorted(problems - self._said):
            log.log(logging.INFO if problem.notice else logging.WARNING, "%s", problem)
        self._said = problems

    async def _lead(self) -> None:
        """Serve and write while leading; losing the lease ends the process, and the next one starts afresh."""
        await self._published.wait()
        if self._election is None:
            await self._serve_and_write()
            return
        await self._election.acquire()
        async with asyncio.TaskGroup() as tasks:
            work = tasks.create_task(self._serve_and_write())
            await self._election.hold()
            work.cancel()
        raise PlatformFault(
            f"the lease {self.settings.system_namespace}/{LEASE_NAME} was lost: start again as a follower"
        )

    async def _serve_and_write(self) -> None:
        def started(server: ControlServer) -> None:
            self.server = server
            log.info("serving discovery and certificates on port %s", ", ".join(map(str, server.ports)))

        review = TokenReviewer(self.client).review
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                serve(self.settings, self.discovery, self.authority, review, self._pods_on, started=started)
            )
            tasks.create_task(self.writer.run())

    def _pods_on(self, node: str) -> tuple[PodFacts, ...]:
        return tuple(_facts(pod) for pod in self.reconciler.pods_on(node))


def _facts(pod: Pod) -> PodFacts:
    return PodFacts(
        uid=pod.metadata.uid,
        name=pod.name,
        namespace=pod.namespace,
        service_account=pod.spec.service_account_name or "default",
        finished=pod.status.phase in ("Succeeded", "Failed"),
        host_network=pod.spec.host_network,
    )


async def _main(settings: ControlSettings) -> None:
    plane = ControlPlane(settings, KubeClient.from_settings(settings.kubeconfig))
    task = asyncio.create_task(plane.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped")


def _causes(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [cause for inner in error.exceptions for cause in _causes(inner)]
    return [error]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ambient control", description="Watch the API, serve the mesh.")
    parser.add_argument("--config", required=True, help="ControlSettings (YAML)")
    path = parser.parse_args(arguments).config
    try:
        settings = read_settings(ControlSettings, Path(path).read_text(encoding="utf-8"), path)
    except (AmbientError, OSError, UnicodeDecodeError) as error:
        print(f"ambient control: {error}", file=sys.stderr)
        return 2
    logs.set_up(settings.log_format, settings.log_level)
    try:
        no_dumps()
        asyncio.run(_main(settings))
    except (AmbientError, BaseExceptionGroup) as error:
        causes = _causes(error)
        for cause in causes:
            log.error("%s", cause, exc_info=None if isinstance(cause, AmbientError) else cause)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
