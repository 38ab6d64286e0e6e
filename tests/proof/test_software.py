"""Unmodified software within a node: on the kernel's path, byte for byte, plain (`direct`) and redirected (`redirect`).

Which sockets may be redirected is their software's doing: Redis, redis-benchmark, PostgreSQL and psql wait by level on
non-blocking sockets, redis-cli blocks, nginx and Go wait by edges.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambient.io.bpf_maps import Maps
from ambient.lab.driver import eventually
from ambient.manifest.acceleration import ACCELERATION
from tests.support.flows import Witness
from tests.support.mesh import IDLE, Mesh, pod, service
from tests.support.require import require
from tests.support.software import Site, cluster, go_server, nginx, postgres, redis, shared_directory, stream

Tell = Callable[[str, Witness], None]
pytestmark = [pytest.mark.lab, pytest.mark.net]

SIZE = 6_000_003
ROWS = 100_000
VALUES, VALUE_SIZE = 20_000, 1_000
SERVERS = ("nginx", "go", "redis", "postgres")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    require("nginx", "wrk", "curl", "go", "redis-server", "redis-cli", "redis-benchmark", "psql")
    with shared_directory() as found:
        yield found


@pytest.fixture(scope="module")
def template(directory: Path) -> Path:
    return cluster(directory)


@pytest.fixture(scope="module", params=["direct", "redirect"])
def site(mesh: Mesh, directory: Path, template: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    own = directory / request.param
    own.mkdir()
    words = {"annotations": {ACCELERATION: request.param}}
    pods = [nginx(own, **words), go_server(**words), redis(own, **words), redis(own, "replica", **words)]
    pods += [postgres(own, template, **words), pod("client", command=IDLE, **words)]
    (own / "data").write_bytes(os.urandom(SIZE))
    with (
        Maps.open(mesh.settings("node1").bpffs_dir) as maps,
        mesh.namespace(*pods, *(service(name) for name in SERVERS)) as name,
    ):
        found = Site(mesh, maps, name, own, request.param)
        found.await_kernel_path("client", *SERVERS)
        found.await_kernel_path("replica", "redis")
        yield found
        mesh.kubectl("delete", "pod", "postgres", "-n", name, "--wait=true")


def test_curl_and_wrk_with_nginx(site: Site, tell: Tell) -> None:
    files, vip, own = site.directory / "nginx" / "files", site.vip("nginx"), site.directory
    (files / "data").write_bytes((own / "data").read_bytes())
    sizes = random.Random(1)
    pages = [os.urandom(int(2 ** sizes.uniform(0, 18))) for _ in range(50)]
    for number, page in enumerate(pages):
        (files / f"page{number}").write_bytes(page)
    with site.watch("nginx") as seen:
        site.run("curl", "-sSf", "-o", str(own / "download"), f"http://{vip}/data")
        site.run("curl", "-sSf", "-o", str(own / "page#1"), f"http://{vip}/page[0-49]")
        site.run("curl", "-sSf", "-T", str(own / "data"), f"http://{vip}/put/upload")
        site.run("curl", "-sSf", "-T", str(own / "data"), "--limit-rate", "15M", f"http://{vip}/put/slowly")
        wrk = site.run("wrk", "-t2", "-c16", "-d1s", f"http://{vip}/page7")
    data = (own / "data").read_bytes()
    assert (own / "download").read_bytes() == data
    assert (files / "put" / "upload").read_bytes() == data
    assert (files / "put" / "slowly").read_bytes() == data
    assert [(own / f"page{number}").read_bytes() for number in range(50)] == pages
    assert "Socket errors" not in wrk and "Non-2xx" not in wrk and " 0 requests" not in wrk, wrk
    assert seen.to_server.all > 2 * SIZE and seen.to_client.all > SIZE + sum(map(len, pages))
    tell("nginx", seen)
    assert seen.redirected == 0, "it waits edge-triggered"


def test_curl_and_wrk_with_a_go_server(site: Site, tell: Tell) -> None:
    vip, own = site.vip("go"), site.directory
    with site.watch("go") as seen:
        site.run("curl", "-sSf", "-o", str(own / "stream"), f"http://{vip}/bytes/{SIZE}")
        said = site.run("curl", "-sSf", "--data-binary", f"@{own / 'data'}", f"http://{vip}/digest")
        wrk = site.run("wrk", "-t2", "-c16", "-d1s", f"http://{vip}/bytes/1000")
    assert (own / "stream").read_bytes() == stream(SIZE)
    assert said.split() == [str(SIZE), hashlib.sha256((own / "data").read_bytes()).hexdigest()]
    assert "Socket errors" not in wrk and "Non-2xx" not in wrk and " 0 requests" not in wrk, wrk
    assert seen.to_server.all > SIZE and seen.to_client.all > SIZE
    tell("go", seen)
    assert seen.redirected == 0, "it waits edge-triggered"


def test_redis_with_its_blocking_client(site: Site, tell: Tell) -> None:
    vip, own = site.vip("redis"), site.directory
    with site.watch("redis") as seen:
        script = f"redis-cli -h {vip} -p 80 -x set data < {own}/data && redis-cli -h {vip} -p 80 --raw get data"
        site.run("sh", "-c", f"({script}) > {own}/got")
    assert (own / "got").read_bytes() == b"OK\n" + (own / "data").read_bytes() + b"\n"
    tell("redis-cli", seen)
    assert seen.redirected == 0, "it blocks"


def test_redis_with_its_benchmark_and_a_replica(site: Site, tell: Tell) -> None:
    vip = site.vip("redis")
    words = ("-n", str(VALUES), "-r", "1000000", "-c", "16", "-d", str(VALUE_SIZE), "-q", "-P", "4")
    with site.watch("redis") as seen:
        said = site.run("redis-benchmark", "-h", vip, "-p", "80", "-t", "set,get", *words)
    assert said.count("requests per second") == 2, said
    assert seen.to_server.all > VALUES * VALUE_SIZE
    tell("redis-benchmark", seen)
    if site.acceleration == "redirect":
        assert seen.to_server.redirected > VALUES * VALUE_SIZE // 2
        assert seen.to_client.redirected > 0

    def ask(name: str, *words: str) -> str:
        return site.run("redis-cli", "-p", "8080", *words, pod=name).strip()

    digest = ask("redis", "debug", "digest")
    assert int(digest, 16) > 0
    with site.watch("redis") as seen:
        ask("replica", "replicaof", vip, "80")
        eventually(lambda: ask("replica", "debug", "digest") == digest, 20, "the replica to have the same data")
        ask("replica", "replicaof", "no", "one")
    assert ask("redis", "dbsize") == ask("replica", "dbsize")
    assert seen.to_client.all > VALUES * VALUE_SIZE // 2
    tell("replication", seen)
    if site.acceleration == "redirect":
        assert seen.to_client.redirected > 0


def test_postgresql_with_psql(site: Site, tell: Tell) -> None:
    """psql waits in poll() until an answer is there, but its sockets do not block."""
    own = site.directory
    texts = [hashlib.md5(str(number).encode()).hexdigest() for number in range(ROWS)]
    rows = "".join(f"{number}\t{text}\n" for number, text in enumerate(texts))
    (own / "rows").write_text(rows)
    psql = ("psql", "-h", site.vip("postgres"), "-p", "80", "-U", "postgres", "-At", "-v", "ON_ERROR_STOP=1")
    with site.watch("postgres") as out:
        query = f"select number, md5(number::text) from generate_series(0, {ROWS - 1}) number"
        said = site.run(*psql, "-c", f"copy ({query}) to stdout")
    assert said == rows
    with site.watch("postgres") as back:
        query = "select count(*), md5(string_agg(text, '' order by number)) from rows"
        steps = ("create table rows (number int, text text)", f"\\copy rows from '{own}/rows'", query)
        said = site.run(*psql, *(word for step in steps for word in ("-c", step)))
    assert said.splitlines()[-1] == f"{ROWS}|{hashlib.md5(''.join(texts).encode()).hexdigest()}"
    assert out.to_client.all > len(rows) and back.to_server.all > len(rows)
    tell("psql reads", out)
    tell("psql writes", back)
    if site.acceleration == "redirect":
        assert out.to_client.redirected > len(rows) // 4
        assert back.to_server.redirected > 0
