"""Into how many micro-batches a step is cut: one's rows are at the experts while the next one attends.

More of them hide more of the wait and cost more passes over the weights, so what pays depends on the model, the machine
and the batch: it is tried. Nothing decided here can change a token. Pure: times are told, never taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MOST = 4
MIN_WAIT = 0.1  # of a step: where less is spent waiting there is nothing to hide
MARGIN = 1.03  # a rival must be this much faster to be taken
TRIAL_STEPS = 8  # of both, in turns: what else the machine does then meets both alike
FIRST_PAUSE, LAST_PAUSE = 16, 2048  # steps between two trials; doubled after each that changed nothing


@dataclass(slots=True)
class Choice:
    """For steps of about the same size."""

    count: int = 1
    rival: int = 1
    pause: int = FIRST_PAUSE
    steps_left: int = FIRST_PAUSE  # until the next trial, or of it
    trial: dict[int, list[float]] = field(default_factory=dict)  # seconds a row, by number of micro-batches


class Overlap:
    def __init__(self) -> None:
        self._choices: dict[tuple[int, int], Choice] = {}

    def choose(self, phase: int, num_rows: int) -> int:
        """phase: 0 decode, 1 prefill. Micro-batches of the next step; `observe` follows when it has run."""
        choice = self._choice(phase, num_rows)
        if not choice.trial:
            return min(choice.count, num_rows)
        return min(choice.rival if choice.steps_left % 2 else choice.count, num_rows)

    def observe(self, phase: int, num_rows: int, count: int, seconds: float, waited: float) -> None:
        """A step of `count` micro-batches took `seconds`, of which it waited some for rows of experts."""
        choice = self._choice(phase, num_rows)
        choice.steps_left -= 1
        if choice.trial:
            choice.trial.setdefault(count, []).append(seconds / num_rows)
        if choice.steps_left > 0:
            return
        if choice.trial:
            self._conclude(choice)
        elif num_rows > choice.count and (choice.count > 1 or waited > MIN_WAIT * seconds):
            choice.rival = _next_rival(choice)
            choice.trial = {choice.count: [], choice.rival: []}
            choice.steps_left = TRIAL_STEPS
        else:
            self._rest(choice, has_changed=False)

    def _choice(self, phase: int, num_rows: int) -> Choice:
        return self._choices.setdefault((phase, num_rows.bit_length()), Choice())

    def _conclude(self, choice: Choice) -> None:
        ours, theirs = (sorted(choice.trial[count]) for count in (choice.count, choice.rival))
        # The second best: the first steps of a shape warm up, and any step may have lost its core for a while.
        has_changed = len(ours) > 1 and len(theirs) > 1 and theirs[1] * MARGIN < ours[1]
        if has_changed:
            choice.count = choice.rival
        choice.trial = {}
        self._rest(choice, has_changed)

    def _rest(self, choice: Choice, has_changed: bool) -> None:
        choice.pause = FIRST_PAUSE if has_changed else min(2 * choice.pause, LAST_PAUSE)
        choice.steps_left = choice.pause


def _next_rival(choice: Choice) -> int:
    """One more and one less in turns, as far as there are."""
    wants_more = choice.count == 1 or (choice.rival < choice.count and choice.count < MOST)
    return choice.count + 1 if wants_more else choice.count - 1
