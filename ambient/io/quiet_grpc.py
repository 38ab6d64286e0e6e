"""gRPC without its own lines on standard error: every failure they tell of is in our log with its cause.

The library reads GRPC_VERBOSITY once, when it is first imported, so everybody here imports it from this module.
Setting the variable gives the lines back.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc as grpc
