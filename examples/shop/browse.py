"""Ask each URL many times over one connection, then keep all connections open until standard input ends.

`python3 browse.py [--count N] URL...`. Prints "open" once every answer has come. A socket with a timeout is
non-blocking, and these are also registered with epoll, by level, as an event loop's are: so they qualify for
redirection, as do those that service.py accepts.
"""

import argparse
import http.client
import select
import sys
from urllib.parse import urlsplit

parser = argparse.ArgumentParser()
parser.add_argument("urls", nargs="+")
parser.add_argument("--count", type=int, default=300)
parser.add_argument("--timeout", type=float, default=10.0)
arguments = parser.parse_args()

loop = select.epoll()
held = []
for url in arguments.urls:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=arguments.timeout)
    connection.connect()
    loop.register(connection.sock, select.EPOLLIN)
    for _ in range(arguments.count):
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            sys.exit(f"{url}: {response.status}")
    held.append(connection)
print("open", flush=True)
sys.stdin.read()
