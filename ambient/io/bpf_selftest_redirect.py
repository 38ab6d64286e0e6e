"""What this kernel does with bytes redirected from socket to socket: tried before redirection is allowed.

With a program of five instructions and a sockmap of its own, so that the answers are the kernel's and not those of our
programs. In a namespace of its own, over loopback; everything is gone afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ambient.datapath.layout import LAYOUT
from ambient.errors import PlatformFault
from ambient.io import bpf_sys, netns

_MAP_CREATE: Final = 0
_PROG_LOAD: Final = 5
_MAP_TYPE_SOCKMAP: Final = 15
_SO_MEMINFO: Final = 55
_TCP_ULP: Final = 31
_SPLICE_NONBLOCK: Final = 2
_SENDER, _RECEIVER = 0, 1
_CHARGE: Final = 10_000
_READABLE_S: Final = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Found:
    """``bits`` for settings.acceleration; ``said`` one sentence for each thing that is not as wished."""

    bits: int
    said: tuple[str, ...]


def run(unavailable: str = "") -> Found:
    """Try the kernel. ``unavailable``: why redirection is out of the question already (no BTF, programs refused).

    Never raises for a kernel that cannot: redirection then stays off and says why.
    """
    if unavailable:
        bit = "NO_OFFSETS" if unavailable.startswith("no usable BTF") else "NO_PROGRAMS"
        return Found(LAYOUT[bit], (f"redirection is off: {unavailable}",))
    home = netns.open_own()
    try:
        return netns.run_in_netns(home, _inside)
    except (OSError, PlatformFault) as error:
        return Found(LAYOUT["NO_PROGRAMS"], (f"redirection is off: its self-test failed: {error}",))
    finally:
        os.close(home)


def _inside() -> Found:
    """On a thread of its own."""
    if _libc.unshare(netns.CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare a network namespace (CAP_SYS_ADMIN)")
    loopback_up()
    charged = _charged()
    if charged < _CHARGE:
        said = f"redirection is off: of {_CHARGE} redirected bytes the kernel charges {charged} to the receiver"
        return Found(LAYOUT["NO_CHARGE"], (f"{said} (6.13, 6.1.123 and newer charge all)",))
    bits, differs = LAYOUT["CAN_REDIRECT"], []
    spliced, counted = _spliced(), _counted()
    if spliced != b"onetwo":
        got = spliced.decode("ascii") or "nothing"
        differs.append(f"splice() of redirected bytes gives {got} instead of onetwo")
    if counted != (3, 3):
        differs.append(f"FIONREAD counts {counted[0]} of 3 redirected and {counted[1]} of 3 native bytes")
    if not differs:
        bits |= LAYOUT["AUTO_REDIRECT"]
    if _allows_ulp():
        bits |= LAYOUT["ULP_ALLOWED"]
    return Found(bits, (f"acceleration auto means direct: {', '.join(differs)}",) if differs else ())


def loopback_up() -> None:
    """Of the namespace of this thread. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("=16sH22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def _map_create(name: bytes) -> int:
    result, _ = bpf_sys._command(_MAP_CREATE, struct.pack("=IIIIII4x16s", _MAP_TYPE_SOCKMAP, 4, 4, 2, 0, 0, name))
    if result < 0:
        raise OSError(-result, "create a sockmap")
    return result


def _program(table: int) -> int:
    """sk_msg: return bpf_msg_redirect_map(ctx, table, _RECEIVER, BPF_F_INGRESS)."""
    words = (
        table << 32 | 0x1218,  # r2 = map, first half
        0,
        _RECEIVER << 32 | 0x03B7,  # r3
        1 << 32 | 0x04B7,  # r4
        60 << 32 | 0x85,  # call
        0x95,  # exit
    )
    text = ctypes.create_string_buffer(struct.pack(f"={len(words)}Q", *words))
    licence = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("=IIQQ", bpf_sys.PROG_TYPE_SK_MSG, len(words), ctypes.addressof(text), ctypes.addressof(licence))
    attr = head + struct.pack("=IIQII16sII", 0, 0, 0, 0, 0, b"selftest", 0, bpf_sys.ATTACH_SK_MSG)
    result, _ = bpf_sys._command(_PROG_LOAD, attr)
    if result < 0:
        raise OSError(-result, "load an sk_msg program")
    return result


class _Pair:
    """Two ends of a connection; what the first sends is redirected into the second."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.sender = socket.create_connection(server.getsockname(), timeout=5)
            self.receiver, _ = server.accept()
        self.sender.setblocking(False)
        self.receiver.setblocking(False)
        self._table = _map_create(b"selftest")
        self._program = _program(self._table)
        bpf_sys.prog_attach(self._program, self._table, bpf_sys.ATTACH_SK_MSG, "sk_msg to a sockmap (self-test)")
        self._element(bpf_sys.MAP_UPDATE_ELEM, _SENDER, self.sender)
        self._element(bpf_sys.MAP_UPDATE_ELEM, _RECEIVER, self.receiver)

    def _element(self, command: int, index: int, sock: socket.socket | None) -> None:
        key = ctypes.c_uint32(index)
        value = ctypes.c_uint32(sock.fileno() if sock else 0)
        places = (ctypes.addressof(key), ctypes.addressof(value) if sock else 0)
        attr = ctypes.create_string_buffer(struct.pack("=IIQQQ", self._table, 0, *places, 0), 32)
        result = bpf_sys.call(command, attr, 32)
        if result < 0:
            raise OSError(-result, "change a sockmap")

    def go_native(self) -> None:
        """Only the sender leaves: what the receiver holds stays."""
        self._element(bpf_sys.MAP_DELETE_ELEM, _SENDER, None)

    def close(self) -> None:
        for sock in (self.sender, self.receiver):
            sock.close()
        os.close(self._program)
        os.close(self._table)


@contextlib.contextmanager
def _pair() -> Iterator[_Pair]:
    pair = _Pair()
    try:
        yield pair
    finally:
        pair.close()


def _charged() -> int:
    with _pair() as pair:
        pair.sender.send(bytes(_CHARGE))
        raw = pair.receiver.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        return int(struct.unpack_from("=I", raw)[0])


def _spliced() -> bytes:
    """What splice() reads of one redirected and then one native message."""
    with _pair() as pair:
        pair.sender.send(b"one")
        pair.go_native()
        pair.sender.send(b"two")
        out, into = os.pipe()
        try:
            os.set_blocking(out, False)
            for _ in range(4):
                with contextlib.suppress(BlockingIOError):
                    os.splice(pair.receiver.fileno(), into, 4096, flags=_SPLICE_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                return os.read(out, 4096)
            return b""
        finally:
            os.close(out)
            os.close(into)


def _counted() -> tuple[int, int]:
    """What FIONREAD says of three redirected bytes, and of three native ones."""
    with _pair() as pair:
        pair.sender.send(b"one")
        redirected = _unread(pair.receiver)
        pair.receiver.recv(4096)
        pair.go_native()
        pair.sender.send(b"two")
        return redirected, _unread(pair.receiver)


def _unread(sock: socket.socket) -> int:
    """FIONREAD once the socket is readable."""
    select.select((sock,), (), (), _READABLE_S)
    return int(struct.unpack("=i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def _allows_ulp() -> bool:
    """Whether TCP_ULP "tls" on a socket of a sockmap is anything but refused. Without the module it is not: it may
    be loaded later."""
    with _pair() as pair:
        try:
            pair.receiver.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
        except OSError as error:
            return error.errno == errno.ENOENT
        return True
