"""Call an echo server once and print what both ends saw as one JSON object; exit code 1 if it failed.

`--mapped` dials ::ffff:a.b.c.d on an IPv6 socket; `--bind` binds the socket to an address first; `--text` is sent
and must come back; `--hold` keeps the connection open until standard input ends, and then sends once more.
"""

import argparse
import json
import socket
import sys

parser = argparse.ArgumentParser()
parser.add_argument("host")
parser.add_argument("port", type=int)
parser.add_argument("--text", default="hello")
parser.add_argument("--mapped", action="store_true")
parser.add_argument("--bind", default="")
parser.add_argument("--hold", action="store_true")
parser.add_argument("--timeout", type=float, default=6.0)
arguments = parser.parse_args()


def exact(connection, count):
    found = b""
    while len(found) < count:
        data = connection.recv(count - len(found))
        if not data:
            raise ConnectionError(f"end of stream after {len(found)} of {count} bytes")
        found += data
    return found


def main():
    if arguments.mapped:
        family, target = socket.AF_INET6, (f"::ffff:{arguments.host}", arguments.port)
    else:
        family, _, _, _, target = socket.getaddrinfo(arguments.host, arguments.port, type=socket.SOCK_STREAM)[0]
    connection = socket.socket(family)
    connection.settimeout(arguments.timeout)
    with connection:
        if arguments.bind:
            connection.bind((arguments.bind, 0))
        connection.connect(target)
        line = b""
        while not line.endswith(b"\n"):
            line += exact(connection, 1)
        text = arguments.text.encode()
        connection.sendall(text)
        echoed = exact(connection, len(text)).decode()
        found = {"seen": json.loads(line), "echoed": echoed}
        found["local"], found["peer"] = connection.getsockname()[:2], connection.getpeername()[:2]
        print(json.dumps(found), flush=True)
        if arguments.hold:
            sys.stdin.read()
            connection.sendall(b"again")
            print(json.dumps({"again": exact(connection, 5).decode()}), flush=True)


try:
    main()
except (OSError, ValueError) as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    sys.exit(1)
