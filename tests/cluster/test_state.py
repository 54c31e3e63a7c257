"""The cluster's state machine under virtual time: start-up, loss, misuse and tear-down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest

from braid.actors.view import Role, WorkerInfo
from braid.cluster.errors import IllegalTransition
from braid.cluster.events import (
    Answered,
    Applied,
    Apply,
    Begin,
    Broke,
    FrontFailed,
    FrontReady,
    Instruction,
    Kill,
    Missed,
    Place,
    PoolPlaced,
    PoolRefused,
    Prepared,
    Publish,
    StartFront,
    StartWorker,
    Stop,
    TearDown,
    Tick,
    TornDown,
)
from braid.cluster.plan import Node, Threads, plan_pools
from braid.cluster.spec import from_dict
from braid.cluster.state import TRANSITIONS, ClusterState, Limits

HERE = Node("here", "127.0.0.1", 4)
NAMES = ["prefill-0", "decode-0", "expert-0", "expert-1"]


def info(name: str, incarnation: int = 1) -> WorkerInfo:
    role = name.split("-")[0]
    assert role in ("prefill", "decode", "expert")
    return WorkerInfo(name, cast(Role, role), incarnation, "host", f"/run/{name}", "127.0.0.1", 1, 7, "here")


def new_state(**experts: int) -> ClusterState:
    spec = from_dict({"experts": {"workers": 2, **experts}})
    return ClusterState(plan_pools(spec, 8), 8, [1, 2], limits=Limits(start_s=100.0, max_missed=3))


@pytest.fixture
def state() -> Iterator[ClusterState]:
    state = new_state()
    yield state
    state.validate()


def place_all(state: ClusterState) -> list[Instruction]:
    state.handle(Begin(0.0))
    out: list[Instruction] = []
    for pool in state.pools.values():
        out = state.handle(PoolPlaced(1.0, pool.name, (HERE,) * len(pool.workers)))
    return out


def prepare_all(state: ClusterState) -> list[Instruction]:
    place_all(state)
    return [i for name in NAMES for i in state.handle(Prepared(2.0, name, 1, info(name)))]


def serve(state: ClusterState) -> None:
    prepare_all(state)
    state.handle(FrontReady(2.5, "http"))
    state.handle(FrontReady(2.5, "grpc"))
    for name in NAMES:
        state.handle(Applied(3.0, name, 1, 1))


def test_begin_places_pools_and_starts_fronts_at_once(state: ClusterState) -> None:
    out = state.handle(Begin(0.0))
    assert [i.pool.name for i in out if isinstance(i, Place)] == ["prefill", "decode", "expert"]
    assert [i.front for i in out if isinstance(i, StartFront)] == ["http", "grpc"]


def test_workers_start_when_the_last_pool_has_its_place(state: ClusterState) -> None:
    out = place_all(state)
    starts = [i for i in out if isinstance(i, StartWorker)]
    assert [s.worker.name for s in starts] == NAMES
    assert {s.threads for s in starts} == {Threads(share=1, most=4), Threads(share=1, most=2)}
    assert starts[2].worker.expert_ids == tuple(range(8))


def test_the_first_view_waits_for_every_worker(state: ClusterState) -> None:
    out = prepare_all(state)
    assert isinstance(out[0], Publish)
    assert out[0].view.epoch == 1
    assert [i.worker for i in out if isinstance(i, Apply)] == NAMES
    assert state.view is not None
    assert state.view.expert_map is not None
    assert state.view.expert_map.replica_counts(1) == [2] * 8
    assert state.phase == "joining"


def test_workers_that_round_differently_do_not_serve_together(state: ClusterState) -> None:
    place_all(state)
    native = replace(info("decode-0"), kernels="native-avx512-1")
    assert state.handle(Prepared(2.0, "decode-0", 1, native)) == []
    (out,) = state.handle(Prepared(2.1, "expert-0", 1, replace(info("expert-0"), kernels="reference")))
    assert out == TearDown(state.failure)
    assert state.failure is not None
    assert "native-avx512-1 on decode-0, reference on expert-0" in state.failure
    assert "Place them on machines of one kind by labels" in state.failure


def test_serving_needs_every_link_and_every_front(state: ClusterState) -> None:
    prepare_all(state)
    for name in NAMES:
        state.handle(Applied(3.0, name, 1, 1))
    state.handle(FrontReady(3.0, "http"))
    without_grpc = state.phase
    state.handle(FrontReady(3.0, "grpc"))
    assert (without_grpc, state.phase) == ("joining", "serving")
    assert state.problems == ()


def test_an_expert_worker_is_lost_and_its_twin_carries_on(state: ClusterState) -> None:
    serve(state)
    out = state.handle(Broke(9.0, "expert-1", 1, "its process died"))
    assert out[0] == Kill("expert-1", 1)
    assert isinstance(out[1], Publish)
    view = out[1].view
    assert view.epoch == 2
    assert [worker.name for worker in view.workers] == NAMES[:3]
    assert view.expert_map is not None
    assert view.expert_map.epoch == 2
    assert view.expert_map.replica_counts(2) == [1] * 8
    assert [i.worker for i in out if isinstance(i, Apply)] == NAMES[:3]
    assert state.phase == "degraded"
    assert state.problems == ("expert-1 is lost: its process died",)
    assert state.handle(Broke(9.1, "expert-1", 1, "again")) == []


def test_the_last_replica_keeps_the_old_map_and_says_so(state: ClusterState) -> None:
    serve(state)
    state.handle(Broke(9.0, "expert-1", 1, "died"))
    assert state.view is not None
    before = state.view.expert_map
    state.handle(Broke(9.5, "expert-0", 1, "died"))
    assert state.view.epoch == 3
    assert state.view.expert_map is before
    assert "8 of 8 experts a layer have no live replica: requests that need one fail" in state.problems


def test_no_prefill_worker_is_said(state: ClusterState) -> None:
    serve(state)
    state.handle(Broke(9.0, "prefill-0", 1, "died"))
    assert "no prefill worker is left: requests are refused" in state.problems


def test_silence_is_death_after_three_pings_in_a_row(state: ClusterState) -> None:
    serve(state)
    for at in (5.0, 6.0):
        assert state.handle(Missed(at, "decode-0", 1, "5 s")) == []
    state.handle(Answered(6.5, "decode-0", 1))
    for at in (7.0, 8.0):
        assert state.handle(Missed(at, "decode-0", 1, "5 s")) == []
    assert state.handle(Missed(9.0, "decode-0", 1, "5 s"))[0] == Kill("decode-0", 1)
    assert "no answer to 3 pings in a row" in state.problems[0]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Broke(2.0, "expert-0", 1, "ValueError: no shard 3"), "expert-0: ValueError: no shard 3"),
        (PoolRefused(2.0, "decode", "pool decode: no room"), "pool decode: no room"),
        (FrontFailed(2.0, "http", "port 80 taken"), "the http front end failed: port 80 taken"),
    ],
)
def test_a_start_that_breaks_is_torn_down_with_the_reason(
    state: ClusterState, event: Broke | PoolRefused | FrontFailed, reason: str
) -> None:
    place_all(state)
    assert state.handle(event) == [TearDown(reason)]
    assert state.failure == reason
    assert state.handle(Prepared(3.0, "decode-0", 1, info("decode-0"))) == []
    state.handle(TornDown(4.0))
    assert state.phase == "stopped"
    assert {worker.state for worker in state.workers.values()} == {"stopped"}


def test_a_start_has_a_deadline_that_says_who_is_waited_for(state: ClusterState) -> None:
    place_all(state)
    state.handle(Prepared(2.0, "decode-0", 1, info("decode-0")))
    assert state.handle(Tick(100.0)) == []
    [down] = state.handle(Tick(100.1))
    assert isinstance(down, TearDown)
    assert down.failure == "not ready within 100 s; still waiting for prefill-0, decode-0, expert-0, expert-1"


def test_a_deadline_before_there_is_a_place(state: ClusterState) -> None:
    state.handle(Begin(0.0))
    state.handle(PoolPlaced(1.0, "decode", (HERE,)))
    assert state.handle(Tick(101.0)) == [], "the refusal of the place is due now, and says more"
    [down] = state.handle(Tick(110.1))
    assert isinstance(down, TearDown)
    assert down.failure is not None
    assert down.failure.endswith("waiting for a place for pool prefill, a place for pool expert")


def test_a_tick_is_harmless_once_serving(state: ClusterState) -> None:
    serve(state)
    assert state.handle(Tick(1e9)) == []


def test_events_of_an_earlier_life_change_nothing(state: ClusterState) -> None:
    serve(state)
    assert state.handle(Broke(9.0, "decode-0", 0, "an old corpse")) == []
    assert state.phase == "serving"


def test_stop_is_idempotent(state: ClusterState) -> None:
    serve(state)
    assert state.handle(Stop(9.0, "asked")) == [TearDown(None)]
    assert state.handle(Stop(9.0, "asked")) == []
    assert state.failure is None


def problems_of(state: ClusterState) -> tuple[str, ...]:
    """Of a tuple compared in place, mypy would go on to believe that it keeps its length."""
    return state.problems


def test_a_front_that_dies_later_is_a_problem_not_the_end(state: ClusterState) -> None:
    serve(state)
    assert state.handle(FrontFailed(9.0, "grpc", "died")) == []
    assert problems_of(state) == ("the grpc front end failed: died",)
    assert state.phase == "serving"
    state.handle(Broke(10.0, "expert-1", 1, "died too"))
    assert problems_of(state) == ("expert-1 is lost: died too", "the grpc front end failed: died")
    assert state.handle(FrontReady(11.0, "grpc")) == []
    assert problems_of(state) == ("expert-1 is lost: died too",)


def test_an_illegal_move_tells_the_story(state: ClusterState) -> None:
    serve(state)
    with pytest.raises(
        IllegalTransition, match=r"worker decode-0 cannot go from live to ready; story: planned -> start"
    ):
        state.handle(Prepared(9.0, "decode-0", 1, info("decode-0")))
    with pytest.raises(IllegalTransition, match=r"cluster cannot go from serving to starting; story: .*Begin"):
        state.handle(Begin(9.0))


def test_every_transition_names_states_that_exist() -> None:
    for what, start, finish in TRANSITIONS:
        assert what in ("cluster", "worker")
        assert start != finish


def test_colocated_has_no_map() -> None:
    state = ClusterState(plan_pools(from_dict({"experts": "colocated"}), 8), 8, [1])
    state.handle(Begin(0.0))
    state.handle(PoolPlaced(0.0, "prefill", (HERE,)))
    state.handle(PoolPlaced(0.0, "decode", (HERE,)))
    state.handle(Prepared(0.0, "prefill-0", 1, info("prefill-0")))
    state.handle(Prepared(0.0, "decode-0", 1, info("decode-0")))
    assert state.view is not None
    assert state.view.expert_map is None
    state.validate()
