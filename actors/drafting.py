"""What one sequence's drafts have brought."""

from __future__ import annotations

from dataclasses import dataclass

from .speculation import Acceptance


@dataclass(slots=True)
class Drafting:
    acceptance: Acceptance
    num_drafted: int = 0
    num_accepted: int = 0
