"""A worker's place on the data plane: dialing, redialing, and ends that may come from two threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import until

from braid.actors.endpoint import Endpoint
from braid.actors.links import DialFailed
from braid.actors.reactor import Closed, Event
from braid.actors.settings import WorkerSettings
from braid.actors.view import ClusterView, WorkerInfo

SECRET = b"the secret of a test cluster, 32 b"


class Cast:
    """Endpoints in one folder; the serving thread of each does nothing but poll."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.endpoints: list[Endpoint] = []

    def make(self, name: str, incarnation: int = 1) -> Endpoint:
        settings = WorkerSettings(
            "test", name, "decode", incarnation, "node", "", "auto", SECRET, str(self.run_dir), "127.0.0.1", "auto", 1
        )
        self.endpoints.append(Endpoint(settings))
        return self.endpoints[-1]

    def start(self, name: str, incarnation: int = 1) -> Endpoint:
        endpoint = self.make(name, incarnation)
        endpoint.start(lambda: serve(endpoint))
        return endpoint


def serve(endpoint: Endpoint) -> None:
    while not endpoint.stopping:
        endpoint.poll(1.0)


@pytest.fixture
def cast(tmp_path: Path) -> Iterator[Cast]:
    made = Cast(tmp_path)
    yield made
    for endpoint in made.endpoints:
        endpoint.stop()


def view_of(*infos: WorkerInfo, epoch: int = 1) -> ClusterView:
    return ClusterView(epoch, infos, None)


def test_a_target_that_is_gone_does_not_keep_the_others_from_being_dialed(cast: Cast) -> None:
    mine, gone, live = cast.start("a"), cast.start("b"), cast.start("c")
    gone.stop()
    with pytest.raises(DialFailed, match="nobody answers"):
        mine.apply(view_of(gone.info, live.info), [gone.info, live.info])
    assert mine.link_to("c") is not None


def test_another_life_at_the_address_of_a_target_is_not_taken_for_it(cast: Cast) -> None:
    mine, other = cast.start("a"), cast.start("b")
    there = other.info
    wanted = WorkerInfo("c", "decode", 1, there.host_id, there.unix_path, there.tcp_host, there.tcp_port, 0, there.node)
    with pytest.raises(DialFailed, match="b#1 answers"):
        mine.apply(view_of(wanted), [wanted])
    assert mine.link_to("b") is None
    assert mine.link_to("c") is None


def test_a_link_that_broke_while_both_lives_go_on_is_dialed_again(cast: Cast) -> None:
    mine, other = cast.start("a"), cast.start("b")
    mine.apply(view_of(mine.info, other.info), [other.info])
    first = mine.link_to("b")
    assert first is not None
    first.close("a test broke it")
    until(lambda: mine.link_to("b") not in (None, first), "another link")
    mine.apply(view_of(mine.info, epoch=2), [])
    assert mine.link_to("b") is None  # and what has left the cluster is not


def test_an_earlier_life_that_comes_late_does_not_take_the_place_of_the_one_in_the_view(cast: Cast) -> None:
    """As one that was stopped, taken for dead and replaced: its view is old, and it dials as it always did."""
    mine, past, present = cast.start("a"), cast.start("b", 1), cast.start("b", 2)
    mine.apply(view_of(mine.info, present.info), [])
    present.apply(view_of(mine.info, present.info), [mine.info])
    until(lambda: mine.link_to("b") is not None, "the link of the life in the view")
    link = mine.link_to("b")
    past.apply(view_of(mine.info, past.info), [mine.info])  # it is answered, or this would raise
    until(lambda: past.link_to("a") is None, "the end of the link of the earlier life")
    assert mine.link_to("b") is link
    assert present.link_to("a") is not None


def test_a_view_that_was_overtaken_changes_nothing(cast: Cast) -> None:
    mine, other = cast.start("a"), cast.start("b")
    mine.apply(view_of(mine.info, other.info, epoch=3), [other.info])
    link = mine.link_to("b")
    mine.apply(view_of(mine.info, epoch=2), [])
    assert link is not None
    assert mine.link_to("b") is link


def test_a_step_that_does_not_end_keeps_its_memory_and_loses_its_links(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braid.actors.endpoint.STOP_TIMEOUT_S", 0.05)
    slow, other, may_end = cast.make("a"), cast.start("b"), threading.Event()
    seen: list[Event] = []

    def serve_slowly() -> None:
        may_end.wait(20)  # a step
        while not any(isinstance(event, Closed) for event in seen):
            seen.extend(slow.poll(1.0))  # which waits for rows

    slow.start(serve_slowly)
    slow.apply(view_of(slow.info, other.info), [other.info])
    link = slow.link_to("b")
    assert link is not None
    slow.stop()
    until(lambda: other.link_to("a") is None, "the end of the link at the other side")
    assert link.closed == "a is stopping"
    may_end.set()
    until(lambda: slow._thread is not None and not slow._thread.is_alive(), "the end of the step")
    assert slow.failure is None


def test_a_worker_whose_serving_thread_broke_says_so_and_can_be_stopped(cast: Cast) -> None:
    broken = cast.make("a")
    broken.check()

    def serve_badly() -> None:
        raise ArithmeticError("one step too many")

    broken.start(serve_badly)
    until(lambda: broken.failure is not None, "the failure")
    with pytest.raises(RuntimeError, match="a stopped serving: one step too many"):
        broken.check()
    broken.stop()
    broken.stop()


def test_a_worker_may_be_stopped_before_it_serves(cast: Cast, tmp_path: Path) -> None:
    cast.make("a").stop()
    assert list(tmp_path.iterdir()) == []
