"""Who gets a link: only who proves the secret, in the right version, in time; everybody else is told why."""

from __future__ import annotations

import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import pytest
from link_peer import SECRET, TRANSPORTS, Address, LinkHost

from braid.actors.dialing import dial, host_id
from braid.actors.handshake import HELLO, MAGIC, PREFACE, PROOF, VERSION, Introduction, Refused, introduce, welcome
from braid.actors.links import DialFailed, HandshakeRejected, Hello, Link
from braid.actors.listener import Listener

ME = Hello("me", "both", 1, host_id())
TIMEOUT_S = 20.0
Transport = Literal["shm", "unix", "tcp"]
every_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LinkHost]:
    made = LinkHost(tmp_path)
    yield made
    made.close()


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A TCP server that is not one of ours; it answers one client."""

    def serve() -> None:
        sock, _ = listening.accept()
        with sock:
            answer(sock)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Address("", "127.0.0.1", listening.getsockname()[1])
        thread.join()


def read_record(sock: socket.socket) -> bytes:
    preface = sock.recv(PREFACE.size, socket.MSG_WAITALL)
    num_bytes: int = PREFACE.unpack(preface)[3]
    return preface + sock.recv(num_bytes, socket.MSG_WAITALL)


def until_hung_up(sock: socket.socket) -> bytes:
    sock.settimeout(TIMEOUT_S)
    received = b""
    try:
        while part := sock.recv(4096):
            received += part
    except ConnectionResetError:
        pass
    return received


@every_transport
def test_a_wrong_secret_is_rejected_on_both_sides(
    host: LinkHost, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(HandshakeRejected) as error:
        dial(host.address, ME, b"another secret of many bytes....", transport, TIMEOUT_S)
    address = f"127.0.0.1:{host.address.tcp_port}" if transport == "tcp" else host.address.unix_path
    assert error.value.address == address
    assert error.value.reason == 'it refused: "the dialer does not know this cluster\'s secret"'
    told = "does not know this cluster's secret"
    host.until(lambda: told in caplog.text, "the warning")
    assert [record.levelno for record in caplog.records if told in record.getMessage()] == [logging.WARNING]
    assert host.reactor.poll(0) == []


def test_a_server_that_does_not_know_the_secret_is_rejected() -> None:
    def pretend(sock: socket.socket) -> None:
        record = read_record(sock)
        sock.sendall(record)  # our own hello, sent back
        proof = read_record(sock)
        sock.sendall(proof)  # and our own proof

    with server(pretend) as address, pytest.raises(HandshakeRejected, match="it does not know our cluster's secret"):
        dial(address, ME, SECRET, "tcp", TIMEOUT_S)


def test_the_secret_never_crosses_the_wire() -> None:
    def run() -> tuple[bytes, Introduction, Introduction]:
        (a, to_a), (b, to_b) = socket.socketpair(), socket.socketpair()
        wire: list[bytes] = []

        def carry(source: socket.socket, target: socket.socket) -> None:
            while part := source.recv(4096):
                wire.append(part)
                target.sendall(part)

        carriers = [threading.Thread(target=carry, args=ends) for ends in ((to_a, to_b), (to_b, to_a))]
        welcomed: list[Introduction] = []
        deadline = time.monotonic() + TIMEOUT_S
        acceptor = threading.Thread(target=lambda: welcomed.append(welcome(b, ME, SECRET, deadline)))
        for thread in (*carriers, acceptor):
            thread.start()
        answered = introduce(a, Introduction(ME, "unix"), SECRET, deadline)
        acceptor.join()
        a.close()
        b.close()
        for thread in carriers:
            thread.join()
        to_a.close()
        to_b.close()
        return b"".join(wire), answered, welcomed[0]

    first, answered, welcomed = run()
    second, _, _ = run()
    assert answered == welcomed == Introduction(ME, "unix")
    assert SECRET not in first
    assert SECRET[:8] not in first
    assert first != second  # so that a recorded handshake is of no use


def hello_record(body: bytes, version: int = VERSION, kind: int = HELLO) -> bytes:
    preface: bytes = PREFACE.pack(MAGIC, version, kind, len(body))
    return preface + body


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak Braid's link protocol"),
        (secrets.token_bytes(500), "does not speak Braid's link protocol"),
        (b"BRAID", "closed the connection during the handshake"),
        (hello_record(b"", version=99), "it speaks version 99 of the link protocol, this process 1"),
        (hello_record(b"", kind=PROOF), "handshake record 2 came where 1 was due"),
        (PREFACE.pack(MAGIC, VERSION, HELLO, 65_535), "a handshake record of 65535 bytes exceeds 4096"),
        (hello_record(bytes(32) + b"{}"), "its hello cannot be read"),
        (hello_record(bytes(32) + b"[" * 4000), "its hello cannot be read"),
        (hello_record(bytes(32) + b"\xff\xfe"), "its hello cannot be read"),
        (
            hello_record(bytes(32) + b'{"name":1,"role":"","incarnation":1,"host_id":"","transport":"tcp"}'),
            "a field of the wrong type",
        ),
        (
            hello_record(bytes(32) + b'{"name":"","role":"","incarnation":1,"host_id":"","transport":"ipx"}'),
            "unknown transport 'ipx'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:30],
)
def test_a_garbage_client_is_cut_off_and_logged(
    host: LinkHost, words: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection((host.address.tcp_host, host.address.tcp_port)) as sock:
        sock.sendall(words)
        with suppress(OSError):  # it may have hung up already
            sock.shutdown(socket.SHUT_WR)
        until_hung_up(sock)
    host.until(lambda: reason in caplog.text, "the warning")
    dial(host.address, ME, SECRET, "tcp", TIMEOUT_S).close()  # and the listener serves on


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak Braid's link protocol"),
        (b"", "closed the connection during the handshake"),
        (hello_record(b"", version=2), "it speaks version 2 of the link protocol, this process 1"),
    ],
)
def test_a_garbage_server_is_rejected(words: bytes, reason: str) -> None:
    def answer(sock: socket.socket) -> None:
        read_record(sock)
        sock.sendall(words)

    with server(answer) as address, pytest.raises(HandshakeRejected, match=reason) as error:
        dial(address, ME, SECRET, "tcp", TIMEOUT_S)
    assert error.value.address == f"127.0.0.1:{address.tcp_port}"


def test_a_silent_server_is_rejected_at_the_deadline() -> None:
    with (
        server(lambda sock: (until_hung_up(sock), None)[1]) as address,
        pytest.raises(HandshakeRejected, match="silence: no answer before the deadline"),
    ):
        dial(address, ME, SECRET, "tcp", 0.2)


def test_silent_clients_delay_nobody_and_are_let_go_with_the_listener(tmp_path: Path) -> None:
    links = SimpleQueue[Link]()
    path = str(tmp_path / "s")
    listener = Listener(ME, SECRET, path, None, links.put, handshake_timeout_s=4 * TIMEOUT_S)
    silent = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    for sock in silent:
        sock.connect(path)
    dial(Address(path, "", 0), ME, SECRET, "unix", TIMEOUT_S).close()  # long before any of them is cut off
    links.get(timeout=TIMEOUT_S).close()
    listener.close()
    for sock in silent:
        until_hung_up(sock)
        sock.close()
    assert links.empty()


def test_a_silent_client_is_cut_off_and_told_why(tmp_path: Path) -> None:
    listener = Listener(ME, SECRET, str(tmp_path / "s"), None, Link.close, handshake_timeout_s=0.2)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "s"))
        assert b"silence" in until_hung_up(sock)
    listener.close()


def test_a_transport_must_fit_its_socket(host: LinkHost) -> None:
    with (
        socket.create_connection((host.address.tcp_host, host.address.tcp_port)) as sock,
        pytest.raises(Refused, match="transport 'shm' does not go over this socket"),
    ):
        introduce(sock, Introduction(ME, "shm"), SECRET, time.monotonic() + TIMEOUT_S)


@every_transport
def test_nobody_there_is_another_error(tmp_path: Path, transport: Transport) -> None:
    with socket.socket() as held:  # so that nobody else listens there meanwhile
        held.bind(("127.0.0.1", 0))
        with pytest.raises(DialFailed, match="nobody answers at"):
            dial(Address(str(tmp_path / "none"), *held.getsockname()), ME, SECRET, transport, TIMEOUT_S)


def test_a_short_secret_and_a_huge_name_are_bad_input(host: LinkHost) -> None:
    with pytest.raises(ValueError, match="the cluster secret has 5 bytes: use at least 16"):
        dial(host.address, ME, b"short", "tcp", TIMEOUT_S)
    with pytest.raises(ValueError, match="shorten the worker's name"):
        dial(host.address, Hello("n" * 5000, "both", 1, ""), SECRET, "tcp", TIMEOUT_S)


def test_the_preface_never_changes() -> None:
    """Another version must still be able to read which version it met."""
    assert PREFACE.pack(b"BRAID", 1, 2, 3) == struct.pack("<5sHBH", b"BRAID", 1, 2, 3)
    assert PREFACE.size == 10
