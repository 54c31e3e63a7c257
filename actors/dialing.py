"""Makes a link to a worker: chooses the transport, connects, proves the secret."""

import os
import socket
import time
from pathlib import Path
from typing import Literal, Protocol

from .handshake import Introduction, Refused, check_secret, introduce, remaining
from .links import DEFAULT_MAX_QUEUED_BYTES, DialFailed, HandshakeRejected, Hello, Link
from .pipe import Pipe, Transport
from .shm_pipe import DEFAULT_RING_BYTES, HAS_NATIVE
from .shm_setup import send_rings
from .socket_pipe import SocketPipe


class Target(Protocol):
    """Where a worker listens; a WorkerInfo is one."""

    @property
    def unix_path(self) -> str: ...
    @property
    def tcp_host(self) -> str: ...
    @property
    def tcp_port(self) -> int: ...


def dial(
    target: Target,
    hello: Hello,
    secret: bytes,
    transport: Transport,
    timeout_s: float,
    max_queued_bytes: int = DEFAULT_MAX_QUEUED_BYTES,
    ring_bytes: int = DEFAULT_RING_BYTES,
) -> Link:
    """One attempt. Raises DialFailed when nobody answers, HandshakeRejected when somebody does and refuses."""
    check_secret(secret)
    address = f"{target.tcp_host}:{target.tcp_port}" if transport == "tcp" else target.unix_path
    deadline = time.monotonic() + timeout_s
    sock = _connect(target, transport, address, deadline)
    try:
        theirs = introduce(sock, Introduction(hello, transport), secret, deadline)
        pipe: Pipe = send_rings(sock, ring_bytes) if transport == "shm" else SocketPipe(sock, transport)
    except Refused as error:
        sock.close()
        raise HandshakeRejected(address, str(error)) from error
    except BaseException:
        sock.close()
        raise
    return Link(theirs.hello, pipe, max_queued_bytes)


def _connect(target: Target, transport: Transport, address: str, deadline: float) -> socket.socket:
    try:
        if transport == "tcp":
            return socket.create_connection((target.tcp_host, target.tcp_port), timeout=remaining(deadline))
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(remaining(deadline))
            sock.connect(target.unix_path)
        except BaseException:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise DialFailed(f"nobody answers at {address}: {error}") from error


def choose_transport(mine: Hello, theirs_host_id: str, setting: Literal["auto", "shm", "tcp"], bulk: bool) -> Transport:
    """`bulk`: activations and KV blocks move here, not only requests and tokens."""
    is_same_host = mine.host_id == theirs_host_id
    if setting == "tcp" or (setting == "auto" and not is_same_host):
        return "tcp"
    if not is_same_host:
        raise ValueError("transport 'shm' was asked for, and the peer is on another host: use 'auto' or 'tcp'")
    if setting == "shm" and not HAS_NATIVE:
        raise ValueError(
            "transport 'shm' needs the native module: install a C++ compiler, and braid anew, or use 'auto'"
        )
    return "shm" if bulk and HAS_NATIVE else "unix"


def host_id() -> str:
    """Equal for two processes exactly when they share a kernel, a network and a file tree.

    Two containers on one machine differ: the socket paths of one mean nothing to the other.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "mnt")]
    return "/".join([boot, *namespaces])
