"""The first words on every connection: both ends prove that they know the cluster's secret, without sending it.

dialer -> HELLO (nonce, who I am)     acceptor -> HELLO (nonce, who I am)
dialer -> PROOF                       acceptor -> PROOF, or REFUSAL (reason) at any point

A proof is an HMAC-SHA256 under the secret over its direction and both hellos as they went over the wire, so it proves
the nonces, the names and the protocol version, and cannot be sent back at its maker. Nothing is ever unpickled.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

from .links import Hello
from .pipe import Transport

VERSION = 1
PREFACE = struct.Struct("<5sHBH")  # magic, version, record type, body length; must never change
MAGIC = b"BRAID"
HELLO, PROOF, REFUSAL = 1, 2, 3
MAX_BODY_BYTES = 4096
MAX_UNREAD_PARTS = 16
NONCE_BYTES = 32
MIN_SECRET_BYTES = 16
TRANSPORTS: tuple[Transport, ...] = ("shm", "unix", "tcp")


class Refused(Exception):
    """The handshake failed; the text says why, for the log and for the other end."""


@dataclass(frozen=True, slots=True)
class Introduction:
    hello: Hello
    transport: Transport


def check_secret(secret: bytes) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the cluster secret has {len(secret)} bytes: use at least {MIN_SECRET_BYTES} random ones")
    return secret


def introduce(sock: socket.socket, mine: Introduction, secret: bytes, deadline: float) -> Introduction:
    """The dialer's side; returns who answered. Raises Refused."""
    my_hello = _send(sock, HELLO, _hello_body(mine), deadline)
    their_hello = _receive(sock, HELLO, deadline)
    _send(sock, PROOF, _proof(secret, b"dialer", my_hello, their_hello), deadline)
    proof = _receive(sock, PROOF, deadline)
    if not hmac.compare_digest(proof[PREFACE.size :], _proof(secret, b"acceptor", my_hello, their_hello)):
        raise Refused("it does not know our cluster's secret")
    return _read_hello(their_hello)


def welcome(sock: socket.socket, mine: Hello, secret: bytes, deadline: float) -> Introduction:
    """The acceptor's side; returns who dialed and the transport it wants. Raises Refused, and tells the dialer why."""
    try:
        their_hello = _receive(sock, HELLO, deadline)
        theirs = _read_hello(their_hello)
        my_hello = _send(sock, HELLO, _hello_body(Introduction(mine, theirs.transport)), deadline)
        proof = _receive(sock, PROOF, deadline)
        if not hmac.compare_digest(proof[PREFACE.size :], _proof(secret, b"dialer", their_hello, my_hello)):
            raise Refused("the dialer does not know this cluster's secret")
        if (theirs.transport == "tcp") != (sock.family != socket.AF_UNIX):
            raise Refused(f"transport {theirs.transport!r} does not go over this socket")
    except Refused as error:
        refuse(sock, str(error), deadline)
        raise
    _send(sock, PROOF, _proof(secret, b"acceptor", their_hello, my_hello), deadline)
    return theirs


def refuse(sock: socket.socket, reason: str, deadline: float) -> None:
    """Says why, then lets the other end hang up: closing over unread bytes resets the connection."""
    with suppress(OSError, Refused):
        _send(sock, REFUSAL, reason.encode()[:MAX_BODY_BYTES], deadline)
        sock.shutdown(socket.SHUT_WR)
        for _ in range(MAX_UNREAD_PARTS):
            sock.settimeout(remaining(deadline))
            if time.monotonic() > deadline or not sock.recv(MAX_BODY_BYTES):
                return


def _proof(secret: bytes, maker: bytes, dialer_hello: bytes, acceptor_hello: bytes) -> bytes:
    digests = hashlib.sha256(dialer_hello).digest() + hashlib.sha256(acceptor_hello).digest()
    return hmac.digest(secret, b"braid link, proof of the " + maker + b"\0" + digests, "sha256")


def _hello_body(mine: Introduction) -> bytes:
    return secrets.token_bytes(NONCE_BYTES) + json.dumps({**asdict(mine.hello), "transport": mine.transport}).encode()


def _read_hello(record: bytes) -> Introduction:
    try:
        fields = json.loads(record[PREFACE.size + NONCE_BYTES :])
        name, role, incarnation = fields["name"], fields["role"], fields["incarnation"]
        host_id, transport = fields["host_id"], fields["transport"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"its hello cannot be read: {error!r}") from error
    if not all(isinstance(text, str) for text in (name, role, host_id)) or type(incarnation) is not int:
        raise Refused("its hello has a field of the wrong type")
    if transport not in TRANSPORTS:
        raise Refused(f"unknown transport {transport!r}")
    return Introduction(Hello(name, role, incarnation, host_id), transport)


def _send(sock: socket.socket, kind: int, body: bytes, deadline: float) -> bytes:
    if len(body) > MAX_BODY_BYTES:
        raise ValueError(f"a hello of {len(body)} bytes exceeds {MAX_BODY_BYTES}: shorten the worker's name")
    record = PREFACE.pack(MAGIC, VERSION, kind, len(body)) + body
    try:
        sock.settimeout(remaining(deadline))
        sock.sendall(record)
    except OSError as error:
        raise Refused(_words(error)) from error
    return record


def _receive(sock: socket.socket, kind: int, deadline: float) -> bytes:
    preface = _receive_exactly(sock, PREFACE.size, deadline)
    magic, version, got, num_bytes = PREFACE.unpack(preface)
    if magic != MAGIC:
        raise Refused(f"it does not speak Braid's link protocol: it begins with {preface!r}")
    if version != VERSION:
        raise Refused(f"it speaks version {version} of the link protocol, this process {VERSION}")
    if num_bytes > MAX_BODY_BYTES:
        raise Refused(f"a handshake record of {num_bytes} bytes exceeds {MAX_BODY_BYTES}")
    body = _receive_exactly(sock, num_bytes, deadline)
    if got == REFUSAL:
        raise Refused(f"it refused: {body.decode(errors='replace')!r}")
    if got != kind:
        raise Refused(f"handshake record {got} came where {kind} was due")
    return preface + body


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    """Reads not one byte more: the next one may carry file descriptors."""
    received = b""
    while len(received) < num_bytes:
        try:
            sock.settimeout(remaining(deadline))
            part = sock.recv(num_bytes - len(received))
        except OSError as error:
            raise Refused(_words(error)) from error
        if not part:
            raise Refused("it closed the connection during the handshake")
        received += part
    return received


def remaining(deadline: float) -> float:
    """Seconds left, as a socket timeout: never zero, which would mean non-blocking."""
    return max(deadline - time.monotonic(), 1e-3)


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "silence: no answer before the deadline of the handshake"
    return f"the connection failed during the handshake: {error.strerror or error}"
