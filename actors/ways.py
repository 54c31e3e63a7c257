"""How an attention worker's rows reach the experts: device memory that is shared, pairs of devices, or the host's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..router.expert_map import ExpertMap

MAX_MAIL_PEERS = 64  # as many have a place in the peer table; a host has far fewer

Way = Literal["mail", "paired", "staged"]


def way(expert_map: ExpertMap, has_mail: Sequence[bool] = (), has_pair: Sequence[bool] = ()) -> Way:
    """has_mail: of each owner, whether it is alive and shares memory with us; has_pair: and has a pair with us.

    One way for all rows of a step: another one than "staged" only where it leads to every expert, else part of each
    layer would wait for the host and the rest would have gained nothing.
    """
    if len(has_mail) <= MAX_MAIL_PEERS and _reaches_all(expert_map, has_mail):
        return "mail"
    return "paired" if _reaches_all(expert_map, has_pair) else "staged"


def _reaches_all(expert_map: ExpertMap, has: Sequence[bool]) -> bool:
    holders = {held for experts in expert_map.replicas.values() for held in experts}
    return any(has) and all(any(has[owner] for owner in held) for held in holders)
