"""Fixtures shared by areas: tests.support.lab_fixtures (namespaces with the programs loaded, once a session)."""

import os

# Programs are started by fork() from a process in which gRPC has threads: its handlers of fork() could abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

pytest_plugins = ["tests.support.lab_fixtures"]
