"""How an attention worker's rows reach the experts: through shared device memory, or through the host's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..router.expert_map import ExpertMap

MAX_MAIL_PEERS = 64  # as many have a place in the peer table; a host has far fewer

Way = Literal["mail", "staged"]


def way(expert_map: ExpertMap, has_mail: Sequence[bool]) -> Way:
    """has_mail: of each owner, whether it is alive and shares memory with us.

    One way for all rows of a step: "mail" only where every expert has such an owner, else part of each layer would
    wait for the host and the rest would have gained nothing.
    """
    if not expert_map.replicas or len(has_mail) > MAX_MAIL_PEERS:
        return "staged"
    holders = {held for experts in expert_map.replicas.values() for held in experts}
    return "mail" if all(any(has_mail[owner] for owner in held) for held in holders) else "staged"
