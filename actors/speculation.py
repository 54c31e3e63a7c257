"""How far ahead to draft: decided from what drafts have brought and cost so far. Pure: times are told, never taken.

A depth pays when its expected tokens a step, over its expected time a step, beat those of the other depths. What has
never been measured is taken for cheap, so every depth is tried; now and then, ever more seldom, another one is tried
again: the deepest, or none where drafts are made. Nothing decided here can change a token: a draft is only kept where
it equals what would be sampled anyway.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

MAX_DEPTH = 2
PATIENCE = 1.02  # another depth must promise this much more before it is taken
PROBE_STEPS = 4
FIRST_PROBE, LAST_PROBE = 128, 2048  # steps between two probes; doubled after each that changed nothing
FORGET_STEPS = 256


@dataclass(slots=True)
class Acceptance:
    """`shares[i]`: how often draft i was accepted where draft i - 1 was. Recent means, of a worker or a sequence."""

    shares: list[float] = field(default_factory=lambda: [0.8, 0.7])
    memory: float = 32.0  # observations that outweigh what was believed before

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        for place in range(min(num_drafted, num_accepted + 1)):
            self.shares[place] += (float(place < num_accepted) - self.shares[place]) / self.memory

    def forget(self, toward: Acceptance) -> None:
        """Without drafts nothing is learnt: belief returns to what holds for others, and so to another try."""
        for place, share in enumerate(toward.shares):
            self.shares[place] += (share - self.shares[place]) / FORGET_STEPS

    def tokens(self, depth: int) -> float:
        """Expected of a step that verifies `depth` drafts: one for free, and each draft that all before it led to."""
        expected, reached = 1.0, 1.0
        for share in self.shares[:depth]:
            reached *= share
            expected += reached
        return expected


class Costs:
    """Seconds by the number of rows, of a pass or of a step but for its drafting: a mean per number seen.

    In between it is a straight line, outside the numbers seen the least it could be, so that hope is tried and then
    corrected.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []  # ascending
        self._mean: dict[float, float] = {}
        self._count: dict[int, int] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        rows = _rounded(num_rows)
        count = self._count[rows] = self._count.get(rows, 0) + 1
        if count == 1:
            return  # takes memory and notes kernel calls: it says nothing of those that follow
        if count == 2:
            self._rows.insert(bisect_left(self._rows, rows), rows)
            self._mean[rows] = seconds
        elif count < 5:
            self._mean[rows] = min(self._mean[rows], seconds)
        else:  # a core that was taken away for a while says nothing about the pass
            self._mean[rows] += (min(seconds, 2 * self._mean[rows]) - self._mean[rows]) / 10

    def doubt(self) -> None:
        """Whatever the next passes do better is believed at once; one that was held up says nothing."""
        self._count = {rows: min(count, 2) for rows, count in self._count.items()}

    def at(self, num_rows: float) -> float:
        if not self._rows:
            return 0.0
        if (seen := self._mean.get(num_rows)) is not None:
            return seen
        place = bisect_left(self._rows, num_rows)
        if place == len(self._rows):
            return self._mean[self._rows[-1]]
        if not place:
            return self._mean[self._rows[0]] * num_rows / self._rows[0]
        low, high = self._rows[place - 1], self._rows[place]
        part = (num_rows - low) / (high - low)
        return self._mean[low] * (1 - part) + self._mean[high] * part


def _rounded(rows: int) -> int:
    """To three significant bits, so that the table stays small while batches of all sizes come by."""
    step = 1 << max(rows.bit_length() - 3, 0)
    return (rows + step // 2) // step * step


class Speculation:
    """One worker's choice. Per step: `start`, then `depth` for each sequence, and the figures as they come in."""

    def __init__(self) -> None:
        self.acceptance = Acceptance(memory=64.0)
        self.step_costs = Costs()
        self.draft_costs = Costs()
        self._depth = MAX_DEPTH
        self._seconds = [1.0] * (MAX_DEPTH + 1)
        self._wait, self._since_probe, self._probes_left, self._probed = FIRST_PROBE, 0, 0, 0

    def start(self, num_sequences: int) -> None:
        """Chooses for the drafts that the next step verifies. `num_sequences` decode at present."""
        self._seconds = [self._step_seconds(max(num_sequences, 1), depth) for depth in range(MAX_DEPTH + 1)]
        before, self._depth = self._depth, self._best(self.acceptance)
        if self._depth > before:
            self._wait = FIRST_PROBE
        if self._probes_left:
            self._probes_left -= 1
        else:
            self._since_probe += 1
            if self._since_probe >= self._wait:
                self._since_probe, self._probes_left = 0, PROBE_STEPS
                in_force = self._probed if self._depth == 1 else self._depth  # from the middle, up and down in turns
                self._probed = MAX_DEPTH - in_force
                for costs in (self.step_costs, self.draft_costs):  # they may stem from a cold start, or a busy hour
                    costs.doubt()
                self._wait = min(2 * self._wait, LAST_PROBE)

    def depth(self, own: Acceptance) -> int:
        """Drafts for one sequence: what pays by its own acceptance, among company that drafts alike."""
        if self._probes_left:
            return self._probed
        if not self._depth:  # off for all: nothing is weighed for each
            return 0
        depth = self._best(own)
        if not depth:
            own.forget(self.acceptance)
        return depth

    def new_sequence(self) -> Acceptance:
        return Acceptance(list(self.acceptance.shares))

    def verified(self, own: Acceptance, num_drafted: int, num_accepted: int) -> None:
        own.observe(num_drafted, num_accepted)
        self.acceptance.observe(num_drafted, num_accepted)

    def _step_seconds(self, count: int, depth: int) -> float:
        """Expected time of one step in which `count` sequences verify and then draft `depth` tokens each."""
        total = self.step_costs.at(count * (1 + depth))
        if depth:  # the first pass takes every row just verified, each further one a row a sequence
            total += self.draft_costs.at(count * self.acceptance.tokens(depth))
            total += (depth - 1) * self.draft_costs.at(count)
        return max(total, 1e-9)

    def _best(self, acceptance: Acceptance) -> int:
        """The depth with the most tokens a second; the one in force wins against what is hardly better."""
        rates = [acceptance.tokens(depth) / seconds for depth, seconds in enumerate(self._seconds)]
        rates[self._depth] *= PATIENCE
        return max(range(MAX_DEPTH, -1, -1), key=rates.__getitem__)
