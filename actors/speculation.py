"""How far ahead to draft: decided from what drafts have brought and cost so far. Pure: times are told, never taken.

A depth pays when its expected tokens a step, over its expected time a step, beat those of the other depths. What has
never been measured is taken for cheap, so every depth is tried; now and then, ever more seldom, another one is tried
again: the deepest, or none where drafts are made. Nothing decided here can change a token: a draft is only kept where
it equals what would be sampled anyway.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

MAX_DEPTH = 2
PATIENCE = 1.05  # another depth must promise this much more before it is taken
PROBE_STEPS = 4
FIRST_PROBE, LAST_PROBE = 128, 2048  # steps between two probes; doubled after each that changed nothing
FORGET_STEPS = 256
LAST_SEEN = 25  # passes of a size that are remembered: with fewer, chance decides too often on a busy machine
SEEN_ENOUGH = 3  # passes of a size, for it to be believed whatever larger ones have taken


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


@dataclass(slots=True)
class Size:
    """Passes of about as many rows: how many there were but for the first one, and what the last ones took."""

    count: int = 0
    median: float = 0.0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_SEEN))


class Costs:
    """Seconds by the number of rows, of a pass or of a step but for its drafting: a median of the last ones of each.

    A median, as a core that was taken away for a while says nothing about the pass, and as what is seen seldom must be
    judged by the same measure as what is seen always: a mean of many beside the best of a few prefers the few.
    More rows never take less: where a size that was hardly seen yet seems to say so, what it took was chance.
    In between it is a straight line, outside the numbers seen the least it could be, so that hope is tried and then
    corrected.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []  # ascending, of the sizes that have a median
        self._sizes: dict[int, Size] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        rows = _rounded(num_rows)
        size = self._sizes.get(rows)
        if size is None:  # takes memory and notes kernel calls: it says nothing of those that follow
            self._sizes[rows] = Size()
            return
        if not size.count:
            insort(self._rows, rows)
        size.count += 1
        size.last.append(seconds)
        size.median = sorted(size.last)[(len(size.last) - 1) // 2]

    def doubt(self) -> None:
        """What was seen counts as much as one more pass from now on."""
        for rows in self._rows:
            size = self._sizes[rows]
            size.last.clear()
            size.last.append(size.median)

    def at(self, num_rows: float) -> float:
        rows = self._rows
        if not rows:
            return 0.0
        place = bisect_left(rows, num_rows)
        if place == len(rows):
            return self._cost(place - 1)
        if rows[place] == num_rows:
            return self._cost(place)
        if not place:
            return self._cost(0) * num_rows / rows[0]
        part = (num_rows - rows[place - 1]) / (rows[place] - rows[place - 1])
        return self._cost(place - 1) * (1 - part) + self._cost(place) * part

    def _cost(self, place: int) -> float:
        size = self._sizes[self._rows[place]]
        if size.count >= SEEN_ENOUGH or place + 1 == len(self._rows):
            return size.median
        return min(size.median, self._cost(place + 1))


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

    @property
    def is_off(self) -> bool:
        """Whether nobody drafts at present, whatever its own drafts have brought."""
        return not self._depth and not self._probes_left

    def depth(self, own: Acceptance) -> int:
        """Drafts for one sequence: what pays by its own acceptance, among company that drafts alike."""
        if self._probes_left:
            return self._probed
        if self.is_off:
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
