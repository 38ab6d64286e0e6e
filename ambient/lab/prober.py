"""The process that makes a kubelet's probes: it lives in the node's namespace and in the kubelet's cgroup.

One JSON object a line: ``{"id", "kind": "http"|"tcp", "host", "port", "timeout", "path", "scheme", "headers"}``
in, ``{"id", "ok", "message"}`` out. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from typing import Any

_STATUS_BYTES_MAX = 1024


async def probe(request: dict[str, Any]) -> str:
    """Empty if the probe succeeds, else why not."""
    try:
        async with asyncio.timeout(float(request["timeout"])):
            return await (_http(request) if request["kind"] == "http" else _tcp(request))
    except TimeoutError:
        return f"no answer within {request['timeout']} s"
    except (OSError, ssl.SSLError, asyncio.IncompleteReadError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


async def _tcp(request: dict[str, Any]) -> str:
    _, writer = await asyncio.open_connection(request["host"], request["port"])
    writer.close()
    return ""


async def _http(request: dict[str, Any]) -> str:
    context = None
    if request.get("scheme") == "HTTPS":  # kubelets do not verify, either
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = request["host"], request["port"]
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        name = f"[{host}]" if ":" in host else host
        headers = {"Host": f"{name}:{port}", "User-Agent": "kube-probe/1.32", "Accept": "*/*", "Connection": "close"}
        headers |= request.get("headers") or {}
        lines = [f"GET {request.get('path') or '/'} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1"))
        line = await reader.readuntil(b"\n")
    except (asyncio.LimitOverrunError, UnicodeEncodeError) as error:
        return f"not HTTP: {error}"
    finally:
        writer.close()
    parts = line[:_STATUS_BYTES_MAX].split(None, 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return f"not HTTP: {line[:80]!r}"
    code = int(parts[1])
    return "" if 200 <= code < 400 else f"HTTP probe failed with statuscode: {code}"


async def serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running: set[asyncio.Task[None]] = set()

    async def one(request: dict[str, Any]) -> None:
        message = await probe(request)
        sys.stdout.write(json.dumps({"id": request["id"], "ok": not message, "message": message}) + "\n")
        sys.stdout.flush()

    while line := await reader.readline():
        task = loop.create_task(one(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(serve())
