"""What discovery costs with 10,000 workloads: a full push and one change, state machines and real gRPC.

python -m tests.bench.discovery [workloads] [clients]
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ambient.io.xds_client import subscribe
from ambient.model.workload import Port, TunnelProtocol, Workload
from ambient.model.world import Diff, World
from ambient.proto import discovery_pb2
from ambient.xds.client import Client, describe_node
from ambient.xds.server import Server
from tests.support.control import Background, ControlPlane, Now, until


def make_world(count: int) -> World:
    base = int(ipaddress.ip_address("10.0.0.0"))
    return World.of(
        Workload(
            f"Kubernetes//Pod/shop-{n % 50}/app-{n}-7d4b9c6f5-x{n % 97}",
            f"app-{n}-7d4b9c6f5-x{n % 97}",
            f"shop-{n % 50}",
            (ipaddress.ip_address(base + n + 1),),
            node=f"node-{n % 200}",
            service_account=f"account-{n % 300}",
            protocol=TunnelProtocol.HBONE,
            services=((f"shop-{n % 50}/app-{n % 300}.shop-{n % 50}.svc.cluster.local", (Port(80, 8080),)),),
            canonical_name=f"app-{n % 300}",
            workload_name=f"app-{n % 300}",
        )
        for n in range(count)
    )


def changed(world: World, text: str) -> World:
    first = world.workloads[min(world.workloads)]
    return world.apply(Diff(workloads=(replace(first, workload_name=text),)))


def machines(world: World) -> None:
    server, client = Server(), Client(describe_node("ztunnel", "n"))
    session = server.open("n")
    began = time.perf_counter()
    server.set_world(world)
    encoded = time.perf_counter()
    for request in client.connect():
        session.receive(request)
    responses = []
    while (response := session.next()) is not None:
        responses.append(response.payload)
    sent = time.perf_counter()
    change = None
    for payload in responses:
        change = client.receive(discovery_pb2.DeltaDiscoveryResponse.FromString(payload)) or change
    assert change is not None
    acks = client.commit(change)
    read = time.perf_counter()
    for ack in acks:
        session.receive(ack)
    print(
        f"full push, state machines: encode {1e3 * (encoded - began):.0f} ms once,"
        f" send {1e3 * (sent - encoded):.1f} ms per client,"
        f" read {1e3 * (read - sent):.0f} ms at the client, {sum(map(len, responses)) / 1e6:.2f} MB"
        f" in {len(responses)} responses"
    )
    tries = []
    for n in range(50):
        after = changed(server.store.world, f"x{n}")
        began = time.perf_counter()
        server.set_world(after)
        while (response := session.next()) is not None:
            change = client.receive(discovery_pb2.DeltaDiscoveryResponse.FromString(response.payload))
            for ack in client.commit(change) if change else ():
                session.receive(ack)
        tries.append(time.perf_counter() - began)
    assert client.world == server.store.world
    print(f"one change, state machines: p50 {1e3 * sorted(tries)[25]:.2f} ms")


async def over_grpc(world: World, clients: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with ControlPlane(Path(directory), Now(time.time())) as plane, Background() as background:
            seen: dict[int, World] = {}
            arrived = asyncio.Event()

            def follow(number: int) -> None:
                async def on_change(world: World, diff: Diff) -> None:
                    seen[number] = world
                    arrived.set()

                background.start(subscribe(plane.node(f"n{number}"), "ztunnel", on_change))

            plane.discovery.set_world(world)
            began = time.perf_counter()
            for number in range(clients):
                follow(number)
            await until(lambda: len(seen) == clients, timeout_s=60)
            took_ms = 1e3 * (time.perf_counter() - began)
            print(f"full push, gRPC and TLS, {clients} clients in this process: {took_ms:.0f} ms")
            tries = []
            uid = min(world.workloads)
            for n in range(20):
                after = changed(plane.discovery.store.world, f"y{n}")
                began = time.perf_counter()
                plane.discovery.set_world(after)
                name = f"y{n}"
                arrived.clear()
                while any(w.workloads[uid].workload_name != name for w in seen.values()):
                    await arrived.wait()
                    arrived.clear()
                tries.append(time.perf_counter() - began)
            print(f"one change until all {clients} have it: p50 {1e3 * sorted(tries)[10]:.1f} ms")


def main() -> None:
    logging.disable(logging.WARNING)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    clients = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    world = make_world(count)
    machines(world)
    asyncio.run(over_grpc(world, clients))
    print(f"resident at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB, server and clients")


if __name__ == "__main__":
    main()
