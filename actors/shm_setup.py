"""Hands the two rings of a shared-memory link over its Unix socket, once the handshake is done."""

import os
import socket
import struct

from .handshake import Refused, remaining
from .shm_pipe import Ring, ShmPipe

MARK = struct.Struct("<4s")
NUM_FDS = 6


def send_rings(sock: socket.socket, ring_bytes: int) -> ShmPipe:
    """The dialer makes both rings; first the one it writes."""
    rings: list[Ring] = []
    try:
        rings.append(Ring.create(ring_bytes))
        rings.append(Ring.create(ring_bytes))
        socket.send_fds(sock, [MARK.pack(b"ring")], [fd for ring in rings for fd in ring.fds()])
    except BaseException as error:
        for ring in rings:
            ring.close()
        if isinstance(error, ConnectionError):
            raise Refused("it closed the connection during the handshake") from error
        raise
    return ShmPipe(sock, outgoing=rings[0], incoming=rings[1])


def receive_rings(sock: socket.socket, deadline: float) -> ShmPipe:
    """The acceptor reads what the dialer writes. Raises Refused, and owns no fd then."""
    try:
        sock.settimeout(remaining(deadline))
        mark, fds, flags, _ = socket.recv_fds(sock, MARK.size, NUM_FDS, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise Refused(f"the rings did not arrive: {error}") from error
    rings: list[Ring] = []
    try:
        if mark != MARK.pack(b"ring") or len(fds) != NUM_FDS or flags & socket.MSG_CTRUNC:
            raise Refused(f"{len(fds)} file descriptors came where {NUM_FDS} were due")
        rings.append(Ring(*fds[:3]))
        rings.append(Ring(*fds[3:]))
    except BaseException as error:
        for ring in rings:
            ring.close()
        for fd in fds[3 * len(rings) :]:
            os.close(fd)
        raise Refused(f"the rings cannot be used: {error}") from error
    return ShmPipe(sock, outgoing=rings[1], incoming=rings[0])
