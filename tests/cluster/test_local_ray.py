"""What is decided before Ray is asked: room for the workers, and whether anybody answers."""

from __future__ import annotations

import socket

import pytest

from braid.cluster.errors import ClusterNotFound
from braid.cluster.local_ray import check_answers, cpus_wanted
from braid.cluster.spec import from_dict


def test_logical_cpus_follow_the_spec() -> None:
    spec = from_dict({"prefill": {"workers": 3}, "decode": {"cpus": 2.5}, "experts": {"workers": 2, "cpus": 0.5}})
    assert cpus_wanted(spec) == 3 + 2.5 + 1


def test_nobody_answers() -> None:
    with pytest.raises(ClusterNotFound, match=r"no Ray cluster answers at '127\.0\.0\.1:1': Connection refused"):
        check_answers("127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        check_answers(f"127.0.0.1:{somebody.getsockname()[1]}")
    check_answers("auto")
