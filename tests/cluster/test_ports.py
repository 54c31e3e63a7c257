from __future__ import annotations

import socket
from pathlib import Path

from braid.cluster.ports import LOWEST, free_ports


def test_free_ports_differ_and_are_none_that_the_system_gives_away() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in ports:
        assert port < system or system <= LOWEST, "who asks for any port could be given this one"
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))
