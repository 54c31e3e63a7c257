"""How the expert map follows the workers: pure functions from one view to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..actors.view import ClusterView
from ..router.expert_map import ExpertMap, Owner, build_map
from .plan import WorkerPlan


def first_map(
    holders: Sequence[tuple[WorkerPlan, int]], num_experts: int, moe_layers: Sequence[int]
) -> ExpertMap | None:
    """The checked map of epoch 1 over (expert worker, incarnation); None when the experts are colocated."""
    if not holders:
        return None
    owners = [Owner(plan.name, incarnation) for plan, incarnation in holders]
    held = {plan.name: plan.expert_ids or () for plan, _ in holders}
    expert_map = build_map(1, num_experts, moe_layers, owners, held)
    expert_map.check()
    return expert_map


def map_without(view: ClusterView, name: str) -> ExpertMap | None:
    """An expert without a resident replica keeps the old map in force: who needs it is told by the engine."""
    current = view.expert_map
    if current is None or name not in {owner.worker for owner in current.owners}:
        return current
    smaller = current.without(name, view.epoch + 1)
    try:
        smaller.check()
    except ValueError:
        return current
    return smaller


def num_orphans(view: ClusterView) -> int:
    """Experts of a layer that the map in force gives only to workers outside the view."""
    if view.expert_map is None:
        return 0
    live = {info.name for info in view.workers}
    owners = view.expert_map.owners
    layer = next(iter(view.expert_map.replicas.values()), ())
    return sum(not any(owners[index].worker in live for index in holders) for holders in layer)


def gaps(view: ClusterView) -> Iterator[str]:
    """What a view without some of its workers can no longer do."""
    if not view.of_role("prefill", "both"):
        yield "no prefill worker is left: requests are refused"
    if not view.of_role("decode", "both"):
        yield "no decode worker is left: requests are refused"
    orphans = num_orphans(view)
    if orphans:
        assert view.expert_map is not None
        num_experts = view.expert_map.num_experts
        yield f"{orphans} of {num_experts} experts a layer have no live replica: requests that need one fail"
