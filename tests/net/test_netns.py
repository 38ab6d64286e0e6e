"""Network namespaces are entered and left again, and have cookies."""

from __future__ import annotations

import os
import socket

import pytest

from ambient.errors import PlatformFault
from ambient.io import netns
from tests.support.require import require

pytestmark = pytest.mark.net


@pytest.fixture
def other():
    """The descriptor of a fresh, nameless namespace."""
    require("net")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            netns._libc.unshare(netns.CLONE_NEWNET)
            os.write(write, b"x")
            os.close(write)
            os.pause() if hasattr(os, "pause") else __import__("signal").pause()
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    fd = netns.open_pid(pid)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    yield fd
    os.close(fd)


def here() -> int:
    fd = netns.open_own()
    try:
        return netns.inode(fd)
    finally:
        os.close(fd)


def test_a_thread_enters_a_namespace_and_comes_back(other):
    home = here()
    with netns.in_netns(other):
        assert here() == netns.inode(other) != home
    assert here() == home


def test_it_comes_back_also_after_an_exception(other):
    home = here()
    with pytest.raises(ValueError), netns.in_netns(other):
        raise ValueError
    assert here() == home


def test_nested_entries_unwind_one_by_one(other):
    home = here()
    own = netns.open_own()
    with netns.in_netns(other):
        with netns.in_netns(own):
            assert here() == home
        assert here() == netns.inode(other)
    os.close(own)
    assert here() == home


def test_a_function_runs_inside_while_the_caller_stays(other):
    home = here()
    assert netns.run_in_netns(other, here) == netns.inode(other)
    assert here() == home
    with pytest.raises(ZeroDivisionError):
        netns.run_in_netns(other, lambda: 1 // 0)


def test_cookies_tell_namespaces_apart(other):
    own = netns.open_own()
    try:
        assert netns.netns_cookie(own) == netns.netns_cookie(own) != netns.netns_cookie(other) != 0
    finally:
        os.close(own)


def test_a_socket_stays_in_the_namespace_it_was_made_in(other):
    with netns.create_socket(other, socket.AF_INET, socket.SOCK_STREAM) as sock:
        assert netns.socket_netns_cookie(sock) == netns.netns_cookie(other)


def test_what_is_not_a_namespace_is_refused_with_a_reason():
    require("net")
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(PlatformFault, match="is it a network namespace"), netns.in_netns(fd):
            pass
        with pytest.raises(PlatformFault, match="is the pod gone"):
            netns.open_netns("/proc/1/ns/nothing")
    finally:
        os.close(fd)
