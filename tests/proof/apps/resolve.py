"""Ask the pod's name server (or --server) for a name; print {"addresses": [...], "code": n, "truncated": bool}.

`--tcp` asks over TCP, `--unconnected` with sendto, else a connected UDP socket, as most resolvers do.
"""

import argparse
import ipaddress
import json
import socket
import struct
import sys

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--server", default="")
parser.add_argument("--type", choices=["A", "AAAA"], default="A")
parser.add_argument("--tcp", action="store_true")
parser.add_argument("--unconnected", action="store_true")
arguments = parser.parse_args()


def server():
    if arguments.server:
        return arguments.server
    with open("/etc/resolv.conf") as text:
        return next(line.split()[1] for line in text if line.startswith("nameserver"))


def query():
    kind = {"A": 1, "AAAA": 28}[arguments.type]
    name = b"".join(bytes([len(part)]) + part.encode() for part in arguments.name.rstrip(".").split("."))
    return struct.pack("!HHHHHH", 4711, 0x0100, 1, 0, 0, 0) + name + b"\0" + struct.pack("!HH", kind, 1)


def skip(raw, offset):
    while raw[offset] and raw[offset] < 192:
        offset += raw[offset] + 1
    return offset + (2 if raw[offset] >= 192 else 1)


def main():
    where = server()
    target = (where, 53)
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    asked = socket.socket(family, socket.SOCK_STREAM if arguments.tcp else socket.SOCK_DGRAM)
    asked.settimeout(6)
    if arguments.tcp:
        asked.connect(target)
        asked.sendall(struct.pack("!H", len(query())) + query())
        stream = asked.makefile("rb")
        raw = stream.read(struct.unpack("!H", stream.read(2))[0])
        peer = asked.getpeername()[:2]
    elif arguments.unconnected:
        asked.sendto(query(), target)
        raw, peer = asked.recvfrom(4096)
        peer = peer[:2]
    else:
        asked.connect(target)
        asked.send(query())
        raw = asked.recv(4096)
        peer = asked.getpeername()[:2]
    number, flags, questions, answers = struct.unpack_from("!HHHH", raw)
    assert number == 4711
    offset = 12
    for _ in range(questions):
        offset = skip(raw, offset) + 4
    addresses = []
    for _ in range(answers):
        offset = skip(raw, offset)
        kind, _, _, length = struct.unpack_from("!HHIH", raw, offset)
        offset += 10
        if kind in (1, 28):
            addresses.append(str(ipaddress.ip_address(raw[offset : offset + length])))
        offset += length
    found = {"addresses": sorted(addresses), "code": flags & 15, "truncated": bool(flags & 0x200), "peer": peer}
    print(json.dumps(found))


try:
    main()
except OSError as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    sys.exit(1)
