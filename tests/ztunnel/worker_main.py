"""A worker process for tests and benchmarks: the real one, with a kernel that has no eBPF.

usage: python -m tests.ztunnel.worker_main PARENT_FD CONTROL_FD ORIGINAL_IP ORIGINAL_PORT CLIENT_IP [SETTINGS_JSON]

Every captured connection was dialled to ORIGINAL by CLIENT, or each by another one if CLIENT is "each".
"""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import os
import resource
import sys
from typing import NamedTuple

from ambient.datapath.values import Admission
from ambient.errors import PlatformFault
from ambient.io.bpf_sys import BpfFault
from ambient.settings import NodeSettings
from ztunnel.io.worker import run_worker


class Redirect(NamedTuple):
    original: str
    original_port: int
    endpoint: str
    endpoint_port: int
    client: str
    client_port: int


class PlainKernel:
    """Every accepted connection has the same record; deliveries are let through, to port 1 never, to port 2 never for
    the address chosen, to port 3 only with the fourth."""

    def __init__(self, original: str, port: int, client: str) -> None:
        self._redirect = Redirect(original, port, "", 0, client, 40000)
        self._numbers = itertools.count(1)

    def redirect_of(self, cookie: int) -> Redirect | None:
        if self._redirect.client == "each":
            return self._redirect._replace(client=f"127.0.0.{next(self._numbers)}")
        return self._redirect if self._redirect.original_port else None

    def authorize_delivery(self, admission: Admission) -> None:
        local_port = admission.local_port
        if local_port == 1:
            raise PlatformFault("authorized is full")
        if local_port == 2 or (local_port == 3 and next(self._numbers) <= 3):
            raise BpfFault("origins", errno.EEXIST)

    def withdraw_delivery(self, admission: Admission) -> None:
        pass


def main() -> int:
    parent, control, original, port, client, *rest = sys.argv[1:]
    values = json.loads(rest[0]) if rest else {}
    settings = NodeSettings(**{"node_name": "test", **values})
    kernel = PlainKernel(original, int(port), client)
    files = os.environ.get("WORKER_FILES")
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
    for name, value in json.loads(os.environ.get("WORKER_CONSTANTS", "{}")).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    profile = os.environ.get("WORKER_PROFILE")
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        try:
            return profiler.runcall(run_worker, settings, int(parent), int(control), kernel)
        finally:
            profiler.dump_stats(f"{profile}.{os.getpid()}")
    return run_worker(settings, int(parent), int(control), kernel)


if __name__ == "__main__":
    sys.exit(main())
